"""A tiny pipeline and CLIP of the true classes, and tiny runs: one thread, no network, no GPU."""
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MPLBACKEND="agg")
sys.path.insert(0, str(ROOT))

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

import train

torch.set_num_threads(1)
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                set_alpha_to_one=False, steps_offset=1)  # Stable Diffusion's
TEXTS = {
    "one.txt": "a circle on fire\ntwo squares burning\na pink triangle\na square in flames\n",
    "two.txt": "a green circle\na blue square left of a circle\nthree triangles calm\n",
    "anchors.txt": "# safe\n+ a circle calm\n+ a square calm\n- a circle on fire\n- a square burning\n"
}

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with sd/ (8 x 8 pixels, 4 x 4 latents), clip/, one.txt and two.txt, and anchors.txt."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "toy/sd/tokenizer")
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 hidden_act="gelu")
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vision = dict(image_size=8, patch_size=4)
    clip = CLIPModel(
        CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=16))
    unet = UNet2DConditionModel(sample_size=4, block_out_channels=(16, 16), layers_per_block=1,
                                norm_num_groups=4, attention_head_dim=4, cross_attention_dim=16,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=8,
                        down_block_types=("DownEncoderBlock2D", ) * 2,
                        up_block_types=("UpDecoderBlock2D", ) * 2)
    parts = vae, CLIPTextModel(clip.config.text_config), tokenizer, unet, DDIMScheduler(**SCHEDULE)
    pipe = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder / "sd")
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8).save_pretrained(folder / "clip")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder

def command_line(tiny, out, **changes):
    """The flags of a tiny run in folder out; flag=True has no value."""
    values = dict(model=tiny / "sd", reward=tiny / "clip", anchors=tiny / "anchors.txt",
                  prompts=[tiny / "one.txt",
                           tiny / "two.txt"], prompts_per_epoch=2, generations=3, epochs=2, updates=2,
                  batch=4, steps=4, guidance=2, precision="fp32", lr=1e-3, save_every=1, out=out)
    argv = []
    for flag, value in (values | changes).items():
        value = value if isinstance(value, list) else [] if value is True else [value]
        argv += [f"--{flag.replace('_', '-')}", *map(str, value)]
    return argv

@pytest.fixture
def flags(tiny, tmp_path):
    """flags("name", flag=value, ...) -> the command line of a tiny run in tmp_path / name."""
    return lambda name, **changes: command_line(tiny, tmp_path / name, **changes)

@pytest.fixture
def run(flags):
    """run("name", flag=value, ...) -> the folder of a finished tiny run, in this process."""
    def finished(name, **changes):
        args = train.parse_args(flags(name, **changes))
        train.main(args)
        return args.out

    return finished

def start(*argv):
    """A script as a user starts it, but in this process."""
    with patch("sys.argv", [*map(str, argv)]):
        runpy.run_path(ROOT / argv[0], run_name="__main__")

def script(*argv, ranks=1):
    """A script in a process of its own; under torchrun where there are several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command = map(str, [sys.executable, *(torchrun if ranks > 1 else []), *argv])
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

def told(done, *words):
    """Bad input is told: exit code 2 and one line on stderr that holds the words. done: its process."""
    lines = re.sub(r"[^\r\n]*%\|[^]]*\]", "", done.stderr).split("\n")  # without progress bars
    lines = [line.strip() for line in lines if line.strip()]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "error: " in lines[0] and all(str(word) in lines[0] for word in words), lines[0]

@contextmanager
def telling(capsys, *words):
    """`told` of what is done in this process, in the with block."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    told(subprocess.CompletedProcess([], stop.value.code, stderr=capsys.readouterr().err), *words)

def weights(folder):
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")

def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

def same_run(a, b):
    """The same last state and the same log, bit for bit, but for the times."""
    states = [[torch.load(file) for file in out.glob("checkpoint-*/train_state.pt")] for out in (a, b)]
    x, y = (max(of_run, key=lambda state: state["epoch"]) for of_run in states)
    same = all(torch.equal(x["trained"][k], y["trained"][k]) for k in x["trained"] | y["trained"])
    logs = [re.sub(r', "seconds.*', "", (out / "metrics.jsonl").read_text()) for out in (a, b)]
    return same and x["epoch"] == y["epoch"] and logs[0] == logs[1]
