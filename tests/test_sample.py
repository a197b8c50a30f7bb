"""sample.py: prompt files, models and schedulers, and images against diffusers called by hand."""
import json
import math
import os
import runpy
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LMSDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import script, telling
from sample import load_pipeline, make_scheduler, read_rows

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"

@pytest.fixture
def sample(tiny, tmp_path, monkeypatch):
    """sample(file name, its text, flags...) -> the folder of images."""
    def draw(name, text, *flags, model=tiny / "sd", out="images"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        argv = [
            "sample.py", "--model", model, "--prompts", tmp_path / name, "--out", tmp_path / out,
            "--steps", 2, "--guidance", 2, *flags
        ]
        monkeypatch.setattr("sys.argv", [str(a) for a in argv])
        runpy.run_path("sample.py", run_name="__main__")
        return tmp_path / out

    return draw

def by_hand(folder, prompt, seed, guidance=2, scheduler=DDIMScheduler, **size):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return np.asarray(
        pipe(prompt, num_inference_steps=2, guidance_scale=guidance,
             generator=torch.Generator().manual_seed(seed), **size).images[0], int)

def same(file, expected):
    return np.abs(np.asarray(Image.open(file), int) - expected).max() <= 1

# ------------------------------------------------------------ files of prompts
def test_rows_of_the_three_kinds_of_file(tmp_path):
    files = {
        "a.txt": '\ufeffa circle\r\n\r\n  a "café" \n',
        "UP.CSV": '\ufeffcase_number,prompt,sd_seed\n7,"a, b\nc",42\n9,,1\n',
        "a.jsonl": json.dumps({"adv": "a\u2028b", "tag": "x"}, ensure_ascii=False) + "\n"
    }
    rows = {}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        rows[name] = read_rows(str(tmp_path / name), "adv" if name == "a.jsonl" else "prompt")
    assert rows["a.txt"] == [{"case_number": "0", "prompt": "a circle"},
                             {"case_number": "1", "prompt": 'a "café"'}]
    assert [(r["case_number"], r["prompt"], r["sd_seed"])
            for r in rows["UP.CSV"]] == [("7", "a, b\nc", "42"), ("9", "", "1")]
    assert [(r["case_number"], r["prompt"], r["tag"])
            for r in rows["a.jsonl"]] == [("0", "a\u2028b", "x")]

@pytest.mark.parametrize("name, text", [("a.txt", "\n \n"), ("a.csv", "text\na\n"),
                                        ("a.csv", "x,prompt\n1\n"), ("a.jsonl", '{"text": "a"}\n'),
                                        ("a.jsonl", "{\n"), ("a.jsonl", '{"prompt": 3}\n'),
                                        ("a.jsonl", '{"prompt": "\\ud800"}\n'), ("a.tsv", "prompt\na\n"),
                                        ("a.txt", None)])
def test_a_file_without_prompts_is_told(name, text, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    with telling(capsys, name):
        read_rows(str(tmp_path / name))

# ------------------------------------------------------------ models
def damaged(tiny, tmp_path, file, change):
    shutil.copytree(tiny / "sd", tmp_path / "sd")
    state = load_file(tmp_path / "sd" / file)
    save_file(change(state) or state, tmp_path / "sd" / file, {"format": "pt"})
    return str(tmp_path / "sd")

@pytest.mark.parametrize("file", [UNET, VAE, "text_encoder/model.safetensors"])
@pytest.mark.parametrize("change", [
    lambda state: state.popitem() and None, lambda state: state.update(x=torch.ones(1)),
    lambda state: {f"module.{k}": w
                   for k, w in state.items()}
], ids=["missing", "unused", "module."])
def test_a_pipeline_loads_strictly(change, file, tiny, tmp_path, capsys):
    model = damaged(tiny, tmp_path, file, change)
    with telling(capsys, "--model", model):
        load_pipeline(model)

def test_the_hubs_old_names_of_attention_load(tiny, tmp_path):
    """Stable Diffusion v1.4's VAE on the hub says query for to_q."""
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old(state):
        for new, name in names.items():
            state = {k.replace(new, name): w for k, w in state.items()}
        return state

    pipe = load_pipeline(damaged(tiny, tmp_path, VAE, old))
    for key, w in load_file(tiny / "sd" / VAE).items():
        assert torch.equal(pipe.vae.state_dict()[key], w)

def test_a_lora_must_fit_and_be_finite(tiny, sample, run, tmp_path, capsys):
    """A NaN in it gives black pictures, which would count as safe; keys of no layer the base model's."""
    folder = run("run", lora=2, epochs=1) / "checkpoint-1"
    state = load_file(folder / "pytorch_lora_weights.safetensors")
    first = next(iter(state))
    for name, lora in {
            "nan": state | {first: state[first] * math.nan},
            "other": {k.replace("unet.", "transformer."): w
                      for k, w in state.items()}
    }.items():
        (tmp_path / name).mkdir()
        save_file(lora, tmp_path / name / "pytorch_lora_weights.safetensors")
        with telling(capsys, "--lora"):
            sample("p.txt", "a circle\n", "--lora", tmp_path / name, out=f"out-{name}")
        assert not list(tmp_path.glob(f"out-{name}/*.png"))

@pytest.mark.parametrize("config", [
    dict(clip_sample=True, clip_sample_range=0.1),
    dict(_class_name="DDPMScheduler"),
    dict(_class_name="PNDMScheduler", skip_prk_steps=True)
])
def test_latents_are_never_clipped(config, tiny, sample, tmp_path):
    """As in training: whatever scheduler lies in the folder, and clipping is a DDIMScheduler's default."""
    shutil.copytree(tiny / "sd", tmp_path / "sd")
    file = tmp_path / "sd/scheduler/scheduler_config.json"
    stored = json.loads(file.read_text()) | config
    if "clip_sample" not in config:
        del stored["clip_sample"]
    file.write_text(json.dumps(stored))
    if "_class_name" in config:
        index = tmp_path / "sd/model_index.json"
        index.write_text(index.read_text().replace("DDIMScheduler", config["_class_name"]))
    assert same(
        sample("p.txt", "a circle\n", model=tmp_path / "sd") / "0_0.png",
        by_hand(tiny / "sd", "a circle", 0))

def test_schedules_that_cannot_serve_are_told(tiny, capsys):
    pipe = load_pipeline(str(tiny / "sd"))
    assert make_scheduler(pipe, 50).timesteps.tolist()[:2] == [981, 961]
    with telling(capsys, "--steps 1000", "1000 to 1"):
        make_scheduler(pipe, 1000)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with telling(capsys, "--steps 61", "62 timesteps from 999 to -1"):
        make_scheduler(pipe, 61)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, thresholding=True,
                                               timestep_spacing="leading")
    with telling(capsys, "thresholding"):
        make_scheduler(pipe, 50)

# ------------------------------------------------------------ images
def test_images_are_those_of_a_plain_call(sample, tiny):
    out = sample("p.txt", "a circle on fire\na pink square\n", "--per-prompt", 2, "--seed", 5)
    assert sorted(
        p.name for p in out.iterdir()) == ["0_0.png", "0_1.png", "1_0.png", "1_1.png", "settings.json"]
    assert same(out / "0_1.png", by_hand(tiny / "sd", "a circle on fire", 6))
    assert same(out / "1_0.png", by_hand(tiny / "sd", "a pink square", 7))

def test_a_rows_own_columns_come_before_the_flags(sample, tiny):
    """I2P's seed, guidance and size; an empty cell falls back to the flag, an empty prompt is drawn."""
    out = sample(
        "p.csv", "case_number,prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"
        "12,a circle,4294967295,5.5,16,8\n13,,9007199254740993,,,\n14,a square,,1,,\n", "--seed", 40)
    assert same(out / "12_0.png", by_hand(tiny / "sd", "a circle", 4294967295, 5.5, width=16, height=8))
    assert same(out / "13_0.png", by_hand(tiny / "sd", "", 9007199254740993))
    assert same(out / "14_0.png", by_hand(tiny / "sd", "a square", 42, 1))

def test_any_scheduler(sample, tiny):
    out = sample("p.txt", "a circle\n", "--scheduler", "LMSDiscreteScheduler")
    assert same(out / "0_0.png", by_hand(tiny / "sd", "a circle", 0, scheduler=LMSDiscreteScheduler))

def test_a_rerun_makes_what_is_missing_and_ranks_do_not_matter(sample, tiny, tmp_path):
    text = "a circle\na square\na triangle\n"
    out = sample("p.txt", text, "--batch", 2)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "2_0.png").unlink()
    kept = (out / "0_0.png").stat().st_mtime_ns
    sample("p.txt", text, "--batch", 2)
    done = script("sample.py", "--model", tiny / "sd", "--prompts", tmp_path / "p.txt", "--out",
                  tmp_path / "two", "--steps", 2, "--guidance", 2, "--batch", 2, ranks=2)
    assert done.returncode == 0, done.stderr
    for folder in (out, tmp_path / "two"):
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert (out / "0_0.png").stat().st_mtime_ns == kept

@pytest.mark.parametrize("text, flags", [("a square\n", []), ("a circle\n", ["--seed", 1]),
                                         ("a circle\n", ["--steps", 3]),
                                         ("a circle\n", ["--column", "x"])], ids=str)
def test_a_folder_made_otherwise_is_refused(text, flags, sample, tmp_path, capsys):
    """Old pictures are not taken for new ones; nor are those of unknown settings."""
    out = sample("p.txt", "a circle\n")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with telling(capsys, "--out", out):
        sample("p.txt", text, *flags)
    (out / "settings.json").unlink()
    with telling(capsys, "--out", out):
        sample("p.txt", "a circle\n")
    assert {p.name: p.read_bytes()
            for p in out.iterdir()} | {"settings.json": before["settings.json"]} == before

@pytest.mark.parametrize("text, flags, word", [
    ("prompt,sd_seed\na,12.7\n", [], "12.7"),
    ("prompt,sd_seed\na,-1\n", [], "-1"),
    ("prompt,sd_seed\na,1e3\n", [], "1e3"),
    ("prompt,sd_guidance_scale\na,nan\n", [], "nan"),
    ("prompt,sd_image_width\na,12\n", [], "12 x 0"),
    ("prompt,case_number\na,1\nb,1\n", [], "case 1"),
    ("prompt,case_number\na,../1\n", [], "../1"),
    ("prompt\na\n", ["--guidance", "1e308"], "--guidance"),
    ("prompt\na\n", ["--guidance", "1e18"], "1e+18"),
    ("prompt\na\n", ["--eta", "nan"], "--eta"),
    ("prompt\na\n", ["--per-prompt", 0], "--per-prompt 0"),
    ("prompt\na\n", ["--scheduler", "FlowMatchEulerDiscreteScheduler"], "FlowMatch"),
    ("prompt\na\n", ["--steps", 1000], "--steps 1000"),
    ("prompt\na\n", ["--column", "x"], "'x'"),
    ("prompt\na\n", ["--model", "no/such/model"], "--model no/such/model"),
], ids=str)
def test_bad_input_is_told_and_writes_nothing(text, flags, word, sample, tmp_path, capsys):
    with telling(capsys, word):
        sample("p.csv", text, *flags)
    assert not (tmp_path / "images").exists()
