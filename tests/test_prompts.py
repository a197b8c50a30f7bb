"""prompts/: the committed files are what make.py writes, hold what they promise, and leave GenEval's tests out."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prompts.make import NOUNS

FOLDER = Path(__file__).parents[1] / "prompts"
FILES = {"nudity": 600, "compositional": 2000, "benign": 300}  # and the least number of prompts
NEVER = set(
    """child children kid kids girl girls boy boys teen teens teenager young younger youth minor minors baby
school schoolgirl student little petite sex sexual sexy porn erotic intercourse oral fetish bondage kissing aroused
spread legs bending kneeling lying hardcore""".split())

def read(name, folder=FOLDER):
    return (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()

def words(prompt):
    return set(re.findall(r"[a-z0-9-]+", prompt.lower()))

def make(out, text):
    """make.py's run when GenEval's metadata file is `text`."""
    out.mkdir()
    (out / "metadata.jsonl").write_text(text)
    command = [sys.executable, FOLDER / "make.py", "--geneval", out / "metadata.jsonl", "--out", out]
    return subprocess.run(command, capture_output=True, text=True)

def test_committed_files_are_what_make_writes(tmp_path):
    """GenEval's file is not ours to ship: what it took out is the difference to a run that drops nothing, and a
    run that is told to drop just those writes the committed file again."""
    tested = [json.dumps({"prompt": "a prompt that names no scene of ours"})]
    assert make(tmp_path / "all", tested[0]).returncode == 0
    gone = set(read("compositional", tmp_path / "all")) - set(read("compositional"))
    assert 20 < len(gone) < 400
    make(tmp_path / "again", "\n".join(json.dumps({"prompt": prompt}) for prompt in sorted(gone)))
    for name in FILES:
        assert read(name) == read(name, tmp_path / "again")

def test_what_the_prompts_say():
    for name, least in FILES.items():
        prompts = read(name)
        assert len(set(prompts)) == len(prompts) >= least
        for prompt in prompts:
            assert re.fullmatch(r"[a-z0-9][a-z0-9 ,'-]*[a-z0-9]",
                                prompt) and not words(prompt) & NEVER, prompt
    bare = {"nude", "naked", "topless", "unclothed", "undressed", "without"}
    assert all(words(p) & bare and words(p) & {"adult", "adults"} for p in read("nudity"))
    assert not any(words(p) & bare for p in read("benign"))

@pytest.mark.parametrize("ours, theirs", [("a photo of two benches", "a photo of two benchs"),
                                          ("a photo of three people", "a photo of three persons"),
                                          ("a photo of two sheep", "a photo of two sheeps")])
def test_geneval_scenes_are_dropped_however_they_are_put(ours, theirs, tmp_path):
    make(tmp_path / "all", '{"prompt": "none of ours"}')
    make(tmp_path / "few", json.dumps({"prompt": theirs}))
    assert set(read("compositional", tmp_path / "all")) - set(read("compositional",
                                                                   tmp_path / "few")) == {ours}
    assert len(set(NOUNS)) == 80

@pytest.mark.parametrize("name, safe, unsafe", [("compact", 5, 3), ("scaled", 25, 20),
                                                ("unsafe-only", 0, 3)])
def test_anchors(name, safe, unsafe):
    lines = [
        x for x in (FOLDER / "anchors" / f"{name}.txt").read_text().splitlines() if x and x[0] != "#"
    ]
    assert [sum(x[0] == sign for x in lines) for sign in "+-"] == [safe, unsafe]
    assert not any(words(line) & NEVER for line in lines)

@pytest.mark.parametrize("text",
                         ["not json\n", '{"tag": "colors"}\n', '["a bench"]\n', '{"prompt": 7}\n', ""])
def test_a_bad_geneval_file_is_told(text, tmp_path):
    done = make(tmp_path / "out", text)
    assert done.returncode == 2 and re.fullmatch(r"error: .*metadata.jsonl.*\n", done.stderr)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["metadata.jsonl"]
