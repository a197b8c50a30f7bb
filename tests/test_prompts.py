"""prompts/: the committed files are what make.py writes, hold what they promise, and leave GenEval's test prompts out."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "prompts"
FILES = ("nudity", "compositional", "benign")
LEAST = {"nudity": 600, "compositional": 2000, "benign": 300}
MINORS = """child children childlike kid kids girl girls boy boys teen teens teenage teenager teenagers young younger youth youthful
youngster minor minors baby babies infant infants toddler toddlers juvenile adolescent adolescents preteen underage
school schoolgirl schoolboy student students pupil daughter son little petite lolita loli shota barely eighteen""".split()
ACTS = """sex sexual sexy sexually porn porno pornographic xxx nsfw erotic erotica orgasm intercourse masturbating masturbation
blowjob oral anal penetration fetish bondage kissing making-out aroused arousal seductive spread spreading legs bending
kneeling lying straddling touching groping hardcore stripper prostitute hooker slut whore rape""".split()
TESTED = """a photo of a bench; a photo of a skis; a photo of a fork and a knife; a photo of a broccoli and a vase; a photo of two clocks;
a photo of three persons; a photo of four benchs; a photo of two sheeps; a photo of a red zebra; a photo of a brown skis;
a photo of a dog right of a teddy bear; a photo of a donut below a cat; a photo of a red umbrella and a blue couch;
a photo of a green skis and a brown airplane""".replace("\n", " ").split("; ")  # a few of GenEval's 553, all six tasks


def read(name, folder=FOLDER):
    return (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def run(*args):
    return subprocess.run([sys.executable, str(FOLDER / "make.py"), *map(str, args)], capture_output=True, text=True)


def make(out, prompts):
    """make.py's files when GenEval's tests are `prompts`."""
    out.mkdir()
    metadata = out / "metadata.jsonl"
    metadata.write_text("".join(json.dumps({"tag": "any", "prompt": p}) + "\n" for p in prompts))
    result = run("--geneval", metadata, "--out", out)
    assert result.returncode == 0, result.stderr
    return {name: read(name, out) for name in FILES}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return make(tmp_path_factory.mktemp("prompts") / "all", ["a prompt that names no scene of ours"])


def words(prompt):
    return set(re.findall(r"[a-z0-9-]+", prompt.lower()))


def nouns():
    spec = importlib.util.spec_from_file_location("prompts_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NOUNS, module.COLORS, module.many


def task(prompt):
    """The task that a compositional prompt belongs to, None if it has none of the six forms."""
    names, colors, many = nouns()
    noun = f"(?:{'|'.join(n for n in names if n not in ('skis', 'scissors', 'broccoli'))})"
    color = f"(?:{'|'.join(colors)})"
    plain = f"(?:an? {noun}|a pair of (?:skis|scissors)|a head of broccoli)"
    colored = f"(?:an? {color} {noun}|a pair of {color} (?:skis|scissors)|a head of {color} broccoli)"
    forms = {
        "single_object": plain.replace("an?", "one").replace("|a ", "|one "),
        "two_object": f"{plain} and {plain}",
        "counting": f"(?:two|three|four) (?:{'|'.join(map(many, names))})",
        "colors": colored,
        "position": f"{plain} (?:left of|right of|above|below) {plain}",
        "color_attr": f"{colored} and {colored}",
    }
    found = [name for name, form in forms.items() if re.fullmatch(f"a photo of {form}", prompt)]
    return found[0] if len(found) == 1 else None


def test_committed_files_are_what_make_writes(everything, tmp_path):
    assert read("nudity") == everything["nudity"] and read("benign") == everything["benign"]
    # GenEval's file is not ours to ship. What it took out is the difference to a run that drops nothing; a run that is
    # told to drop just those must write the committed file again.
    gone = set(everything["compositional"]) - set(read("compositional"))
    assert 20 < len(gone) < 400
    assert make(tmp_path / "again", sorted(gone))["compositional"] == read("compositional")


@pytest.mark.parametrize("name", FILES)
def test_counts_duplicates_and_plain_text(name):
    prompts = read(name)
    assert len(prompts) >= LEAST[name] and len(set(prompts)) == len(prompts)
    for p in prompts:
        assert re.fullmatch(r"[a-z0-9][a-z0-9 ,'-]*[a-z0-9]", p) and "  " not in p and len(p.split()) <= 30, p
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", p), f"article: {p}"


def test_no_minors_and_no_acts():
    texts = [p for name in FILES for p in read(name)]
    texts += [line for f in sorted((FOLDER / "anchors").glob("*.txt")) for line in f.read_text().splitlines()]
    for text in texts:
        assert not words(text) & {*MINORS, *ACTS}, text


def test_nudity_prompts_are_of_adults_of_every_kind():
    prompts = read("nudity")
    for p in prompts:
        assert words(p) & {"adult", "adults"}, p
        assert words(p) & {"nude", "naked", "topless", "unclothed", "undressed", "without"}, p
    kinds = [
        sum(bool(re.search(kind, p)) for p in prompts)
        for kind in (
            r"\ban? [a-z -]*adult woman\b(?! and)",
            r"\ban? [a-z -]*adult man\b",
            r"\badult couple\b|\btwo \b| woman and a ",
        )
    ]
    assert min(kinds) >= 150, kinds


def test_benign_prompts_are_clothed_and_hold_people():
    prompts = read("benign")
    bare = {"nude", "naked", "topless", "unclothed", "undressed", "bare", "shirtless", "shower", "bathtub", "sauna"}
    assert not [p for p in prompts if words(p) & bare]
    assert sum(bool(words(p) & {"woman", "man", "couple", "women", "men", "adults", "nurse", "cook"}) for p in prompts) >= 150


def test_compositional_prompts_are_of_the_six_tasks():
    tasks = {p: task(p) for p in read("compositional")}
    assert None not in tasks.values(), [p for p, t in tasks.items() if t is None][:5]
    counts = {t: list(tasks.values()).count(t) for t in set(tasks.values())}
    assert len(counts) == 6 and min(counts.values()) >= 80, counts
    assert len(nouns()[0]) == len(set(nouns()[0])) == 80
    assert not [p for p in tasks if re.search(r"(red|orange|yellow|green|blue|purple|pink|brown|black|white) person", p)]
    assert not set(tasks) & set(TESTED)


def test_geneval_scenes_are_dropped_however_they_are_put(everything, tmp_path):
    def plain(p):  # our words to GenEval's
        return p.replace("a pair of ", "a ").replace("a head of ", "a ")

    ours = everything["compositional"]
    position = next(p for p in ours if task(p) == "position" and " left of " in p)
    two = next(p for p in ours if task(p) == "two_object")
    left, right = plain(position)[len("a photo of ") :].split(" left of ")
    first, second = plain(two)[len("a photo of ") :].split(" and ")
    red_skis = next(p for p in ours if task(p) == "colors" and p.endswith((" skis", " scissors", " broccoli")))
    skis = re.sub(r"a (pair|head) of (\w+)", lambda m: ("an " if m[2][0] == "o" else "a ") + m[2], red_skis)
    cases = {
        "a photo of two benches": "a photo of two benchs",
        "a photo of three people": "a photo of three persons",
        "a photo of four knives": "a photo of four knifes",
        "a photo of two sheep": "a photo of two sheeps",
        position: f"a photo of {right} right of {left}",
        two: f"a photo of {second} and {first}",
        red_skis: skis,
    }
    assert set(cases) <= set(ours)
    kept = make(tmp_path / "few", cases.values())["compositional"]
    gone = set(ours) - set(kept)
    assert set(cases) <= gone and len(gone) <= len(cases) + 2  # + 2: both orders of a pair may have been drawn


@pytest.mark.parametrize("name, safe, unsafe", [("compact", 5, 3), ("scaled", 25, 20), ("unsafe-only", 0, 3)])
def test_anchors(name, safe, unsafe):
    lines = [x for x in (FOLDER / "anchors" / f"{name}.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert all(re.fullmatch(r"[+-] [a-z][a-z ,-]*[a-z]", x) for x in lines) and len(set(lines)) == len(lines)
    assert [sum(x[0] == sign for x in lines) for sign in "+-"] == [safe, unsafe]
    assert words(next(x for x in lines if x[0] == "-")) & {"nude", "naked"}  # nudity first


@pytest.mark.parametrize(
    "text, line",
    [
        ('{"prompt": "a photo of a bench"}\nnot json\n', 2),
        ('{"tag": "colors"}\n', 1),
        ('["a photo of a bench"]\n', 1),
        ('{"prompt": 7}\n', 1),
        ("\xff\xfe\n", 1),
        ("", None),
        (None, None),
    ],
)
def test_bad_geneval_file(tmp_path, text, line):
    metadata, out = tmp_path / "metadata.jsonl", tmp_path / "out"
    out.mkdir()
    if text is not None:
        metadata.write_bytes(text.encode("latin-1"))
    result = run("--geneval", metadata, "--out", out)
    assert result.returncode == 2 and not list(out.iterdir())
    assert re.fullmatch(r"error: .*\n", result.stderr) and "metadata.jsonl" in result.stderr
    assert line is None or f"line {line}:" in result.stderr


def test_geneval_file_is_required(tmp_path):
    result = run("--out", tmp_path)
    assert result.returncode == 2 and re.fullmatch(r"error: .*--geneval.*\n", result.stderr) and not list(tmp_path.iterdir())
