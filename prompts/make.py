"""Writes the training prompts, one per line: nudity.txt, compositional.txt, benign.txt. Seconds, no GPU.

    git clone https://github.com/djghosh13/geneval
    python prompts/make.py --geneval geneval/prompts/evaluation_metadata.jsonl

- nudity: what the model must unlearn. Unclothed adult women, men and couples; no acts, no real people.
- benign: what the model must keep. Dressed people in the same places and styles, people at work, things, animals.
- compositional: GenEval's six tasks over its 80 nouns. A scene among GenEval's 553 test prompts is dropped however it
  is put: GenEval's grammar ("two benchs"), the other order, the mirrored position. GenEval tests every single object,
  so there only the wording can differ: "a photo of one bench". --geneval is required, because without that file test
  prompts would slip into training and no one would notice.
"""
import argparse
import json
import random
import sys
from itertools import permutations, product
from pathlib import Path


def a(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def split(text):
    return text.replace("\n", " ").split("; ")


STYLES = [""] * 6 + [f"{a(s)} of " for s in split("""photo; photo; photo; black and white photo; studio photo; film still;
magazine photo; oil painting; watercolor; pencil sketch; charcoal drawing; ink drawing; fresco; digital painting; 3d render""")]
LIGHTS = [""] * 4 + [", " + x for x in split("""soft light; morning light; bright daylight; warm evening light; dim light;
light from the side; soft shadows; high contrast; muted colors; warm colors""")]
PLACES = split("""standing in a garden; standing on a beach; standing in a forest; standing by a window; standing in a kitchen;
standing on a balcony; standing in a doorway; standing in a museum; standing in front of a mirror; standing in a wheat field;
standing under a tree; standing on a rooftop; standing in an empty room; standing in a bedroom; standing on a stage;
standing beside a car; standing in the snow; standing near a waterfall; sitting on a bench; sitting on a sofa;
sitting on the floor; sitting on a rock by the sea; sitting at a table; sitting by a fireplace; sitting on stone steps;
sitting in the grass; sitting in an artist's studio; walking along a river; walking through a street; walking on a beach;
walking through a park; walking down a hallway; walking across a bridge; walking through a meadow""")
BATHS = split("standing in a shower; sitting in a bathtub; standing in a lake; sitting in a sauna; sitting by a pool")
BARE = split("nude; naked; topless; unclothed; undressed; fully nude; nude middle-aged; naked older")
PAIRS = split("""a nude adult couple; a naked adult couple; an unclothed adult couple; two adults without clothes;
two nude adult women; two naked adult men; a nude adult woman and a nude adult man; a naked older adult couple""")
DRESSED = split("""an adult woman in a long dress; an adult man in a grey suit; an adult couple in winter coats;
two adults in raincoats; two adult women in sweaters; two adult men in work clothes; a woman in a red coat;
a man in a blue shirt and jeans; an older woman in a wool cardigan; an older man in a tweed jacket; a nurse in scrubs;
a couple in evening wear; a woman in a business suit; two friends in hiking clothes; a cook in a white apron""")
DOING = split("""reading a newspaper in a cafe; cooking soup in a kitchen; waiting at a bus stop; repairing a bicycle;
watering plants; playing chess in a park; carrying groceries; walking a dog; working at a desk; painting a fence;
looking at a map; drinking tea; feeding pigeons; washing dishes; planting a tree; riding a tram; hanging a picture""")
THINGS = [  # what; where: all of a row's pairs make sense
    ("bowl of fruit; cup of coffee; vase of tulips; loaf of bread; old radio; brass lamp", "on a table; on a shelf; at a window"),
    ("lighthouse; village; stone bridge; lake; forest; harbor; desert road", "at sunrise; at night; on a rainy day; in autumn"),
    ("dog; cat; horse; owl; duck; rabbit; fox; elephant", "in the grass; beside a river; on a path; under a tree; in the rain")]
NOUNS = split("""person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light; fire hydrant; stop sign;
parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra; giraffe; backpack; umbrella; handbag; tie;
suitcase; frisbee; skis; snowboard; sports ball; kite; baseball bat; baseball glove; skateboard; surfboard; tennis racket;
bottle; wine glass; cup; fork; knife; spoon; bowl; banana; apple; sandwich; orange; broccoli; carrot; hot dog; pizza; donut;
cake; chair; couch; potted plant; bed; dining table; toilet; tv; laptop; computer mouse; tv remote; computer keyboard;
cell phone; microwave; oven; toaster; sink; refrigerator; book; clock; vase; scissors; teddy bear; hair drier; toothbrush""")
COLORS = "red orange yellow green blue purple pink brown black white".split()
MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PIECE = {"skis": "pair", "scissors": "pair", "broccoli": "head"}  # "a pair of red skis", where GenEval has "a red skis"
PLURAL = {"person": "people", "knife": "knives", "sheep": "sheep", "computer mouse": "computer mice",
          "skis": "pairs of skis", "scissors": "pairs of scissors", "broccoli": "heads of broccoli"}


def draw(rng, n, *lists):
    found = {}  # n distinct texts, each a chance pick from every list; a dict keeps the order
    while len(found) < n:
        found["".join(rng.choice(x) for x in lists)] = None
    return list(found)


def one(noun, color=""):
    return (f"{PIECE[noun]} of " if noun in PIECE else "") + f"{color} {noun}".strip()


def many(noun):
    return PLURAL.get(noun) or noun + ("es" if noun.endswith(("s", "sh", "ch")) else "s")


def compositional(rng, tested):
    things = [n for n in NOUNS if n != "person"]  # like GenEval, no colored person
    rows = [(f"one {one(n)}", []) for n in NOUNS]  # (our words, GenEval's words for the same scene)
    rows += [(f"{k} {many(n)}", [f"{k} {n}{'es' if n[-1] == 's' else 's'}"]) for n in NOUNS for k in ("two", "three", "four")]
    rows += [(a(one(x, c)), [f"{a(c)} {x}"]) for x, c in rng.sample(list(product(things, COLORS)), 450)]
    for x, y in rng.sample(list(permutations(NOUNS, 2)), 450):
        rows.append((f"{a(one(x))} and {a(one(y))}", [f"{a(x)} and {a(y)}", f"{a(y)} and {a(x)}"]))
    for (x, y), at in rng.sample(list(product(permutations(NOUNS, 2), MIRROR)), 500):
        rows.append((f"{a(one(x))} {at} {a(one(y))}", [f"{a(x)} {at} {a(y)}", f"{a(y)} {MIRROR[at]} {a(x)}"]))
    for (x, y), (c, d) in rng.sample(list(product(permutations(things, 2), permutations(COLORS, 2))), 500):
        rows.append((f"{a(one(x, c))} and {a(one(y, d))}", [f"{a(c)} {x} and {a(d)} {y}", f"{a(d)} {y} and {a(c)} {x}"]))
    return [f"a photo of {ours}" for ours, theirs in rows if not {f"a photo of {t}" for t in [ours, *theirs]} & tested]


def read_geneval(path):
    if not path:
        raise ValueError("--geneval FILE is required: evaluation_metadata.jsonl from GenEval's repository")
    tested = set()
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            tested |= {json.loads(line)["prompt"].strip()} if line.strip() else set()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{path}, line {number}: not a JSON object with a text "prompt"') from None
    if not tested:
        raise ValueError(f"{path}: no prompts in it")
    return tested


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geneval", metavar="FILE", help="GenEval's evaluation_metadata.jsonl: left out (required)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other prompts (default 0: the committed files)")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder to write to (default: beside this script)")
    args = parser.parse_args()
    try:
        tested, rng = read_geneval(args.geneval), random.Random(args.seed)
        people = [[f"{a(x)} adult {who} " for x in BARE] for who in ("woman", "man")] + [[x + " " for x in PAIRS]]
        dressed, look = [x + " " for x in DRESSED], STYLES + ["a marble statue of ", "a bronze statue of "]
        nudity = sum((draw(rng, 220, look, who, PLACES + BATHS, LIGHTS) for who in people), [])
        benign = draw(rng, 180, look, dressed, PLACES, LIGHTS) + draw(rng, 120, STYLES, dressed, DOING)
        benign += sum((draw(rng, 40, STYLES, [a(x) + " " for x in split(what)], split(where)) for what, where in THINGS), [])
        for name, lines in ("nudity", nudity), ("benign", benign), ("compositional", compositional(rng, tested)):
            random.Random(args.seed).shuffle(lines)
            Path(args.out, f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{name}.txt: {len(lines)} prompts")
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
