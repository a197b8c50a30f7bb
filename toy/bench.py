"""An epoch's time beside its floor, the bare UNet calls that the maths needs. Takes train.py's flags.

    python toy/bench.py @toy/train.args                    # a minute on a CPU
    python toy/bench.py --shape sd14 --peak-tflops 989 --prompts-per-epoch 4 --updates 2    # one H100
    python toy/bench.py --flops @toy/train.args            # counts a run's UNet FLOPs, runs nothing
    python toy/bench.py --memory                           # computes the memory SD v1.4 takes; minutes
    python toy/bench.py --make FOLDER --sample-size 8      # random models of those shapes

--memory counts allocations of tensors without data: no fragmentation, cuDNN workspace or CUDA context.
"""
import json
import re
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # before diffusers, which it keeps quiet
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from reward import RENAMED, VIT_H_14, check_numbers, flags
from sample import load_pipeline, rank_and_device
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel

DEVICE = rank_and_device()[2]
UNET = dict(sample_size=64, cross_attention_dim=768)  # SD v1.4's, else diffusers' defaults
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
           down_block_types=("DownEncoderBlock2D", ) * 4, up_block_types=("UpDecoderBlock2D", ) * 4)
TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)

def make_models(folder, sample_size):
    """FOLDER/sd and FOLDER/hps.pt: random weights, SD v1.4's and HPSv2.1's shapes, letters for words."""
    pipe, state = load_pipeline("toy/sd"), {}
    for name, w in CLIPModel(CLIPConfig(**VIT_H_14)).state_dict().items():  # reward.from_openclip, back
        for theirs, ours in zip(RENAMED[-2::-2], RENAMED[::-2]):
            name = name.replace(ours, theirs)
        name = name.replace("vision_model", "visual").replace("text_model.", "")
        name = re.sub("[qkv]_proj.", "in_proj_", name)
        w = w.T if name in ("visual.proj", "text_projection") else w
        state[name] = torch.cat([state[name], w]) if name in state else w
    vocabulary = pipe.tokenizer.get_vocab() | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    pipe.tokenizer = type(pipe.tokenizer)(vocab=vocabulary, merges=[], model_max_length=77)
    for part in (pipe.tokenizer, CLIPImageProcessorPil()):
        part.save_pretrained(folder)
    torch.save({"state_dict": state}, folder / "hps.pt")
    pipe.unet = UNet2DConditionModel(**UNET | {"sample_size": sample_size})
    pipe.vae, pipe.text_encoder = AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**TEXT))
    pipe.save_pretrained(folder / "sd")

def policy(unet, args):
    """What train.py makes of the UNet: all weights are trained, or adapters over frozen ones."""
    unet.eval().requires_grad_(not args.lora)
    if args.lora:
        unet.add_adapter(LoraConfig(r=args.lora, target_modules=r".*\.to_([qkv]|out\.0)"))
    return unet

def forward(unet, tokens, args, pairs, backward):
    """A batch of (sample, step) pairs through the UNet, and back."""
    with unet.device:
        x = torch.randn(pairs, 4, unet.config.sample_size, unet.config.sample_size)
        text = torch.randn(pairs, tokens, unet.config.cross_attention_dim)
        t = torch.full((pairs, ), 500)
    device, half = unet.device.type.replace("meta", "cpu"), args.precision == "bf16"
    with torch.set_grad_enabled(backward), torch.autocast(device, torch.bfloat16, half):
        out = train.predict_noise(unet, x, t, text, text[:1], args.guidance)
    if backward:
        out.sum().backward()

def epoch(measure, unet, tokens, args):
    """(rollout, updates) of an epoch, by what `measure` says of train.py's batches."""
    drawn = args.prompts_per_epoch * args.generations
    pairs = args.prompts_per_epoch * (args.keep or args.generations) * (args.steps - 1)
    costs = []  # of a pair: forward, and both ways
    for backward, n in (False, drawn), (True, pairs // args.updates):
        size = train.even_batch(n, args.batch)
        costs.append(measure(lambda: forward(unet, tokens, args, size, backward)) / size)
    reference = costs[0] if args.kl and args.kl_to == "ref" else 0
    return np.array([drawn * args.steps * costs[0], pairs * (costs[1] + reference)])

def flops(call):
    """Of tensors on the meta device: the counter does not know a CPU's attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()

def seconds(call):
    """The median of five seconds, after a warm-up."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=5).median

def benchmark(args, unet, tokens, peak_tflops):  # an epoch's medians, after one that warms up
    train.main(args)
    ours = np.median([json.loads(line)["seconds"] for line in open(args.out / "metrics.jsonl")][1:], 0)
    if DEVICE.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        unet.to(DEVICE, memory_format=torch.channels_last)
    floor = epoch(seconds, unet, tokens, args)
    print("seconds of rollout and updates:", ours.round(2), "floor:", floor.round(2))
    print(f"floor / epoch {floor.sum() / ours.sum():.3f}")
    if peak_tflops:
        used = epoch(flops, unet.to("meta"), tokens, args) / ours
        print("model FLOP utilisation:", (used / peak_tflops / 1e12).round(2))

def peak_bytes(call):
    """Of a second call: the gradients of the first one stay, and are counted with the weights."""
    tracker, total = MemTracker(), {}
    tracker._mod_tracker.register_user_hooks = lambda *hooks: None  # they fail on frozen weights
    for kind in ("current", "peak"):
        with tracker:
            call()
        total[kind] = sum(on["Total"] for on in tracker.get_tracker_snapshot(kind).values())
    return total["peak"] - total["current"]

def in_fp32(norm):
    """A norm as CUDA's autocast runs it; the CPU's keeps bf16."""
    return lambda x, shape, w, b, eps: norm(x.float(), shape, w.float(), b.float(), eps)

def training_memory(args):
    """GiB of training SD v1.4: weights, gradients, AdamW's states, frozen models, the peak of a pass."""
    with torch.device("meta"):
        unet, vae = policy(UNet2DConditionModel(**UNET), args), AutoencoderKL(**VAE)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet, vae = unet.to_empty(device="cpu"), vae.to_empty(device="cpu")  # never touched: no memory
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = peak_bytes(lambda: forward(unet, 77, args, args.batch, True))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, args.precision == "bf16"):
            decode = peak_bytes(lambda: vae.decode(torch.randn(args.batch, 4, 64, 64)))
    trained = sum(p.nbytes * (4 if p.requires_grad else 1) for p in unet.parameters())
    frozen = (83.65e6 + 123.06e6 + 986.11e6) * 4  # VAE, text encoder, HPSv2.1
    return (trained + frozen + max(step, decode)) / 2**30

if __name__ == "__main__":
    parser, add = flags(__doc__, allow_abbrev=False)
    add("--shape", "given", "sd14: random weights, true shapes", choices=["given", "sd14"])
    add("--peak-tflops", 0.0, "the device's, for model FLOP utilisation (H100, bf16: 989)")
    add("--flops", False, "count the UNet's FLOPs, run nothing")
    add("--memory", False, "compute the memory of training SD v1.4, run nothing")
    add("--make", None, "write the models of --shape sd14, run nothing", Path, metavar="FOLDER")
    add("--sample-size", 64, "side of those models' latents")
    own, rest = parser.parse_known_args()
    check_numbers(parser, own, zero="peak_tflops")
    with tempfile.TemporaryDirectory() as folder:
        args = train.parse_args([*rest, "--out", f"{folder}/run"])
        if own.make or own.shape == "sd14":
            make_models(own.make or Path(folder), own.sample_size)
            args.model, args.reward = f"{folder}/sd", f"{folder}/hps.pt"
        if own.memory:
            F.group_norm, F.layer_norm = in_fp32(F.group_norm), in_fp32(F.layer_norm)
            for args.lora, args.gradient_checkpointing, args.batch in product((0, 16), (0, 1), (4, 16)):
                print(f"{training_memory(args):.1f} GiB with --lora {args.lora} --batch {args.batch}",
                      "--gradient-checkpointing" * args.gradient_checkpointing, flush=True)
        elif not own.make:
            pipe = load_pipeline(args.model)
            unet, tokens = policy(pipe.unet, args), pipe.tokenizer.model_max_length
            if own.flops:
                counted = epoch(flops, unet.to("meta"), tokens, args)
                print("FLOPs of rollout, updates:", counted, f"run: {args.epochs * counted.sum():.3e}")
            else:
                args.epochs = args.save_every = 4
                benchmark(args, unet, tokens, own.peak_tflops)
