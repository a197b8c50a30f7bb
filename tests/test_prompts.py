"""prompts/: the files are what make.py writes, say what they may, leave GenEval's tests out."""
import json
import re
import runpy

import pytest

from conftest import ROOT, telling

FILES = {
    "nudity": 660, "benign": 420, "compositional": 1107, "anchors/compact": 8, "anchors/scaled": 45,
    "anchors/unsafe-only": 3
}  # and the number of lines
NEVER = """child children kid kids girl girls boy boys teen teens young younger youth minor minors baby
schoolgirl student daughter little petite barely sex sexual sexy porn erotic oral
fetish bondage aroused spread legs bending kneeling lying""".split()

STATED = "nude naked topless unclothed undressed without".split()
BARE = "bare nothing bathing shower bathtub nudist bathrobe".split()

def read(name, folder=ROOT / "prompts"):
    return (folder / f"{name}.txt").read_text("utf-8").splitlines()

def words(text):
    return set(re.findall(r"[a-z0-9-]+", text.lower()))

def row(prompt):
    return json.dumps({"prompt": prompt})

@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(line, ...) -> the folder that make.py writes, where GenEval's file has those lines."""
    def made(*lines):
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines), "latin-1")
        argv = f"make.py --geneval {tmp_path}/metadata.jsonl --out {tmp_path}"
        monkeypatch.setattr("sys.argv", argv.split())
        runpy.run_path(ROOT / "prompts/make.py", run_name="__main__")
        return tmp_path

    return made

def test_the_committed_files_are_what_make_writes(make):
    """What GenEval's own file took out is missing; told to drop just that, it writes them again."""
    gone = {*read("compositional", make(row("none of ours")))} - {*read("compositional")}
    again = make(*map(row, gone))
    assert 20 < len(gone) < 400 and all(read(name) == read(name, again) for name in [*FILES][:3])

@pytest.mark.parametrize("name", FILES)
def test_what_the_files_say(name):
    """Nudity of adults, and nobody bare elsewhere; no minors, no acts; a or an."""
    lines = [line for line in read(name) if line and line[0] != "#"]
    assert len(lines) == len({*lines}) == FILES[name]
    assert not words(" ".join(lines)) & {*NEVER}
    for line in lines:
        assert re.fullmatch(r"([+-] )?[a-z0-9][a-z0-9 ,'-]*[a-z0-9]", line), line
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", line), line
        assert name not in ("benign", "compositional") or not words(line) & {*STATED, *BARE}, line
        assert name != "nudity" or words(line) & {"adult", "adults"}, line

def test_shares_of_kinds_and_tasks():
    """A third of nudity names the state, a third bare parts; tasks come as often as in GenEval."""
    lines = read("nudity")
    bare = {line for line in lines if re.search(" with (a )?(bare|raised|an open)", line)}
    stated = {line for line in lines if words(line) & {*STATED}} - bare
    assert len(bare) == 220 and 220 <= len(stated) < 230  # the rest implies it
    lines = [line.removeprefix("a photo of ") for line in read("compositional")]
    assert sum(line.startswith("one ") for line in lines) == 160
    assert sum(line.startswith(("two ", "three ", "four ")) for line in lines) == 160
    assert sum(bool(re.search(" left of | right of | above | below ", line)) for line in lines) == 200
    assert sum(" and " in line for line in lines) == 396 and "an orange orange" not in lines

def test_a_scene_of_geneval_is_dropped_however_it_is_put(make):
    """Its plurals, the other order, the mirrored position, its words for a pair."""
    cases = {
        "two benches": "two benchs", "two pairs of skis": "two skises",
        "a pair of red skis": "a red skis", "a sink left of a knife": "a knife right of a sink",
        "a vase and a bowl": "a bowl and a vase",
        "a black sandwich and a pair of orange skis": "an orange skis and a black sandwich"
    }
    ours = read("compositional", make(row("none of ours")))
    kept = read("compositional", make(*(row(f"a photo of {theirs}") for theirs in cases.values())))
    assert {*ours} - {*kept} == {f"a photo of {scene}" for scene in cases}

def test_a_file_that_is_not_genevals_is_told(make, tmp_path, capsys):
    with telling(capsys, "metadata.jsonl"):
        make('{"text": "a photo of one bench"}')
    assert [file.name for file in tmp_path.iterdir()] == ["metadata.jsonl"]
