"""prompts/: the files are what make.py writes, say what they may, leave GenEval's tests out."""
import json
import re

import pytest

from conftest import ROOT, start

NEVER = """child children kid kids girl girls boy boys teen teens young younger youth minor minors baby
schoolgirl student daughter little petite barely sex sexual sexy porn erotic oral
fetish bondage aroused spread legs bending kneeling lying""".replace("\n", " ").replace(" ", "|")
STATED = "nude|naked|topless|unclothed|undressed|without"
BARE = f"{STATED}|bare|nothing|bathing|shower|bathtub|nudist|bathrobe"
PARTS = "with (a )?(bare|raised|an open)"
COUNTS = {  # how many lines of a file have some words; of nudity, a third names the state
    "nudity": {"": 660, "adults?": 660, PARTS: 220, f"^(?!.*{PARTS}).*({STATED})": 227},
    "benign": {"": 420, BARE: 0}, "compositional": {"": 1107, BARE: 0, "orange orange": 0, "and": 396},
    "anchors/compact": {"": 8}, "anchors/scaled": {"": 45}, "anchors/unsafe-only": {"": 3}
}
TASKS = {"one": 160, "(two|three|four)": 160, ".* (left of|right of|above|below)": 200}  # as in GenEval
COUNTS["compositional"] |= {f"a photo of {task}": n for task, n in TASKS.items()}

def read(name, folder=ROOT / "prompts"):
    return (folder / f"{name}.txt").read_text("utf-8").splitlines()

@pytest.mark.parametrize("name", COUNTS)
def test_what_the_files_say(name):
    """Nudity of adults, and nobody bare elsewhere; no minors, no acts; a or an."""
    lines = [line for line in read(name) if line and line[0] != "#"]
    assert len(lines) == len({*lines})
    assert all(re.fullmatch("([+-] )?[a-z0-9]+((, |[ '-])[a-z0-9]+)*", line) for line in lines)
    for words, n in ({NEVER: 0, "a [aeiou].*|an [^aeiou].*": 0} | COUNTS[name]).items():
        assert sum(bool(re.search(rf"\b({words})\b", line)) for line in lines) == n, words

def test_what_make_writes(tmp_path):
    """As committed, but for what GenEval's own file takes out: a scene, however it puts it."""
    def make(*prompts):  # where GenEval's file has those
        file = tmp_path / "metadata.jsonl"
        file.write_text("\n".join(json.dumps({"prompt": f"{prompt} "}) for prompt in prompts))
        start("prompts/make.py", "--geneval", file, "--out", tmp_path)
        return tmp_path

    scenes = {
        "two benches": "two benchs", "two pairs of skis": "two skises",
        "a pair of red skis": "a red skis", "a sink left of a knife": "a knife right of a sink",
        "a vase and a bowl": "a bowl and a vase",
        "a black sandwich and a pair of orange skis": "an orange skis and a black sandwich",
        "a pair of green skis and a black bed": "a green skis and a black bed"
    }
    ours = {*read("compositional", make("none of ours"))}
    kept = {*read("compositional", make(*(f"a photo of {theirs}" for theirs in scenes.values())))}
    assert ours - kept == {f"a photo of {scene}" for scene in scenes}
    gone = ours - {*read("compositional")}
    again = make(*gone)
    assert 20 < len(gone) < 400 and all(read(name) == read(name, again) for name in [*COUNTS][:3])
