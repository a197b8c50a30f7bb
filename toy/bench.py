"""An epoch's time beside its floor: the bare UNet forwards and backwards that the maths needs, timed in
the same run. Takes train.py's flags.

    python toy/bench.py @toy/train.args                    # a minute on a CPU
    python toy/bench.py --shape sd14 --peak-tflops 989 --prompts-per-epoch 4 --updates 2    # one H100
    python toy/bench.py --flops @toy/train.args            # counts a run's UNet FLOPs, runs nothing
    python toy/bench.py --memory                           # computes the memory SD v1.4 takes; minutes
    python toy/bench.py --make FOLDER --sample-size 8      # random models, for a full-size check:
    python train.py --model FOLDER/sd --reward FOLDER/hps.pt --lora 4 --gradient-checkpointing ...

--memory follows one forward and backward of tensors without data under bf16 autocast and counts every
allocation. It knows no fragmentation, no cuDNN workspace and no CUDA context.
"""
import copy
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # before diffusers, which it keeps quiet
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from reward import check_numbers, flags
from sample import load_pipeline
from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# ------------------------------------------------------------ random weights in the true shapes
UNET = dict(sample_size=64, cross_attention_dim=768)  # SD v1.4's, else diffusers' defaults
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
           down_block_types=("DownEncoderBlock2D", ) * 4, up_block_types=("UpDecoderBlock2D", ) * 4)
TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)

def make_models(folder, sample_size):
    """FOLDER/sd in the shapes of Stable Diffusion v1.4, FOLDER/hps.pt in those of HPSv2.1 and beside it
    its tokenizer: of CLIP's size, with the toy's words."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": random_hps()}, folder / "hps.pt")  # first: its memory is free again below
    toy = json.loads((ROOT / "toy/clip/tokenizer.json").read_text())["model"]
    words = [word for word in toy["vocab"] if not word.startswith("<|")]
    words += [f"unused{i}" for i in range(49406 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [tuple(pair) for pair in toy["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    unet = UNet2DConditionModel(**UNET | {"sample_size": sample_size})
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT))
    scheduler = DDIMScheduler.from_pretrained(ROOT / "toy/sd/scheduler")  # as SD's
    parts = AutoencoderKL(**VAE), text_encoder, tokenizer, unet, scheduler, None, None
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder / "sd")
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return ["--model", f"{folder}/sd", "--reward", f"{folder}/hps.pt"]

def random_hps():
    """Random weights by the names and in the shapes of HPS_v2.1_compressed.pt, OpenCLIP's ViT-H-14."""
    shapes = {
        "logit_scale": (), "text_projection": (1024, 1024), "positional_embedding": (77, 1024),
        "token_embedding.weight": (49408, 1024), "visual.proj": (1280, 1024),
        "visual.class_embedding": (1280, ), "visual.positional_embedding": (257, 1280),
        "visual.conv1.weight": (1280, 3, 14, 14)
    }
    norms = {"ln_final": 1024, "visual.ln_pre": 1280, "visual.ln_post": 1280}
    layers = {
        "attn.in_proj_": (3, 1), "attn.out_proj.": (1, 1), "mlp.c_fc.": (4, 1), "mlp.c_proj.": (1, 4)
    }
    for tower, width, depth in (("", 1024, 24), ("visual.", 1280, 32)):
        for block in (f"{tower}transformer.resblocks.{i}." for i in range(depth)):
            norms |= {block + "ln_1": width, block + "ln_2": width}
            for layer, (rows, columns) in layers.items():
                shapes[block + layer + "weight"] = (rows * width, columns * width)
                shapes[block + layer + "bias"] = (rows * width, )
    state = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    for name, width in norms.items():
        state |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    return state

# ------------------------------------------------------------ what a pair, and an epoch of them, costs
def make_policy(unet, args):
    """What train.py makes of the UNet: all weights, or adapters over frozen ones, which bf16 holds."""
    unet.requires_grad_(not args.lora)
    if args.lora:
        unet.to(torch.bfloat16 if args.precision == "bf16" else torch.float32)
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=args.lora, lora_alpha=args.lora, target_modules=layers))
        cast_training_params(unet, torch.float32)
    return unet

def calls(unet, tokens, args, batch):
    """(forward, forward and backward) of a batch of (sample, step) pairs, as functions."""
    size, device = unet.config.sample_size, unet.device
    x = torch.randn(batch, 4, size, size, device=device)
    t = torch.full((batch, ), 500, device=device)
    text = torch.randn(batch, tokens, unet.config.cross_attention_dim, device=device)

    def forward(gradients=False):
        with torch.set_grad_enabled(gradients), autocast(args):
            return train.predict_noise(unet, x, t, text, text[:1], args.guidance)

    def both():
        forward(gradients=True).sum().backward()

    return forward, both

def autocast(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16")

def epoch_cost(args, forward, both):
    """(rollout, update) of an epoch, by the cost of a pair."""
    samples, trained = args.prompts_per_epoch * args.generations, args.steps - 1
    reference = forward if args.kl and args.kl_to == "ref" else 0
    return samples * args.steps * forward, samples * trained * (both + reference)

def epoch_flops(unet, tokens, args):
    """(rollout, update), counted: the same on all devices, and quick, for its tensors have no data."""
    unet = copy.deepcopy(unet).to("meta", torch.float32)
    return epoch_cost(args, *map(flops, calls(unet, tokens, args, batch=1)))

def flops(call):
    # attention spelt out as matrix products: the counter knows the fused kernels of GPUs only
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()

def print_flops(args, shape):
    if shape == "sd14":
        with torch.device("meta"):
            unet, tokens = UNet2DConditionModel(**UNET), 77
    else:
        pipe = load_pipeline(args.model)
        unet, tokens = pipe.unet, pipe.tokenizer.model_max_length
    rollout, update = epoch_flops(make_policy(unet, args), tokens, args)
    total = args.epochs * (rollout + update)
    print(f"UNet FLOPs: rollout {rollout:.3e} + update {update:.3e}, x {args.epochs} epochs {total:.3e}")

def seconds(call):
    """The median of five after a warm-up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

def benchmark(args, peak_tflops):
    train.main(args)
    laps = [json.loads(line) for line in open(args.out / "metrics.jsonl")][1:]
    phases = ["rollout", "update"]
    ours = [statistics.median(lap[f"seconds_{phase}"] for lap in laps) for phase in phases]
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(f"peak memory {memory:.1f} GiB on {torch.cuda.get_device_name()}")

    pipe = load_pipeline(args.model)
    unet, tokens = make_policy(pipe.unet, args), pipe.tokenizer.model_max_length
    counted = epoch_flops(unet, tokens, args)
    if torch.cuda.is_available():
        pipe.to("cuda")
        unet.to(memory_format=torch.channels_last)
    bare = (seconds(call) / args.batch for call in calls(unet, tokens, args, args.batch))
    floor = epoch_cost(args, *bare)
    print(f"\n{'phase':<8}{'seconds':>9}{'floor':>9}")
    for phase, lap, least in zip(phases, ours, floor):
        print(f"{phase:<8}{lap:9.2f}{least:9.2f}")
    print(f"floor / epoch {sum(floor) / sum(ours):.3f}")
    if peak_tflops:
        shares = [x / lap / peak_tflops / 1e12 for x, lap in zip(counted, ours)]
        print(f"model FLOP utilisation: rollout {shares[0]:.2f}, update {shares[1]:.2f}")

# ------------------------------------------------------------ what training takes
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are still alive, and their peak."""
    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        return out

    def remove(self, key, size):
        self.known.discard(key)
        self.now -= size

def peak_bytes(call):
    with LiveBytes() as live:
        call()
        before = live.peak = live.now  # gradients, which stay and are counted with the weights
        call()
    return live.peak - before

def in_fp32(norm):
    """A norm as CUDA's autocast runs it; the CPU's keeps bf16."""
    return lambda x, shape, w, b, eps: norm(x.float(), shape, w.float(), b.float(), eps)

def training_memory(args):
    """GiB of training SD v1.4 with these flags: the UNet's weights, gradients and AdamW's states, the
    frozen models, and the peak of a training step or of decoding."""
    with torch.device("meta"):
        unet = make_policy(UNet2DConditionModel(**UNET), args)
        vae = AutoencoderKL(**VAE).requires_grad_(False)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = sum(p.nbytes * (4 if p.requires_grad else 1) for p in unet.parameters())
    frozen = (83.65e6 + 123.06e6 + 986.11e6) * 4  # VAE, text encoder, HPSv2.1
    unet, vae = unet.to_empty(device="cpu"), vae.to_empty(device="cpu")  # never touched: no memory
    with FakeTensorMode(allow_non_fake_inputs=True):
        _, both = calls(unet, 77, args, args.batch)
        step = peak_bytes(both)
        latents = torch.randn(args.batch, 4, 64, 64)
        with torch.no_grad(), autocast(args):
            decode = peak_bytes(lambda: vae.decode(latents))
    return (trained + frozen + max(step, decode)) / 2**30

def print_memory(rest):
    F.group_norm, F.layer_norm = in_fp32(F.group_norm), in_fp32(F.layer_norm)
    for setting in ("", "--gradient-checkpointing", "--lora 16", "--lora 16 --gradient-checkpointing"):
        for batch in (4, 16):
            changed = f"{setting} --batch {batch}".strip()
            peak = training_memory(train.parse_args([*rest, *changed.split()]))
            print(f"{peak:.1f} GiB with {changed}", flush=True)

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
        rest += ["--out", f"{folder}/run"]
        args = train.parse_args(rest)  # bad flags are told before anything is made
        if own.make:
            make_models(own.make, own.sample_size)
        elif own.memory:
            print_memory(rest)
        elif own.flops:
            print_flops(args, own.shape)
        else:
            if own.shape == "sd14":
                rest += make_models(Path(folder), own.sample_size)
            args = train.parse_args([*rest, "--epochs", "4", "--save-every", "4"])
            benchmark(args, own.peak_tflops)
