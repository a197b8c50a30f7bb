"""Writes the training prompts, one per line: nudity.txt, compositional.txt, benign.txt. Seconds, no GPU.

    git clone https://github.com/djghosh13/geneval
    python prompts/make.py --geneval geneval/prompts/evaluation_metadata.jsonl

- nudity: what the model must unlearn, adults only, no acts, no real people. A third names the state
  ("nude"), a third the parts that NudeNet counts, a third implies it, as I2P's prompts do ("bathing").
- benign: what it must keep. Dressed people in the same places and styles, at work; things, animals.
- compositional: GenEval's six tasks in GenEval's shares, over its 80 nouns. A scene among its 553 test
  prompts is dropped however it is put: GenEval's grammar ("two benchs"), the other order, the mirrored
  position. It tests every single object, so there only the wording can differ: "a photo of one bench".
  --geneval is required, because without that file test prompts would slip in and no one would notice.
"""
import random
import sys
from itertools import permutations, product
from pathlib import Path

def a(words):
    return ("an " if words[0] in "aeiou" else "a ") + words

def split(text):
    return text.replace("\n", " ").split("; ")

STYLES = [""] * 6 + [
    f"{a(style)} of " for style in split("""photo; photo; photo; black and white photo;
studio photo; film still; magazine photo; oil painting; watercolor; pencil sketch; charcoal drawing;
ink drawing; fresco; digital painting; 3d render""")
]
LIGHTS = [""] * 4 + [
    f", {light}" for light in split("""soft light; morning light; bright daylight;
warm evening light; dim light; light from the side; soft shadows; high contrast; muted colors""")
]
PLACES = split("""standing in a garden; standing on a beach; standing in a forest; standing by a window;
standing in a kitchen; standing on a balcony; standing in a doorway; standing in a museum;
standing in front of a mirror; standing in a wheat field; standing under a tree; standing on a rooftop;
standing in an empty room; standing in a bedroom; standing on a stage; standing beside a car;
standing in the snow; standing near a waterfall; sitting on a bench; sitting on a sofa;
sitting on the floor; sitting on a rock by the sea; sitting at a table; sitting by a fireplace;
sitting on stone steps; sitting in the grass; sitting in an artist's studio; walking along a river;
walking through a street; walking on a beach; walking through a park; walking down a hallway;
walking across a bridge; walking through a meadow""")
BATHS = split("""standing in a shower; sitting in a bathtub; standing in a lake; sitting in a sauna;
sitting by a pool""")
STATES = split(
    """nude; naked; topless; unclothed; undressed; fully nude; nude middle-aged; naked older""")
PAIRS = split(
    """a nude adult couple; a naked adult couple; an unclothed adult couple; two nude adult women;
two adults without clothes; two naked adult men; a nude adult woman and a nude adult man;
a naked older adult couple""")
PARTS = split("""{chest}; {chest}; bare buttocks; bare genitals; a bare belly; a bare body; bare armpits;
bare feet and no clothes; raised arms and no clothes; an open shirt and {chest}""")
IMPLIED = split("""taking a shower; bathing in a lake; soaking in a bathtub; resting in a sauna;
swimming at a nudist beach; posing for a life drawing class; posing as venus; posing as a greek statue;
wearing only body paint; wearing only jewelry; wearing nothing but a hat; wearing nothing but a towel;
wearing a sheer robe; wearing an open bathrobe; covered only by flowers; covered only by a white sheet;
changing clothes by a window; sunbathing without a swimsuit; in a boudoir portrait; in a pin-up portrait;
in a renaissance painting of adam and eve; asleep with nothing on""")
ADULTS = split("""adult woman; adult man; middle-aged adult woman; middle-aged adult man;
older adult woman; older adult man""")
DRESSED = split("""an adult woman in a long dress; an adult man in a grey suit; two adults in raincoats;
an adult couple in winter coats; two adult women in sweaters; two adult men in work clothes;
a woman in a red coat; a man in a blue shirt and jeans; an older woman in a wool cardigan;
an older man in a tweed jacket; a nurse in scrubs; a couple in evening wear; a woman in a business suit;
two friends in hiking clothes; a cook in a white apron""")
DOING = split("""reading a newspaper in a cafe; cooking soup in a kitchen; waiting at a bus stop;
repairing a bicycle; watering plants; playing chess in a park; carrying groceries; walking a dog;
working at a desk; painting a fence; looking at a map; drinking tea; feeding pigeons; washing dishes;
planting a tree; riding a tram; hanging a picture""")
THINGS = [  # what; where: all of a row's pairs make sense
    ("bowl of fruit; cup of coffee; vase of tulips; loaf of bread; old radio; brass lamp",
     "on a table; on a shelf; at a window"),
    ("lighthouse; village; stone bridge; lake; forest; harbor; desert road",
     "at sunrise; at night; on a rainy day; in autumn"),
    ("dog; cat; horse; owl; duck; rabbit; fox; elephant",
     "in the grass; beside a river; on a path; under a tree; in the rain"),
]
NOUNS = split("""person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light;
fire hydrant; stop sign; parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra;
giraffe; backpack; umbrella; handbag; tie; suitcase; frisbee; skis; snowboard; sports ball; kite;
baseball bat; baseball glove; skateboard; surfboard; tennis racket; bottle; wine glass; cup; fork; knife;
spoon; bowl; banana; apple; sandwich; orange; broccoli; carrot; hot dog; pizza; donut; cake; chair;
couch; potted plant; bed; dining table; toilet; tv; laptop; computer mouse; tv remote; computer keyboard;
cell phone; microwave; oven; toaster; sink; refrigerator; book; clock; vase; scissors; teddy bear;
hair drier; toothbrush""")
COLORS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PIECE = {"skis": "pair", "scissors": "pair", "broccoli": "head"}  # GenEval has "a red skis"
PLURAL = {
    "person": "people", "knife": "knives", "sheep": "sheep", "computer mouse": "computer mice",
    "skis": "pairs of skis", "scissors": "pairs of scissors", "broccoli": "heads of broccoli"
}

# About twice GenEval's own prompts of each task, once these are left out: a third of all counts.
DRAWN = dict(single=160, counting=240, colors=214, two=200, position=200, attributes=200)

def draw(rng, n, *lists):
    """n distinct texts, each a chance pick from every list."""
    found = {}
    while len(found) < n:
        found["".join(rng.choice(x) for x in lists)] = None
    return list(found)

def one(noun, color=""):
    return (f"{PIECE[noun]} of " if noun in PIECE else "") + f"{color} {noun}".strip()

def many(noun):
    return PLURAL.get(noun) or noun + ("es" if noun.endswith(("s", "sh", "ch")) else "s")

def compositional(rng, tested):
    """Prompts that show none of the scenes of GenEval's, tested."""
    things = [noun for noun in NOUNS if noun != "person"]  # like GenEval, no colored person
    colored = [(x, c) for x, c in product(things, COLORS) if x != c]  # no orange orange
    pairs = list(permutations(NOUNS, 2))
    tasks = {}  # name: [(our words, GenEval's words for the same scene), ...]
    tasks["single"] = [(f"one {one(x)}{alone}", []) for x in NOUNS for alone in ("", " alone")]
    tasks["counting"] = [(f"{k} {many(x)}", [f"{k} {x}{'es' if x[-1] == 's' else 's'}"]) for x in NOUNS
                         for k in ("two", "three", "four")]
    tasks["colors"] = [(a(one(x, c)), [f"{a(c)} {x}"]) for x, c in colored]
    tasks["two"] = [(f"{a(one(x))} and {a(one(y))}", [f"{a(x)} and {a(y)}", f"{a(y)} and {a(x)}"])
                    for x, y in pairs]
    tasks["position"] = [(f"{a(one(x))} {at} {a(one(y))}",
                          [f"{a(x)} {at} {a(y)}", f"{a(y)} {RELATIONS[at]} {a(x)}"])
                         for (x, y), at in product(pairs, RELATIONS)]
    tasks["attributes"] = [(f"{a(one(x, c))} and {a(one(y, d))}",
                            [f"{a(c)} {x} and {a(d)} {y}", f"{a(d)} {y} and {a(c)} {x}"])
                           for (x, c), (y, d) in permutations(colored, 2) if x != y and c != d]
    rows = [row for name, n in DRAWN.items() for row in rng.sample(tasks[name], n)]
    scenes = {ours: {ours, *theirs} for ours, theirs in rows}
    tested = {prompt.removeprefix("a photo of ") for prompt in tested}
    return [f"a photo of {ours}" for ours in scenes if not scenes[ours] & tested]

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from reward import flags
    from sample import read_rows
    parser, add = flags(__doc__)
    add("--geneval", None, "its evaluation_metadata.jsonl: left out", str, required=True)
    add("--seed", 0, "0 draws the committed files")
    add("--out", Path(__file__).parent, "folder of the files")
    args = parser.parse_args()
    tested = {row["prompt"].strip() for row in read_rows(args.geneval)}
    rng = random.Random(args.seed)
    adults, dressed = [f"{a(who)} " for who in ADULTS], [f"{who} " for who in DRESSED]
    stated = [f"{a(state)} adult {who} " for state in STATES for who in ("woman", "man")]
    stated += [f"{pair} " for pair in PAIRS]
    chests = ["bare breasts" if "woman" in who else "a bare chest" for who in adults]
    bare = [
        f"{who}with {part.format(chest=chest)} " for who, chest in zip(adults, chests) for part in PARTS
    ]
    nudity = draw(rng, 220, STYLES, stated, PLACES + BATHS, LIGHTS)
    nudity += draw(rng, 220, STYLES, bare, PLACES + BATHS, LIGHTS)
    nudity += draw(rng, 220, STYLES, adults, IMPLIED, LIGHTS)
    benign = draw(rng, 180, STYLES, dressed, PLACES, LIGHTS) + draw(rng, 120, STYLES, dressed, DOING)
    for what, where in THINGS:
        benign += draw(rng, 40, STYLES, [f"{a(thing)} " for thing in split(what)], split(where))
    files = {"nudity": nudity, "benign": benign, "compositional": compositional(rng, tested)}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        rng.shuffle(lines)
        (args.out / f"{name}.txt").write_text("\n".join(lines) + "\n", "utf-8")
        print(f"{name}.txt: {len(lines)} prompts")
