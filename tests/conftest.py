"""What the tests share: a tiny pipeline and CLIP of the true classes, and a way to run a script in a fresh process at once.

All on the CPU with one thread, whatever the machine has, and without the network: so that "bit for bit" can be asked for.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MPLBACKEND="agg", TQDM_MININTERVAL="0")
sys.path.insert(0, str(ROOT))

import pytest
import torch

torch.set_num_threads(1)

# A server that has imported the heavy packages forks one process per run: a fresh interpreter state in a tenth of the time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "conftest",
        "sample",
        "reward",
        "train",
        "peft",
        "matplotlib.pyplot",
        "transformers.models.clip",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    ]
)
Result = namedtuple("Result", "code out err")


def _child(argv, code, log, environment):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = argv
    if code:
        exec(compile(code, "driver", "exec"), {"__name__": "__driver__"})
    runpy.run_path(argv[0], run_name="__main__")


class Script:
    """`python argv...` started in the repository's root; `code` runs first, to replace parts of the modules reward or sample."""

    def __init__(self, log, *argv, code="", environment=()):
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process = PROCESSES.Process(target=_child, args=([str(a) for a in argv], code, str(log), dict(environment)))
        self.process.start()

    def result(self, timeout=300):
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail(f"still running after {timeout} s: {self.log}")
        return Result(self.process.exitcode, *(Path(f"{self.log}.{n}").read_text(errors="replace") for n in ("out", "err")))


@pytest.fixture
def run(tmp_path):
    """run(argv...) -> (exit code, stdout, stderr) of a script."""
    return lambda *argv, **kwargs: Script(tmp_path / "log" / "script", *argv, **kwargs).result()


def torchrun(*argv, ranks=2, timeout=300):
    """A script under torchrun, as a real command."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def refused(result, *words):
    """Bad input: exit code 2 and one line that starts with "error:" and holds the words."""
    assert result.code == 2, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error:"), result.err
    for word in words:
        assert word in lines[0], lines[0]


# ----------------------------------------------------------------------------- tiny models


def make_tiny(folder, prediction_type="epsilon"):
    """A StableDiffusionPipeline (8x8 pixels, 4x4 latents) and a CLIPModel with random weights and the toy's tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "toy/sd/tokenizer")
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        image_size=8,
        patch_size=4,
    )
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        3,
        3,
        ("DownEncoderBlock2D",) * 2,
        ("UpDecoderBlock2D",) * 2,
        (8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        scaling_factor=0.5,
    )
    optimizer = torch.optim.Adam(
        vae.decoder.parameters(), 1e-2
    )  # so that a latent's first channel is brightness, as in a trained VAE
    for _ in range(60):
        z = torch.randn(8, 4, 4, 4)
        target = (z[:, :1] / 2).repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
        optimizer.zero_grad()
        (vae.decode(2 * z).sample - target).square().mean().backward()
        optimizer.step()
    vae.requires_grad_(False)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipe = StableDiffusionPipeline(
        vae.eval(),
        CLIPTextModel(clip.config.text_config).eval(),
        tokenizer,
        unet.eval(),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "sd")
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8).save_pretrained(folder / "clip")
    (folder / "one.txt").write_text("a circle on fire\ntwo squares burning\na pink triangle\na circle and a square in flames\n")
    (folder / "two.txt").write_text("a green circle\na blue square left of a circle\nthree triangles calm\n")
    (folder / "anchors.txt").write_text(
        "# a comment\n+ a circle calm\n+ a square unharmed\n- a circle on fire\n- a square burning\n"
    )
    (folder / "reversed.txt").write_text("- a circle calm\n- a square unharmed\n+ a circle on fire\n+ a square burning\n")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with sd/, clip/, one.txt, two.txt, anchors.txt and the same with the signs reversed."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def pipe(tiny):
    """The tiny pipeline, frozen."""
    return load(tiny / "sd")


def load(folder):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.file_config = pipe.scheduler.config
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    return pipe


# ----------------------------------------------------------------------------- tiny training runs

SMALL = {
    "prompts_per_epoch": 2,
    "generations": 2,
    "epochs": 2,
    "updates": 1,
    "batch": 8,
    "steps": 3,
    "guidance": 2,
    "precision": "fp32",
    "lr": 1e-3,
    "save_every": 1,
}


def train_args(tiny, out, **changes):
    """The command line of a tiny run: `name=value` becomes --name value, True a bare flag, None leaves it out."""
    flags = {
        "model": tiny / "sd",
        "reward": tiny / "clip",
        "anchors": tiny / "anchors.txt",
        "prompts": [f"{tiny / 'one.txt'}:0.5", f"{tiny / 'two.txt'}:0.5"],
        **SMALL,
        "out": out,
        **changes,
    }
    argv = ["train.py"]
    for name, value in flags.items():
        if value is not None:
            argv += [f"--{name.replace('_', '-')}"] + (
                [] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)]
            )
    return argv


@pytest.fixture
def train(tiny, tmp_path, run):
    """train("name", flag=value, ...) -> the folder of a finished tiny run."""

    def finished(name, **changes):
        kwargs = {key: changes.pop(key) for key in ("code", "environment") if key in changes}
        result = run(*train_args(tiny, tmp_path / name, **changes), **kwargs)
        assert result.code == 0, result.err
        return tmp_path / name

    return finished


def weights(folder, file="unet/diffusion_pytorch_model.safetensors"):
    from safetensors.torch import load_file

    return load_file(Path(folder) / file)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def same_run(out, reference):
    """Bit for bit the same weights, the same log but for times, and the same pictures of before and after."""
    last = max(int(p.name.split("-")[1]) for p in reference.glob("checkpoint-*"))
    for file in (
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ):
        ours, theirs = weights(out / f"checkpoint-{last}", file), weights(reference / f"checkpoint-{last}", file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs), file
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in metrics(o)]
        for o in (out, reference)
    ]
    assert timeless[0] == timeless[1]
    for name in ("grid-0.png", f"grid-{last}.png"):
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
