"""sample.py: files of prompts, models, and images against diffusers called by hand."""
import json
import os
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import script, start, telling
from sample import read_rows
from test_reward import DAMAGE, change

TEXT = "a circle\na pink square\n"

@pytest.fixture
def sd(tiny, tmp_path):
    """A copy of the tiny pipeline to change."""
    return shutil.copytree(tiny / "sd", tmp_path / "sd")

@pytest.fixture
def sample(sd, tmp_path):
    """sample(flags, text of the prompts, ...) -> the folder of images, drawn in this process."""
    def draw(flags="", text=TEXT, file="p.txt", out="images"):
        (tmp_path / file).write_text(text)
        argv = f"--model {sd} --prompts {tmp_path / file} --out {tmp_path / out} --steps 2 --guidance 2"
        start("sample.py", *argv.split(), *flags.split())
        return tmp_path / out

    return draw

def same(file, model, prompt="a pink square", seed=1, guidance=2, name="DDIM", lora=None, **size):
    """Whether a picture is what the plain pipeline draws, but for a rounding of its bytes."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    scheduler = getattr(diffusers, f"{name}Scheduler")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if lora:
        pipe.load_lora_weights(lora)
    noise = torch.Generator().manual_seed(seed)
    images = pipe(prompt, num_inference_steps=2, guidance_scale=guidance, generator=noise, **size).images
    return np.abs(np.asarray(images[0], int) - np.asarray(Image.open(file), int)).max() <= 1

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

@pytest.mark.parametrize("name, text, rows", [
    ("a.txt", '\ufeffa circle\r\n\r\n  "é", \u2028b \n', [("0", "a circle"), ("1", '"é", \u2028b')]),
    ("UP.CSV", '\ufeffcase_number,prompt\n7,"a, ""b""\nc"\n9,\n', [("7", 'a, "b"\nc'), ("9", "")]),
    ("a.csv", "prompt,adv\nx,a\ny,b\n", [("0", "a"), ("1", "b")]),
    ("a.Jsonl", '{"adv": "a\u2028b\x85c", "case_number": 12}\n\n', [("12", "a\u2028b\x85c")]),
])
def test_rows_of_the_three_kinds_of_file(name, text, rows, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    found = read_rows(str(tmp_path / name), "adv" if "adv" in text else "prompt")
    assert [(row["case_number"], row["prompt"]) for row in found] == rows

BAD = [("txt", " \n\t\n"), ("txt", "\xff"), ("tsv", "prompt\na"), ("", "a")]
BAD += [("csv", f"case_number,prompt\n{case},a") for case in ("../x", "0,a\n0", "", ".x", 201 * "a")]
BAD += [("csv", x) for x in ("", "prompt\n", "text\na", "prompt,x\n ,1", "seed,prompt\n1", 'prompt\n"a')]
for text in 'prompt": "\\u00a0"}', 'prompt": "a"', 'prompt": 7}', 'prompt": "\\ud800"}', 'x": "a"}':
    BAD.append(("jsonl", '{"' + text))

@pytest.mark.parametrize("kind, text", BAD)
def test_bad_files_of_prompts_are_told(kind, text, tmp_path, capsys):
    (tmp_path / f"a.{kind}").write_text(text, "latin-1")
    for name in f"a.{kind}", f"missing.{kind}":
        with telling(capsys, tmp_path / name):
            read_rows(str(tmp_path / name))

def test_images_are_those_of_a_plain_call_for_any_batch_and_ranks(sample, sd, tmp_path, monkeypatch):
    for batch in 1, 3:
        out = sample(f"--per-prompt 2 --seed 5 --batch {batch}", out=f"images-{batch}")
        assert {*contents(out)} == {"settings.json", "0_0.png", "0_1.png", "1_0.png", "1_1.png"}
        assert same(out / "0_1.png", sd, "a circle", 6) and same(out / "1_0.png", sd, seed=7)
    flags = f"--model {sd} --prompts {tmp_path}/p.txt --out {tmp_path}/ranks --steps 2 --guidance 2"
    done = script("sample.py", *flags.split(), *"--per-prompt 2 --seed 5 --batch 3".split(), ranks=2)
    assert done.returncode == 0 and contents(tmp_path / "ranks") == contents(out), done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert {*contents(sample("--batch 1", out="rank-0"))} == {"settings.json", "0_0.png"}

@pytest.mark.parametrize("names", ["sd_seed,sd_guidance_scale", "evaluation_seed,evaluation_guidance"])
def test_a_rows_own_columns_come_before_the_flags(names, sample, sd):
    """Big integers to the last digit; an empty cell is the flag's, an empty prompt is drawn."""
    rows = "12,a circle,4294967295,5.5,16,8", "x-3,,9007199254740993,,16,8", "14,a square,,2,,"
    head = f"case_number,prompt,{names},sd_image_width,sd_image_height"
    out = sample("--seed 40", "\n".join([head, *rows]), "p.csv")
    assert same(out / "12_0.png", sd, "a circle", 4294967295, 5.5, width=16, height=8)
    assert same(out / "x-3_0.png", sd, "", 9007199254740993, width=16, height=8)
    assert same(out / "14_0.png", sd, "a square", 42)
    half = sample("--precision bf16 --seed 40", "\n".join([head, *rows]), "p.csv", "half") / "14_0.png"
    a, b = (np.asarray(Image.open(file), int) for file in (out / "14_0.png", half))
    assert 0 < np.abs(a - b).max() < 40

@pytest.mark.parametrize("saved, name", [("DDIM", "DDIM"), ("EulerDiscrete", "DDIM"),
                                         ("DDIM", "LMSDiscrete"), ("DDIM", "EulerAncestralDiscrete")])
def test_any_scheduler_and_x0_is_never_clipped(saved, name, sample, sd):
    """To clip is DDIM's default where another scheduler was saved, whose config does not speak of it."""
    file, index = sd / "scheduler/scheduler_config.json", sd / "model_index.json"
    config = json.loads(file.read_text()) | {"_class_name": f"{saved}Scheduler"}
    del config["clip_sample"]
    file.write_text(json.dumps(config))
    index.write_text(index.read_text().replace("DDIM", saved))
    assert same(sample(f"--scheduler {name}Scheduler") / "1_0.png", sd, name=name)

@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_models_load_strictly(part, damage, sample, sd, tmp_path, capsys):
    change(sd / part, damage)
    with telling(capsys, f"--model {sd}: its weights do not fit"):
        sample()
    assert not (tmp_path / "images").exists()

def test_images_that_are_not_finite_are_told(sample, sd, tmp_path, capsys):
    """They would be black, and count as safe. Where no image was made, other flags may follow."""
    change(sd / "unet", lambda state: state | {"conv_out.weight": state["conv_out.weight"] + 1e38})
    for flags in "", "--seed 1":
        with telling(capsys, "not finite"):
            sample(flags)
        assert not [*tmp_path.glob("images/*.png")]
        (tmp_path / "images/.settings.json.7").touch()  # of a kill

def test_the_hubs_old_names_still_load(sample, sd, tiny):
    """SD v1.4's VAE says query for to_q, and its text encoder has position_ids."""
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, old in names.items():
        change(sd / "vae", lambda state: {k.replace(new, old): state[k] for k in state})
    ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    change(sd / "text_encoder", lambda state: {f"text_model.{k}": state[k] for k in state} | ids)
    assert same(sample() / "1_0.png", tiny / "sd")

@pytest.fixture
def lora(run):
    """Adapters that train.py saved: one update, of size lr."""
    return run("lora", lora=2, lr=0.5, updates=1, epochs=1) / "checkpoint-1"

def test_adapters_are_those_that_diffusers_loads(sample, lora, sd):
    file = sample(f"--lora {lora}") / "1_0.png"
    assert same(file, sd, lora=lora) and not same(file, sd)

@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_adapters_that_do_not_fit_are_told(damage, sample, lora, tmp_path, capsys):
    change(lora, damage)
    with telling(capsys, f"--lora {lora}"):
        sample(f"--lora {lora}")
    assert not (tmp_path / "images").exists()

def test_a_rerun_makes_what_is_missing_and_a_kill_leaves_no_half(sample, monkeypatch):
    out = sample("--batch 2", TEXT + "a square\n")
    before = contents(out)
    (out / "1_0.png").unlink()
    os.utime(out / "2_0.png", (1, 1))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Image.Image, "save", lambda image, file: file.write_bytes(b"half") / 0)
        sample("--batch 2", TEXT + "a square\n")
    assert before.items() - contents(out).items() == {("1_0.png", before["1_0.png"])}
    for batch in 2, 1:
        assert contents(sample(f"--batch {batch}", TEXT + "a square\n")) == before
    assert (out / "2_0.png").stat().st_mtime == 1

@pytest.mark.parametrize("flag", ["--seed 1", "--eta 1", "--scheduler DDPMScheduler", "another prompt"])
def test_a_folder_made_otherwise_is_told_and_left_alone(flag, sample, tmp_path, capsys):
    before = contents(sample())
    with telling(capsys, f"--out {tmp_path / 'images'}"):
        sample(flag if "--" in flag else "", TEXT if "--" in flag else flag)
    assert contents(tmp_path / "images") == before
    (tmp_path / "images/settings.json").unlink()
    with telling(capsys, f"--out {tmp_path / 'images'}"):
        sample()

ARGS = """--steps 1000, --per-prompt 0, --seed 1.5, --guidance nan, --guidance 1e18, --eta inf, --eta 1.5
--model typo, --lora typo, --out p.txt, --out p.txt/x, --scheduler FlowMatchEulerDiscreteScheduler"""

@pytest.mark.parametrize("flag", re.split(", |\n", ARGS))
def test_bad_flags_are_told(flag, sample, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with telling(capsys, flag.split()[0]):
        sample(flag)
    assert not (tmp_path / "images").exists()

@pytest.mark.parametrize(
    "row",
    ["seed 12.7", "seed -1", f"seed {2**62}", "guidance_scale nan", "image_width 12", "image_height -8"])
def test_bad_rows_are_told(row, sample, tmp_path, capsys):
    with telling(capsys, "p.csv, case 0"):
        sample("", "sd_{},prompt\n{},a".format(*row.split()), "p.csv")
    assert not (tmp_path / "images").exists()
