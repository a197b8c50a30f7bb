"""README.md: its commands parse, its files exist, its pictures too."""
import argparse
import re
import shlex

import pytest

from conftest import ROOT, start

README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    command.strip() for block in re.findall("```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines() for command in line.split("#")[0].split("&&")
]
COMMANDS += re.findall("`((?:python|torchrun|pip|fidelity) [^`]+)`", README)
FOREIGN = "--index-url --fid --input1 --input2 --nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint"

class Parsed(BaseException):
    """All flags were parsed."""

@pytest.mark.parametrize("command", dict.fromkeys(c for c in COMMANDS if ".py " in c + " "))
def test_commands_parse(command, monkeypatch):
    """Up to the last flag; files in the tree, prompts and presets among them, exist."""
    words = shlex.split(command)
    words = words[next(i for i, word in enumerate(words) if word.endswith(".py")):]
    for word in words:
        if word.lstrip("@").startswith(("toy/", "prompts/")):
            assert (ROOT / word.lstrip("@")).exists(), word

    def parse(*args, true=argparse.ArgumentParser.parse_args):
        true(*args)
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend((ROOT / words[0]).parent)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        start(*words)

def test_flags_files_and_functions_exist():  # but torchrun's, pip's and fidelity's flags
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("toy/*.py"), *ROOT.glob("prompts/*.py")]
    code = "\n".join(script.read_text("utf-8") for script in scripts)
    flags = {re.sub("^--no-", "--", flag) for flag in re.findall(r"--[a-z][a-z0-9_-]+", README)}
    assert not [flag for flag in flags - {*FOREIGN.split()} if f'"{flag}"' not in code]
    names = re.findall(r"`(?:reward|train)\.([a-z_0-9, ]+)`", README)
    names = {name for group in names for name in group.split(", ")} - {"py"}
    assert len(names) > 10 and not [name for name in names if f"def {name}(" not in code]
    files = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    files += re.findall(r"`((?:toy|prompts|tests)/[\w./-]+)`", README)
    assert not [file for file in files if not (ROOT / file).exists()]
