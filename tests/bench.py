"""Where an epoch's time goes, beside the floor: the bare UNet forwards and backwards that the maths needs, timed in the same run.

    python tests/bench.py @toy/train.args                                                   # CPU, a minute
    python tests/bench.py --shape sd14 --peak-tflops 989 --prompts-per-epoch 4 --batch 16     # one GPU: SD-v1.4 shapes, random weights
    python tests/bench.py --memory                                                          # CPU, a minute: computed, runs no model

Takes train.py's flags. Prints seconds per phase (medians over epochs, the first left out), epoch / floor for this code and for a plain
loop (one timestep of 4 samples per micro-step, one image per decode and reward forward), peak memory, and model FLOP utilisation.

--memory computes what training Stable Diffusion v1.4 takes, by setting: tensors without data follow one forward and backward of the
UNet under bf16 autocast, and every allocation is counted. It knows no fragmentation, no cuDNN workspace and no CUDA context.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train
from reward import VIT_H_14, Embedder
from sample import load_pipeline, predict_noise


SD14_UNET = dict(sample_size=64, cross_attention_dim=768)  # the other defaults of diffusers are v1.4's
SD14_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
)


def random_sd14(folder):
    """Stable Diffusion v1.4's and HPSv2.1's shapes with random weights, and the toy's tokenizer: folders for --model and --reward."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "toy/clip", model_max_length=77)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unet, vae = UNet2DConditionModel(**SD14_UNET), AutoencoderKL(**SD14_VAE)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False).save_pretrained(
        folder / "sd"
    )
    config = json.loads(json.dumps(VIT_H_14))
    config["text_config"]["eos_token_id"] = tokenizer.eos_token_id
    CLIPModel(CLIPConfig(**config)).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224).save_pretrained(folder / "clip")
    return ["--model", str(folder / "sd"), "--reward", str(folder / "clip")]


def seconds(call, device, repeats=5):
    """Median seconds of call() after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def unet_seconds(unet, args, device, batch, text_length):
    """Seconds of one bare UNet forward without, and one forward and backward with gradients, for `batch` pairs under the run's guidance."""
    autocast = torch.bfloat16 if args.precision == "bf16" else None
    size = unet.config.sample_size
    x, t = torch.randn(batch, 4, size, size, device=device), torch.full((batch,), 500, device=device)
    text = torch.randn(batch, text_length, unet.config.cross_attention_dim, device=device)

    def backward():
        predict_noise(unet, x, t, text, text[:1], args.guidance, autocast).sum().backward()

    with torch.no_grad():
        forward = seconds(lambda: predict_noise(unet, x, t, text, text[:1], args.guidance, autocast), device)
        with FlopCounterMode(display=False) as counter:
            predict_noise(unet, x, t, text, text[:1], args.guidance, autocast)
    return forward, seconds(backward, device), counter.get_total_flops()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, key, storage.nbytes())
        return out

    def gone(self, key, count):
        self.known.discard(key)
        self.now -= count


def training_memory(args):
    """GiB of training SD v1.4 with these flags: (UNet's weights, gradients and AdamW's states; peak of activations; peak of VAE decode)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def in_fp32(norm):  # as CUDA's autocast runs it; the CPU's keeps bf16
        def call(x, shape, weight=None, bias=None, eps=1e-5):
            return norm(x.float(), shape, *(w if w is None else w.float() for w in (weight, bias)), eps)

        return call

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SD14_UNET), AutoencoderKL(**SD14_VAE).requires_grad_(False)
    if args.lora:
        unet.bfloat16()
    train.make_trainable(unet, args)
    trained = [p for p in unet.parameters() if p.requires_grad]
    fixed = sum(p.nbytes for p in unet.parameters()) + 3 * sum(p.nbytes for p in trained)
    unet, vae = unet.to_empty(device="cpu"), vae.to_empty(device="cpu")  # never touched, so that it takes no memory
    norms = F.group_norm, F.layer_norm
    F.group_norm, F.layer_norm = map(in_fp32, norms)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            x, t, text = torch.randn(args.batch, 4, 64, 64), torch.full((args.batch,), 500), torch.randn(args.batch, 77, 768)
            with LiveBytes() as step:
                for _ in range(2):  # the second micro-batch finds the first one's gradients, which are in `fixed`
                    gradients = step.peak = step.now
                    predict_noise(unet, x, t, text, text[:1], args.guidance, torch.bfloat16).sum().backward()
            with LiveBytes() as decode, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                vae.decode(x)
    finally:
        F.group_norm, F.layer_norm = norms
    return [count / 2**30 for count in (fixed, step.peak - gradients, decode.peak)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=["given", "sd14"], default="given", help="sd14: random weights in Stable Diffusion v1.4's shapes"
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="the device's peak at this precision, for the model FLOP utilisation (H100 bf16: 989)"
    )
    parser.add_argument("--memory", action="store_true", help="compute the memory of training by setting, and time nothing")
    own, rest = parser.parse_known_args()
    if own.memory:
        others = (83.65e6 + 123.06e6 + 986.11e6) * 4 / 2**30  # fp32 weights of VAE, text encoder and HPSv2.1
        print("| flags | weights, gradients, AdamW | frozen models | UNet activations | VAE decode | peak (GiB) |\n|---|---|---|---|---|---|")
        for setting in ("", "--gradient-checkpointing", "--lora 16", "--lora 16 --gradient-checkpointing"):
            for batch in (4, 16):
                flags = f"{setting} --batch {batch}".strip()
                fixed, step, decode = training_memory(train.parse_args([*rest, *flags.split()]))
                total = fixed + others + max(step, decode)
                print(f"| `{flags}` | {fixed:.1f} | {others:.1f} | {step:.1f} | {decode:.1f} | {total:.1f} |", flush=True)
        raise SystemExit
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        models = random_sd14(Path(folder)) if own.shape == "sd14" else []
        args = train.parse_args([*rest, *models, "--epochs", "4", "--save-every", "1000", "--eval", "", "--out", f"{folder}/run"])
        train.main(args)
        laps = [json.loads(line)["seconds"] for line in open(args.out / "metrics.jsonl")][1:]
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        ours = {phase: statistics.median(lap[phase] for lap in laps) for phase in laps[0]}

        pipe = load_pipeline(args.model).to(device)
        unet = pipe.unet
        if device.type == "cuda":
            unet.to(memory_format=torch.channels_last)
        length = pipe.tokenizer.model_max_length
        samples, steps = args.prompts_per_epoch * args.generations, args.steps
        forward, both, flops = unet_seconds(unet, args, device, args.batch, length)
        reference = (steps - 1) * forward if args.kl and args.kl_to == "ref" else 0
        rollout, update = steps * forward * samples / args.batch, ((steps - 1) * both + reference) * samples / args.batch
        forward4, both4, _ = unet_seconds(unet, args, device, 4, length)
        clip = Embedder(args.reward, device, torch.bfloat16 if args.precision == "bf16" else None)
        size = unet.config.sample_size
        with torch.no_grad():
            one = seconds(lambda: clip.image(pipe.vae.decode(torch.randn(1, 4, size, size, device=device)).sample), device)
        plain = samples * (steps * forward4 / 4 + one + ((steps - 1) * both4 + (steps - 1) * forward4 * bool(reference)) / 4)
    total = sum(ours.values())
    print(f"\n{'phase':<10}{'seconds':>9}{'floor':>9}")
    for phase, floor in (("rollout", rollout), ("reward", 0), ("update", update)):
        print(f"{phase:<10}{ours[phase]:9.2f}{floor:9.2f}")
    print(f"floor / epoch: {(rollout + update) / total:.3f}   plain loop / epoch: {plain / total:.2f}")
    if peak:
        print(f"peak memory {peak:.1f} GiB on {torch.cuda.get_device_name()}")
    if own.peak_tflops:
        per_sample = flops / args.batch
        print(
            f"model FLOP utilisation: rollout {per_sample * steps * samples / ours['rollout'] / own.peak_tflops / 1e12:.2f}, "
            f"update {3 * per_sample * (steps - 1) * samples / ours['update'] / own.peak_tflops / 1e12:.2f}"
        )
