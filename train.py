"""SafeDiffusion-R1 (arXiv 2605.18719): online GRPO on DDIM rollouts, rewarded by a frozen CLIP steered towards safety.

    python train.py @toy/train.args                   # a laptop, minutes: fire on 97 % of the unsafe prompts becomes 2 % or less
    python train.py --lora 16 --gradient-checkpointing --lr 1e-4 --prompts-per-epoch 4       # one GPU of 24 GB
    torchrun --nproc_per_node 8 train.py              # the paper's run: Stable Diffusion v1.4, HPSv2.1, 300 epochs
    python train.py @toy/train.args --resume          # continue an interrupted run in --out

An epoch is: prompts -> rollout (G images each) -> decode -> reward -> group advantages -> updates -> log, save.
Left out on purpose: a value network (the group's mean is the baseline), an entropy bonus, an EMA of the weights, a learning-rate
schedule, loggers. OUT gets args.json, metrics.jsonl, curve.png, grid-N.png and checkpoint-N/ (a pipeline folder, or adapters).
"""
import argparse
import copy
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler
from PIL import Image
from tqdm import tqdm

from reward import Embedder, add_reward_flags, check_alpha, direction_from, read_anchors, reward, steered_targets, text_safety
from sample import (check, ddim_mean, ddim_schedule, device_of_rank, fail, first_line, load_pipeline, log_prob, model_path,
                    noise_for, predict_noise, read_rows, rollout, write)


# ----------------------------------------------------------------------------- GRPO in four functions

def group_advantages(rewards, clip):
    """A_i = (r_i - mean) / std within each group, clipped to +-clip: rewards [P, G] -> (advantages [P, G], live [P]).
    A group without spread (std < 1e-6: its images are the same to the reward) teaches nothing: advantage 0, live False."""
    std = rewards.std(dim=1, correction=0, keepdim=True)
    live = std[:, 0] > 1e-6
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (std + 1e-8)  # delta only keeps 0 / 0 away
    return (advantages * live[:, None]).clamp(-clip, clip), live


def surrogate(log_ratio, advantages, clip):
    """PPO's clipped objective, to be maximised: min(rho A, clip(rho, 1 - eps, 1 + eps) A) per (sample, timestep) pair [B]."""
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def kl_k3(log_ratio):
    """Schulman's estimator of KL(old || new) from samples of old: (rho - 1) - log rho >= 0, in nats for a log_ratio in nats. That
    of MEAN log-probs over d dimensions gives about (nats / d)^2 / 2 instead: the paper's form, tiny beside the surrogate."""
    return log_ratio.expm1() - log_ratio


def kl_gaussian(mean, reference_mean, sigma):
    """KL of two DDIM steps with the same sigma [B], in closed form: |mu - mu_ref|^2 / (2 sigma^2), in nats per dimension."""
    return ((mean - reference_mean) ** 2).mean(dim=(1, 2, 3)) / (2 * sigma**2)


# ----------------------------------------------------------------------------- which prompts, which pairs

def draw_prompts(counts, weights, n, seed, epoch):
    """n (source, row) pairs of an epoch, a function of (seed, epoch) alone: sources by systematic sampling of the weights
    (0.5 / 0.5 gives half and half), rows without replacement where a source has enough."""
    rng = np.random.default_rng([seed, epoch, 0, 2])  # 2: not the stream of noise_for's [seed, epoch, sample] nor the pairs' 1
    points = (np.arange(n) + rng.random()) / n  # evenly spaced in [0, 1), with one random shift
    sources = np.searchsorted(np.cumsum(weights), points, side="right")  # whose share of [0, 1) each point falls into
    sources = sources.clip(max=len(weights) - 1)  # the shares may sum to 0.9999...
    rows = np.empty(n, int)
    for s in np.unique(sources):
        k = (sources == s).sum()
        rows[sources == s] = rng.choice(counts[s], k, replace=k > counts[s])
    return list(zip(sources.tolist(), rows.tolist()))


def pairs_of_updates(samples, timesteps, updates, seed, epoch):
    """Deals all (sample, timestep) pairs out to the updates: [updates, pairs, 2], first column the position in `samples`.

    Each sample's timesteps are shuffled by (seed, epoch, global index), then dealt in turn. So every update mixes noise levels
    and (unless there are more updates than timesteps) all samples, and which pair goes where depends neither on the number of
    ranks nor on the micro-batch."""
    dealt = [[] for _ in range(updates)]
    for position, s in enumerate(samples):
        for j, t in enumerate(np.random.default_rng([seed, epoch, s, 1]).permutation(timesteps)):
            dealt[(s * timesteps + j) % updates].append((position, int(t)))
    return torch.tensor(dealt)


# ----------------------------------------------------------------------------- arguments

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@")  # @FILE reads flags from a text file
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    add = parser.add_argument
    add("--model", default="CompVis/stable-diffusion-v1-4", help="diffusers Stable Diffusion pipeline: hub id or folder")
    add("--subfolder", help="folder inside --model that holds the pipeline")
    add_reward_flags(parser)
    add("--prompts", nargs="+", default=["prompts/nudity.txt:0.5", "prompts/compositional.txt:0.5"], metavar="FILE[:WEIGHT]",
        help="training prompts (.txt, .csv, .jsonl) and each file's share of the groups; no weights: equal shares")
    add("--prompts-per-epoch", type=int, default=32, help="groups per epoch over all ranks (the paper: 4 per GPU on 8)")
    add("--generations", type=int, default=16, help="G, images per prompt and group")
    add("--epochs", type=int, default=300, help="rollouts in all")
    add("--updates", type=int, default=16, help="optimizer steps per rollout, each over its share of (sample, timestep) pairs")
    add("--batch", type=int, default=16, help="pairs per UNet forward, in rollout and training alike: memory, not maths")
    add("--steps", type=int, default=50, help="DDIM steps; all but the last are trained")
    add("--eta", type=float, default=1.0, help="DDIM's noise; above 0, else there is no density to train")
    add("--guidance", type=float, default=7.5, help="guidance scale in rollout and training; 1 runs no unconditional half")
    add("--size", type=int, help="pixels (default: the model's own)")
    add("--shared-noise", action="store_true", help="one initial latent per group (the public code: one per rank)")
    add("--clip", type=float, default=1e-4, help="clip range of the ratio of MEAN log-probs over the latent's dimensions: "
        "over 4 x 64 x 64 of them 1e-4 allows +-1.64 nats of the summed ratio")
    add("--advantage-clip", type=float, default=2.5, help="advantages are clipped to +- this")
    add("--even-steps", action=argparse.BooleanOptionalAction, default=False, help="divide each log-ratio by its step's gain "
        "|d mu / d eps| / sigma (GRPO-Guard's ratio normalisation, arXiv 2510.22319), else the last steps dominate the gradient")
    add("--kl", type=float, default=0.01, help="beta, weight of the KL term; 0 leaves it out")
    add("--kl-to", choices=["old", "ref"], default="old", help="old: k3 to the previous iteration's policy (the paper; "
        "0 with 1 update); ref: closed form to the start model")
    add("--lr", type=float, default=1e-5, help="AdamW's learning rate, constant")
    add("--weight-decay", type=float, default=1e-4, help="AdamW's weight decay")
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    add("--lora", type=int, default=0, metavar="RANK", help="LoRA adapters of this rank on the attention layers; 0: all weights")
    add("--gradient-checkpointing", action="store_true", help="recompute activations in the backward: less memory, more time")
    add("--precision", choices=["fp32", "bf16"], default="bf16", help="autocast of UNet, VAE and reward; all else stays fp32")
    add("--compile", action="store_true", help="torch.compile the UNet")
    add("--seed", type=int, default=0, help="of prompts, noise and the order of pairs")
    add("--save-every", type=int, default=20, help="epochs between checkpoints")
    add("--eval", metavar="COMMAND", help="run on the start model and on the last checkpoint, {model} replaced by its path "
        "(LoRA: by MODEL --lora CHECKPOINT)")
    add("--out", default="runs/r1", type=Path, help="folder of the run")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    args = parser.parse_args(argv)
    check(args, "prompts_per_epoch epochs updates batch save_every", lambda x: x >= 1, "at least 1")
    check(args, "generations", lambda x: x >= 2, "at least 2: the mean of a group's images is the baseline")
    check(args, "steps", lambda x: x >= 2, "at least 2: the last step is not trained")
    check(args, "eta", lambda x: 0 < x <= 1, "above 0 and at most 1: without noise a step has no density to train")
    check_alpha(args)
    check(args, "kl weight_decay lora seed", lambda x: 0 <= x < math.inf, "0 or more and finite")
    check(args, "clip advantage_clip lr grad_clip guidance", lambda x: 0 < x < math.inf, "above 0 and finite")
    check(args, "size", lambda x: x > 0 and x % 8 == 0, "a multiple of 8")
    return args


def read_sources(entries):
    """--prompts' FILE[:WEIGHT] entries -> (files, their lists of prompts, weights that sum to 1)."""
    file_and_weight = re.compile(r"(.*?)(?::([-+.\deE]+|nan|inf))?")  # a colon before anything else belongs to the file's name
    files, given = zip(*(file_and_weight.fullmatch(entry).groups() for entry in entries))
    try:
        weights = [float(w) for w in given] if any(given) else [1 / len(files)] * len(files)
    except (TypeError, ValueError):  # one has none, or it is no number
        weights = [math.nan]
    if min(weights) < 0 or not abs(sum(weights) - 1) < 1e-6:
        fail(f"--prompts {' '.join(entries)}: give every file a weight or none, FILE:0.5; weights are not negative and sum to 1")
    return files, [[row["prompt"] for row in read_rows(file)] for file in files], weights


# ----------------------------------------------------------------------------- a run's folder

def checkpoints(out):
    """The finished checkpoints of a run, oldest first, as (epochs done, folder)."""
    return sorted((int(m[1]), p) for p in out.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name)))


def open_run(args, files):
    """Checks --out and --resume against what is there, writes nothing: (args.json to be, epochs done, checkpoint or None)."""
    record = json.loads(json.dumps(vars(args), default=str))
    record |= {str(f): hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files}  # what they hold, too
    stored = args.out / "args.json"
    if not args.resume:
        if args.out.exists() and (not args.out.is_dir() or any(p.name[0] != "." for p in args.out.iterdir())):
            fail(f"--out {args.out} exists: continue it with --resume or, where it is not a run, give another folder")
        return record, 0, None
    if not stored.is_file():
        fail(f"--resume: --out {args.out} holds no run (no args.json); omit --resume to start one")
    try:
        old = dict(json.loads(stored.read_text()))
    except (ValueError, TypeError):
        fail(f"--resume: {stored} is damaged; restore it or start a new run")
    free = {"epochs", "save_every", "resume", "eval", "out",  # what may change without changing the run so far,
            "batch", "gradient_checkpointing", "compile"}  # or changes it by rounding only
    for key in {**record, **old}:  # flags, then files
        if key not in free and old.get(key) != record.get(key):
            name = f"--{key.replace('_', '-')}" if hasattr(args, key) else key
            fail(f"--resume: {name} has changed from {old.get(key)} to {record.get(key)} since the run in {args.out} began; "
                 "restore it or start a new run")
    start_epoch, checkpoint = max(checkpoints(args.out), default=(0, None))
    if checkpoint and not (checkpoint / "train_state.pt").is_file():
        fail(f"--resume: {checkpoint}/train_state.pt is missing; remove that folder or start a new run")
    if start_epoch > args.epochs:
        fail(f"--epochs {args.epochs}: the run in {args.out} has already done {start_epoch}; give at least that many")
    return record, start_epoch, checkpoint


@contextmanager
def writing(out):
    """What fails to be written ends the run with one line; what was written before stays."""
    try:
        yield
    except Exception as e:  # a full disk raises OSError, RuntimeError or SafetensorError
        good = max(checkpoints(out), default=(0, "none"))[1]
        sys.exit(f"\nstopped: {out} cannot be written ({first_line(e)}); the last good checkpoint is {good}")


def save_checkpoint(out, epoch, pipe, optimizer, lora):
    """Writes OUT/checkpoint-N under a temporary name, then renames it: a kill at any moment leaves the last good one."""
    final, temporary = out / f"checkpoint-{epoch}", out / f".checkpoint-{epoch}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if lora:
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft import get_peft_model_state_dict
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
            pipe.save_lora_weights(temporary, unet_lora_layers=layers)
        else:
            pipe.save_pretrained(temporary)
        trained = {name: p.detach() for name, p in pipe.unet.named_parameters() if p.requires_grad}
        torch.save({"epoch": epoch, "trained": trained, "optimizer": optimizer.state_dict()}, temporary / "train_state.pt")
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
    for _, older in checkpoints(out)[:-1]:
        (older / "train_state.pt").unlink(missing_ok=True)  # twice the weights' size, and only the newest is resumed
    return final


def draw_curve(out, names):
    """OUT/curve.png of OUT/metrics.jsonl: reward by source, its spread within groups, gradient norm."""
    from matplotlib.figure import Figure
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name in names:
        left.plot(epochs, [row["reward"].get(name, math.nan) for row in rows], label=name)
    left.legend()
    middle.plot(epochs, [row["reward_std"] for row in rows])
    right.plot(epochs, [row["grad_norm"] for row in rows])
    for axis, title in zip((left, middle, right), ("reward (cosine)", "reward's spread within a group", "gradient norm")):
        axis.set(title=title, xlabel="epoch")
    figure.savefig(out / ".curve.png", dpi=100)
    os.replace(out / ".curve.png", out / "curve.png")


# ----------------------------------------------------------------------------- models and ranks

def make_trainable(unet, args):
    """Sets what --lora asks for: fp32 adapters over frozen weights, or all weights; and gradient checkpointing."""
    unet.requires_grad_(not args.lora)
    if args.lora:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig
        torch.manual_seed(args.seed)  # the adapters' start is the only draw from torch's global generator
        unet.add_adapter(LoraConfig(r=args.lora, lora_alpha=args.lora, init_lora_weights="gaussian",
                                    target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        cast_training_params(unet, torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()  # Stable Diffusion's UNet has no dropout; gradient checkpointing asks for train mode


def gather(x, world):
    """[N, ...] of each rank -> [world N, ...] on every rank."""
    if world == 1:
        return x
    dist.all_gather_into_tensor(everyone := x.new_empty(world * len(x), *x.shape[1:]), x.contiguous())
    return everyone


def now(device):
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def evaluate(command, model):
    """Runs --eval's command, {model} replaced by the arguments that follow --model; its failure ends this program too."""
    command = command.replace("{model}", model)
    print(f"\n$ {command}", flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"  # "python" is this one
    torch.cuda.empty_cache()  # the command needs memory too; without a GPU nothing happens
    if code := subprocess.run(command, shell=True, env=environment).returncode:
        sys.exit(f"stopped: --eval's command failed with exit code {code}; checkpoints are untouched")


# ----------------------------------------------------------------------------- the run

def main(args):
    rank, world, device = device_of_rank()
    files, sources, weights = read_sources(args.prompts)
    names = [Path(file).stem for file in files]
    names = names if len(set(names)) == len(names) else files
    safe, unsafe = read_anchors(args.anchors)
    record, start_epoch, checkpoint = open_run(args, [*files, args.anchors])
    path = model_path(args.model, args.subfolder)
    P, G, T = args.prompts_per_epoch, args.generations, args.steps - 1  # groups, images per group, trained timesteps
    if P % world or (P // world * G * T) % args.updates:
        fail(f"--prompts-per-epoch {P} must divide by the {world} ranks, and a rank's pairs, prompts x generations x "
             f"(steps - 1) = {P // world * G * T}, by --updates {args.updates}")
    try:
        scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
        schedule = ddim_schedule(scheduler, args.steps, args.eta, device)
    except (OSError, ValueError) as e:
        fail(f"--model {path}, --steps {args.steps}: no DDIM schedule ({first_line(e)})")
    mine = range(rank * P // world * G, (rank + 1) * P // world * G)  # this rank's samples, by global index in the epoch

    # models: the policy, its frozen companions, the reward
    autocast = torch.bfloat16 if args.precision == "bf16" else None
    pipe = load_pipeline(path, dtype=torch.float32).to(device)
    embedder = Embedder(args.reward, device, autocast)
    unet, vae = pipe.unet, pipe.vae
    vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    if args.lora and autocast:
        unet.bfloat16()  # frozen weights need no fp32 master copy
    reference = copy.deepcopy(unet).requires_grad_(False) if args.kl and args.kl_to == "ref" else None  # the policy's own dtypes
    make_trainable(unet, args)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, (0.9, 0.999), eps=1e-8, weight_decay=args.weight_decay, fused=True)
    if checkpoint:
        state = torch.load(checkpoint / "train_state.pt", map_location=device, weights_only=True)
        unet.load_state_dict(state["trained"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        del state
    for module in (unet, reference) if args.compile else ():  # both: eager and compiled round differently
        if module:
            module.compile()
    policy = torch.nn.parallel.DistributedDataParallel(unet, gradient_as_bucket_view=True) if world > 1 else unet

    size = args.size or unet.config.sample_size * pipe.vae_scale_factor  # pixels
    shape = (unet.config.in_channels, size // pipe.vae_scale_factor, size // pipe.vae_scale_factor)  # a latent's
    gain = (schedule.b.abs() / schedule.sigma)[:T]  # |d mu / d eps| / sigma: how far the UNet's output moves the log-ratio
    gain = gain / gain.mean() if args.even_steps else torch.ones_like(gain)
    v = direction_from(embedder, safe, unsafe)

    def encode(prompts):  # [len(prompts), L, D] for the UNet
        return pipe.encode_prompt(prompts, device, num_images_per_prompt=1, do_classifier_free_guidance=False)[0]

    empty = encode([""])  # [1, L, D], classifier-free guidance's unconditional text

    @torch.no_grad()
    def decode(latents):  # [B, 3, H, W] in [0, 1]
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            images = vae.decode(latents / vae.config.scaling_factor).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def grid(file):  # the same prompts and noise at every save, below the start model's pictures
        never = 2**31  # an epoch that no run reaches
        shown = draw_prompts([len(s) for s in sources], weights, 8, args.seed, never)
        noise = noise_for(args.seed, never, range(8), args.steps, shape).to(device)
        text = encode([sources[s][i] for s, i in shown])
        chunks = [slice(i, i + args.batch) for i in range(0, 8, args.batch)]
        finals = [rollout(unet, schedule, text[c], empty, noise[c], args.guidance, autocast)[0][:, -1] for c in chunks]
        images = torch.cat([decode(x) for x in finals])
        row = (torch.cat(list(images), dim=2).permute(1, 2, 0) * 255).round().byte().cpu().numpy()
        row = row.repeat(max(128 // size, 1), 0).repeat(max(128 // size, 1), 1)  # small pictures are shown enlarged
        start = args.out / "grid-0.png"
        above = [np.asarray(Image.open(start))] if file != start and start.exists() else []
        write(file, Image.fromarray(np.concatenate([*above, row])))

    def save(epochs_done):
        with writing(args.out):
            grid(args.out / f"grid-{epochs_done}.png")
            draw_curve(args.out, names)
            return save_checkpoint(args.out, epochs_done, pipe, optimizer, args.lora)  # last: with it the epoch counts as done

    signals = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))  # spot machines: save and stop

    def asked_to_stop():  # one rank's signal stops all
        return bool(gather(torch.tensor([len(signals)], device=device), world).any())

    if world > 1:
        # every rank has looked at --out before rank 0 writes there
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    if rank == 0:
        with writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
            write(args.out / "args.json", json.dumps(record, indent=1))
            log = args.out / "metrics.jsonl"
            lines = log.read_text().splitlines(True) if log.exists() else []  # a line per epoch
            write(log, "".join(lines[:start_epoch]))  # those after the checkpoint will be written again
            if start_epoch == 0:
                grid(args.out / "grid-0.png")
        pairs = len(mine) * T // args.updates
        print(f"{P} prompts x {G} generations = {P * G} images per epoch on {world} rank(s); {T} of {args.steps} steps trained: "
              f"{len(mine) * T} (sample, timestep) pairs per rank, {args.updates} update(s) of {pairs} in "
              f"{math.ceil(pairs / args.batch)} forward(s) of up to {args.batch}; "
              f"{sum(p.numel() for p in parameters) / 1e6:.2f} M weights; epochs {start_epoch} to {args.epochs}")
        if args.eval and start_epoch == 0:
            evaluate(args.eval, shlex.quote(path))

    done = saved = start_epoch
    bar = tqdm(range(start_epoch, args.epochs), initial=start_epoch, total=args.epochs, desc="epochs", disable=rank > 0)
    for epoch in bar:
        clock = [now(device)]

        # 1. prompts: the UNet sees the original ones, the reward the steered targets; both encoded once per prompt
        chosen = draw_prompts([len(s) for s in sources], weights, P, args.seed, epoch)
        prompts = [sources[s][i] for s, i in chosen]
        here = slice(mine.start // G, mine.stop // G)  # this rank's groups
        text = encode(prompts[here])  # [P / world, L, D]
        z_text = embedder.text(prompts)  # [P, D], of all ranks' prompts for the log
        targets = steered_targets(z_text, v, args.alpha, args.steer)[here]  # [P / world, D]

        # 2. rollout, decode, reward; N = P / world x G samples on this rank
        latents, old_log_probs, rewards = [], [], []
        chunks = torch.arange(len(mine)).split(args.batch)  # positions on this rank; position // G is the group
        for chunk in chunks:
            samples = [mine[i] for i in chunk]  # global indices, which seed the noise
            noise = noise_for(args.seed, epoch, samples, args.steps, shape)
            if args.shared_noise:  # x_T of the group's first sample
                noise[:, 0] = noise_for(args.seed, epoch, [s - s % G for s in samples], 1, shape)[:, 0]
            x, log_probs = rollout(unet, schedule, text[chunk // G], empty, noise.to(device), args.guidance, autocast)
            latents.append(x)
            old_log_probs.append(log_probs)
        latents, old_log_probs = torch.cat(latents), torch.cat(old_log_probs)  # [N, steps + 1, C, H, W], [N, T]
        clock.append(now(device))
        for chunk in chunks:
            rewards.append(reward(embedder, decode(latents[chunk, -1]), targets[chunk // G]))
        rewards = torch.cat(rewards).view(-1, G)  # [P / world, G]
        for name, tensor in (("latents", latents.flatten(1)), ("reward", rewards.view(-1, 1))):
            bad = (~tensor.isfinite().all(1)).nonzero()
            if len(bad):
                sys.exit(f"\nstopped: non-finite {name} in epoch {epoch}, prompt {prompts[here][bad[0].item() // G]!r}; "
                         "checkpoints are untouched")
        clock.append(now(device))
        if asked_to_stop():
            break  # the weights are still those of the last finished epoch

        # 3. advantages: over all ranks, so that one rank and many normalise alike
        rewards = gather(rewards, world)  # [P, G], from here on those of all ranks
        advantages, live = group_advantages(rewards, args.advantage_clip)
        advantages = advantages.flatten()[mine.start:mine.stop]  # [N]
        live_share = max(live.float().mean().item(), 1 / P)  # dead groups add zeros: dividing by this averages over the live ones
        pairs_per_update = P * G * T / args.updates  # over all ranks

        # 4. updates: each over its own (sample, timestep) pairs, gradients summed over micro-batches, all-reduced once
        order = pairs_of_updates(mine, T, args.updates, args.seed, epoch).to(device)
        log_ratios, kls, norms, mismatch = [], [], [], torch.zeros(T, device=device)
        for k in range(args.updates):
            micro_batches = order[k].split(args.batch)
            for m, pairs in enumerate(micro_batches):
                n, j = pairs.unbind(1)  # [B] the sample (its position on this rank), [B] the step
                x, x_prev, cond = latents[n, j], latents[n, j + 1], text[n // G]  # DDIM's "prev": the next one of the rollout
                # DDP decides in the forward whether the backward all-reduces: only that of the last micro-batch does
                with policy.no_sync() if world > 1 and m < len(micro_batches) - 1 else nullcontext():
                    out = predict_noise(policy, x, schedule.t[j], cond, empty, args.guidance, autocast)
                mean = ddim_mean(schedule, j, x, out)
                new = log_prob(x_prev, mean, schedule.sigma[j])
                old = old_log_probs[n, j] if k else new.detach()  # before the first step rho = 1 exactly, even in bf16
                log_ratio = (new - old) / gain[j]
                if reference:  # frozen, and so are its inputs: no graph is kept
                    out = predict_noise(reference, x, schedule.t[j], cond, empty, args.guidance, autocast)
                    kl = kl_gaussian(mean, ddim_mean(schedule, j, x, out), schedule.sigma[j])
                    nats = kl.detach() * x[0].numel()
                else:
                    kl = kl_k3(new - old)
                    nats = ((new - old).detach() * x[0].numel()) ** 2 / 2  # to second order: the summed ratio may overflow
                objective = surrogate(log_ratio, advantages[n], args.clip).sum() / live_share - args.kl * kl.sum()
                (-objective * world / pairs_per_update).backward()  # DDP averages over ranks: with world a global mean
                log_ratios.append(log_ratio.detach())
                kls.append(nats)
                if k == 0:  # rollout against training forward before any step: rounding alone
                    mismatch.scatter_reduce_(0, j, ((new.detach() - old_log_probs[n, j]) / gain[j]).abs(), "amax")
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip)
            if not norm.isfinite():  # before the step: the weights are still good
                last = torch.cat(log_ratios[-len(micro_batches):])  # of this update, in the order of order[k]
                bad = order[k, ~last.isfinite(), 0].tolist()  # samples whose ratio is not finite
                what = f"ratio, prompt {prompts[here][bad[0] // G]!r}" if bad else f"gradient, prompts {prompts[here][0]!r} ..."
                sys.exit(f"\nstopped: non-finite {what} in epoch {epoch}, update {k}; checkpoints are untouched")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            norms.append(norm)
        clock.append(now(device))

        # 5. log, save
        ratio, mismatch = gather(torch.cat(log_ratios), world).exp(), gather(mismatch[None], world).amax(0)
        by_source = {name: [] for name in names}
        for r, (s, _) in zip(rewards.mean(1).tolist(), chosen):  # the mean of each group
            by_source[names[s]].append(r)
        metrics = {
            "epoch": epoch + 1, "reward": {name: sum(r) / len(r) for name, r in by_source.items() if r},
            "reward_std": rewards.std(1, correction=0).mean().item(), "dead_groups": int((~live).sum()),
            "unsafe_prompts": (text_safety(z_text, v) < 0).float().mean().item(),
            "ratio_min": ratio.min().item(), "ratio_mean": ratio.mean().item(), "ratio_max": ratio.max().item(),
            "clip_low": (ratio < 1 - args.clip).float().mean().item(), "clip_high": (ratio > 1 + args.clip).float().mean().item(),
            "on_policy_noise": mismatch.max().item(), "kl": gather(torch.cat(kls), world).mean().item(),
            "grad_norm": torch.stack(norms).mean().item(),
            "seconds": dict(zip(("rollout", "reward", "update"), np.diff(clock).round(3).tolist())),
            "images_per_second": P * G / (clock[-1] - clock[0])}
        done = epoch + 1
        if rank == 0:
            with writing(args.out), open(args.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")
            if epoch == start_epoch:
                by_step = " ".join(f"{t}:{e:.0e}" for t, e in zip(schedule.t.tolist(), mismatch.tolist()))
                bar.write("on-policy |log ratio| by timestep, rollout against training forward "
                          f"(--clip is {args.clip:g}): {by_step}")
            bar.set_postfix({**{n: f"{r:.3f}" for n, r in metrics["reward"].items()}, "dead": metrics["dead_groups"]})
            if done % args.save_every == 0:
                checkpoint, saved = save(done), done
        if asked_to_stop():
            break
    if rank == 0:
        if done > saved:
            checkpoint = save(done)
        if done == args.epochs:
            print(f"{checkpoint} holds {'the adapters' if args.lora else 'a diffusers pipeline'}; curve.png and grid-{done}.png "
                  "(above before, below after) are beside it")
            if args.eval:
                evaluate(args.eval, shlex.join([path, "--lora", str(checkpoint)] if args.lora else [str(checkpoint)]))
        else:
            print(f"stopped by a signal after epoch {done}; continue with --resume")


if __name__ == "__main__":
    arguments = parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # rank 0 may evaluate or save for long while the others wait; torchrun itself ends them when a rank fails
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=3))
    main(arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
