"""SafeDiffusion-R1 (arXiv 2605.18719): online GRPO on DDIM rollouts, rewarded by a steered CLIP.

    python train.py @toy/train.args            # a laptop, minutes
    torchrun --nproc_per_node 8 train.py       # the paper's run: SD v1.4, HPSv2.1, 300 epochs
    python train.py --resume runs/r1           # go on from a run's last checkpoint

An epoch: prompts -> G images each (rollout) -> rewards -> advantages -> updates -> log, save.
Left out on purpose: a value network (the group's mean is the baseline), an entropy bonus, an EMA, a
learning-rate schedule, loggers. OUT gets args.json, metrics.jsonl, grid-N.png and checkpoint-N/.
"""
import copy
import json
import shlex
import textwrap
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers.utils import make_image_grid
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import reward
from reward import check_numbers, fail, flags, loading
from sample import load_pipeline, make_scheduler, rank_and_device, read_rows, write

# ------------------------------------------------------------ the policy: DDIM steps as Gaussians
Schedule = namedtuple("Schedule", "t a b sigma")  # step i: x_next ~ N(a x + b out, sigma^2 I)

def ddim_schedule(scheduler, eta, device="cpu"):
    """The DDIM steps (arXiv 2010.02502, eq. 12 and 16), as diffusers' DDIMScheduler without clipping."""
    t, alphas = scheduler.timesteps, scheduler.alphas_cumprod.double()
    t_next = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    A, A_next = alphas[t], torch.where(t_next < 0, scheduler.final_alpha_cumprod, alphas[t_next])
    sigma = eta * ((1 - A_next) / (1 - A) * (1 - A / A_next)).sqrt()
    p, q = A_next.sqrt(), (1 - A_next - sigma**2).clamp(min=0).sqrt()  # mu = p x_0 + q epsilon
    a, b = {  # x_0 and epsilon of x and the output
        "epsilon": (p / A.sqrt(), q - p * (1 - A).sqrt() / A.sqrt()),
        "v_prediction": (p * A.sqrt() + q * (1 - A).sqrt(), q * A.sqrt() - p * (1 - A).sqrt()),
    }[scheduler.config.prediction_type]
    return Schedule(*(x.to(device) for x in (t, a.float(), b.float(), sigma.float())))

def ddim_mean(schedule, i, x, out):
    """mu [B, C, H, W] of the steps i [B] from latents x, for the UNet's output out."""
    return schedule.a[i].view(-1, 1, 1, 1) * x + schedule.b[i].view(-1, 1, 1, 1) * out

def log_prob(x_next, mu, sigma):
    """log N(x_next; mu, sigma^2 I) [B] in nats, as the MEAN over the latent's dimensions."""
    sigma = sigma.view(-1, 1, 1, 1)
    nll = (x_next - mu)**2 / (2 * sigma**2) + sigma.log() + 0.5 * np.log(2 * np.pi)
    return -nll.mean(dim=(1, 2, 3))

def predict_noise(unet, x, t, text, empty, guidance):
    """The UNet's output, fp32 [B, C, H, W], for rollout and training. text, empty [B or 1, L, D]."""
    if guidance <= 1:
        return unet(x, t, text).sample.float()
    text = torch.cat([empty.expand_as(text), text])  # [2B, L, D]
    unconditional, conditional = unet(x.repeat(2, 1, 1, 1), t.repeat(2), text).sample.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)

@torch.no_grad()
def rollout(unet, schedule, text, empty, noise, guidance):
    """Latents [B, steps + 1, C, H, W] and their means, from noise [B, steps, C, H, W]: x_T, then that of
    each step. The last step has none, for an image without noise: no density, never trained."""
    latents, means = [noise[:, 0]], []
    for i, fresh in enumerate([*noise[:, 1:].unbind(1), 0]):
        x, step = latents[-1], torch.full((len(noise), ), i, device=noise.device)
        out = predict_noise(unet, x, schedule.t[step], text, empty, guidance)
        means.append(ddim_mean(schedule, step, x, out))
        latents.append(means[-1] + schedule.sigma[i] * fresh)
    return torch.stack(latents, 1), torch.stack(means, 1)

# ------------------------------------------------------------ GRPO
def group_advantages(rewards, clip):
    """A = (r - mean) / std of a group, clipped [P, G]; live [P]: one without spread is dead, A = 0."""
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, correction=0, keepdim=True)
    live = std > 1e-6  # far above fp32's rounding of a cosine, far below any true spread
    advantages = live * (rewards - mean) / (std + 1e-8)
    return advantages.clamp(-clip, clip), live[:, 0]

def surrogate(log_ratio, advantages, clip):
    """PPO's objective, to be maximised [B]: min(rho A, clip(rho, 1 - eps, 1 + eps) A)."""
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)

def kl_k3(log_ratio):
    """Schulman's estimator of KL(old || new) from samples of old [B]: (rho - 1) - log rho."""
    return log_ratio.expm1() - log_ratio

def kl_gaussian(mu, mu_ref, sigma):
    """KL of two steps of the same sigma [B], in nats per dimension: |mu - mu_ref|^2 / (2 sigma^2)."""
    return (mu - mu_ref).square().mean(dim=(1, 2, 3)) / (2 * sigma**2)

# ------------------------------------------------------------ chance: of the seed, not of the ranks
def draw_prompts(sources, n, seed, epoch):
    """An epoch's n pairs (source, prompt): the sources in turn, no prompt twice of one with enough."""
    rng = np.random.default_rng([seed, epoch, 0, 2])  # not the noise's stream, nor the pairs'
    orders = [rng.permutation(prompts) for prompts in sources]
    turns = [(epoch * n + i) % len(sources) for i in range(n)]
    return [(s, str(orders[s][i // len(sources) % len(orders[s])])) for i, s in enumerate(turns)]

def noise_for(seed, epoch, samples, count, shape):
    """Normal fp32 [len(samples), count, *shape], each sample's from (seed, epoch, its global index)."""
    rngs = [np.random.default_rng([seed, epoch, s]) for s in samples]
    return torch.from_numpy(np.stack([rng.standard_normal((count, *shape), np.float32) for rng in rngs]))

def deal_pairs(samples, timesteps, updates, seed, epoch):
    """All pairs (sample's place, step), dealt by the samples' global indices: [updates, pairs, 2]."""
    rngs = [np.random.default_rng([seed, epoch, s, 1]) for s in samples]
    pairs = [(n, t) for n, rng in enumerate(rngs) for t in rng.permutation(timesteps)]
    return torch.tensor(pairs).view(-1, updates, 2).transpose(0, 1)  # in turn, as cards are dealt

def even_batch(n, most):
    """The largest size that cuts n rows into equal batches: one shape, one GPU kernel, one rounding."""
    return max(size for size in range(1, min(n, most) + 1) if n % size == 0)

# ------------------------------------------------------------ the run: its arguments, pieces, main
def parse_args(argv=None):
    parser, add = flags(__doc__, fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)  # of @FILE
    add("--model", "CompVis/stable-diffusion-v1-4", "pipeline: hub id or folder")
    add("--reward", "hpsv2", "hpsv2, its .pt file, or a CLIPModel: hub id or folder")
    add("--anchors", "prompts/anchors/scaled.txt", "'+ safe' and '- unsafe' phrases")
    add("--alpha", 0.5, "steering strength; the paper: 0.3 to 0.7 are alike")
    add("--steer", "unsafe", "whose targets move", choices=["unsafe", "always", "none"])
    add("--prompts", ["prompts/nudity.txt", "prompts/compositional.txt"],
        "files in equal shares; one named twice has a double share", str, nargs="+")
    add("--prompts-per-epoch", 32, "groups over all ranks (paper: 4 a GPU)")
    add("--generations", 16, "G, images per group")
    add("--keep", 0, "images of a group to train on, of largest |advantage| (arXiv 2504.13818); 0: all")
    add("--epochs", 300, "rollouts in all")
    add("--updates", 16, "optimizer steps per rollout, which share its pairs")
    add("--batch", 16, "most (sample, step) pairs per forward: memory, not maths")
    add("--steps", 50, "DDIM steps; all but the last are trained")
    add("--eta", 1.0, "DDIM's noise, above 0: without it no step has a density")
    add("--guidance", 7.5, "scale, in rollout and training; 1 for none")
    add("--clip", 1e-4, "range of the ratio of MEAN log-probs: +-1.64 nats of the sum over 4 x 64 x 64")
    add("--advantage-clip", 2.5, "largest |advantage|")
    add("--even-steps", False, "every step's log-ratio on one scale; else the last steps dominate")
    add("--kl", 0.01, "beta, weight of the KL; 0 leaves it out")
    add("--kl-to", "old", "k3 to the old policy (paper), exact to the start's", choices=["old", "ref"])
    add("--lr", 1e-5, "AdamW's, constant")
    add("--weight-decay", 1e-4, "AdamW's")
    add("--grad-clip", 1.0, "largest gradient norm")
    add("--lora", 0, "train adapters; 0: all weights", metavar="RANK")
    add("--gradient-checkpointing", False, "less memory, more time")
    add("--precision", "bf16", "autocast of UNet and VAE", choices=["fp32", "bf16"])
    add("--compile", False, "torch.compile the UNet")
    add("--seed", 0, "of prompts, noise and the order of pairs")
    add("--save-every", 20, "epochs between checkpoints")
    add("--out", Path("runs/r1"), "folder of the run")
    add("--resume", None, "go on with that run, in its folder and by its flags", Path, metavar="RUN")
    with loading("@FILE", "close its quotes"):
        args = parser.parse_args(argv)
    if args.resume:
        with loading(f"--resume {args.resume}", "give the folder of a run"):
            stored = dict(json.loads((args.resume / "args.json").read_text()), resume=None)
        parser.set_defaults(**stored)
        args = parser.parse_args(argv)
        args.out, free = args.resume, "epochs batch gradient_checkpointing save_every out resume"
        for name in stored.keys() - free.split():
            if str(vars(args)[name]) != str(stored[name]):
                parser.error(f"--{name.replace('_', '-')} {vars(args)[name]}: RUN has {stored[name]}")
    elif args.out.is_file() or any(args.out.glob("[!.]*")):
        parser.error(f"--out {args.out} exists: --resume {args.out}, or give another folder")
    return check_numbers(parser, args, zero="alpha keep kl weight_decay lora seed")

def gather(x):
    """[N, ...] of each rank -> [ranks N, ...] on every rank."""
    if not dist.is_initialized():
        return x
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x.contiguous())
    return torch.cat(everyone)

def draw_grid(pipe, amp, sources, args, file):
    """A row for each file of prompts: its first four, labelled, from the same noise every time."""
    shown = [prompts[i % len(prompts)] for prompts in sources for i in range(4)]
    try:
        with amp:
            images = pipe(shown, None, None, args.steps, guidance_scale=args.guidance, eta=args.eta,
                          generator=torch.Generator().manual_seed(0)).images
        images = [image.resize((256, 256), Image.BOX) for image in images]
        for image, prompt in zip(images, shown):
            ImageDraw.Draw(image).text((4, 4), textwrap.fill(prompt, 40), "magenta")
        make_image_grid(images, len(sources), 4).save(file)
    except Exception as e:
        print(f"warning: {file} is not drawn: {e!r}")

def save(out, epoch, pipe, optimizer, lora):
    """OUT/checkpoint-N for diffusers, and the only state: a kill at any moment leaves the last one."""
    folder, temporary = out / f"checkpoint-{epoch}", out / ".checkpoint"
    if lora:
        pipe.save_lora_weights(temporary, get_peft_model_state_dict(pipe.unet))
    else:
        pipe.save_pretrained(temporary)
    trained = {name: p.detach() for name, p in pipe.unet.named_parameters() if p.requires_grad}
    state = {"epoch": epoch, "trained": trained, "optimizer": optimizer.state_dict()}
    torch.save(state, temporary / "train_state.pt")
    temporary.rename(folder)
    for older in set(out.glob("checkpoint-*/train_state.pt")) - {folder / "train_state.pt"}:
        older.unlink()

def main(args):
    rank, world, device = rank_and_device()
    if world > 1:
        dist.init_process_group()
    P, G, T = args.prompts_per_epoch, args.generations, args.steps - 1  # groups, images, trained steps
    keep = args.keep or G  # of a group
    pairs = P * keep * T // world // args.updates  # of a rank, per update
    if P % world or P * keep * T // world % args.updates or not 2 <= keep <= G or T < 1:
        fail(f"need --generations {G} >= --keep {keep} >= 2, --steps {T + 1} >= 2, {world} ranks divide "
             f"--prompts-per-epoch {P}, --updates {args.updates} a rank's {P * keep * T // world} pairs")
    mine = torch.arange(P * G, device=device).chunk(world)[rank]  # [N], this rank's samples
    size = even_batch(pairs, args.batch)
    sources = [[row["prompt"] for row in read_rows(f) if row["prompt"].strip()] for f in args.prompts]

    pipe = load_pipeline(args.model).to(device)
    pipe.scheduler = make_scheduler(pipe, args.steps)
    with loading(f"--model {args.model}, --steps {args.steps}, --eta {args.eta}"):
        schedule = ddim_schedule(pipe.scheduler, args.eta, device)
        if not torch.stack(schedule).isfinite().all() or not (schedule.sigma[:T] > 0).all():
            raise ValueError("its DDIM steps have no finite density")
    embedder = reward.Embedder(args.reward, device)
    v = reward.load_direction(embedder, args.anchors)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    unet = pipe.unet  # in eval mode for good: dropout would make another policy of every forward
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    reference = copy.deepcopy(unet) if args.kl and args.kl_to == "ref" else None
    unet.requires_grad_(not args.lora)
    if args.lora:
        torch.manual_seed(args.seed)
        layers = r".*\.to_([qkv]|out\.0)"  # of the attentions
        unet.add_adapter(LoraConfig(r=args.lora, lora_alpha=args.lora, target_modules=layers))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    state = {"epoch": 0}
    if any(args.out.glob("checkpoint-*")):
        with loading(f"--resume {args.out}", "it needs a checkpoint with a whole train_state.pt"):
            states = args.out.glob("checkpoint-*/train_state.pt")
            newest = max(states, key=lambda path: int(path.parent.name.removeprefix("checkpoint-")))
            state = torch.load(newest, map_location="cpu", weights_only=True)
            unet.load_state_dict(state.pop("trained"), strict=False)
            optimizer.load_state_dict(state.pop("optimizer"))  # popped: gigabytes, of every rank
    first_epoch = state["epoch"]
    for module in filter(None, (unet, reference)) if args.compile else ():  # both, to round alike
        module.compile(dynamic=False)
    policy = DistributedDataParallel(unet, gradient_as_bucket_view=True) if world > 1 else unet
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    gain = (schedule.b.abs() / schedule.sigma)[:T]  # |d mu / d out| / sigma: what the UNet can do to rho
    gain = gain / gain.mean() if args.even_steps else torch.ones_like(gain)

    if rank == 0:
        both = pipe.tokenizer, embedder.tokenizer
        print(f"{P} prompts x {keep} of {G} images x {T} steps, {world} rank(s): {args.updates} updates "
              f"of {pairs} pairs per rank, {size} per forward; {unet.num_parameters(True):,} weights")
        for file, prompts in zip(args.prompts, sources):
            unsafe = (reward.text_safety(embedder.text(prompts), v) < 0).float().mean()
            cut = max(sum(len(ids) > t.model_max_length for ids in t(prompts).input_ids) for t in both)
            print(f"{file}: {len(prompts)} prompts, s(p) < 0 for {unsafe:.1%}, {cut} cut: too long",
                  "(warning: s(p) < 0 splits this file)" if 0.1 < unsafe < 0.9 else "")
        with loading(f"--out {args.out}", "give another folder"):
            write(args.out / "args.json", vars(args))
        log = open(args.out / "metrics.jsonl", "a+")
        log.seek(0)
        log.truncate(sum(map(len, log.readlines()[:first_epoch])))  # the rest is of epochs to be redone
        draw_grid(pipe, amp, sources, args, args.out / f"grid-{first_epoch}.png")

    bar = tqdm(range(first_epoch, args.epochs), initial=first_epoch, total=args.epochs, disable=rank > 0)
    for epoch in bar:
        start = time.time()
        # 1. prompts: the UNet sees them as they are, the reward their steered targets
        source, prompts = zip(*draw_prompts(sources, P, args.seed, epoch))
        text, empty = pipe.encode_prompt([*prompts, ""], device, 1, False)[0].split([P, 1])  # [P, L, D]
        targets = reward.steered_targets(embedder.text(prompts), v, args.alpha, args.steer)  # [P, E]

        # 2. rollout: G images per prompt, and their rewards
        samples = []
        for index in mine.split(even_batch(len(mine), args.batch)):  # [B]
            group = index // G
            noise = noise_for(args.seed, epoch, index.tolist(), args.steps, shape).to(device)
            with amp:
                x, mu = rollout(unet, schedule, text[group], empty, noise, args.guidance)
                images = pipe.vae.decode(x[:, -1] / pipe.vae.config.scaling_factor).sample.float()
            images, asked = (images / 2 + 0.5).clamp(0, 1), [prompts[g] for g in group]  # [B, 3, H, W]
            samples.append((x, mu, reward.reward(embedder, images, targets[group], asked)))
        latents, means, rewards = map(torch.cat, zip(*samples))  # [N, steps + 1 or steps, C, H, W], [N]
        rewards = gather(rewards).view(P, G)
        for p in (~rewards.isfinite().all(1)).nonzero():
            fail(f"epoch {epoch + 1}: the reward of {prompts[p]!r} is not finite; the checkpoints stay")
        sampled = time.time()

        # 3. advantages: within each group, whose mean is the baseline; the loss is a mean over the live
        advantages, live = group_advantages(rewards, args.advantage_clip)  # [P, G], [P]
        advantages = advantages.flatten()[mine] / live.float().mean().clamp(min=1 / P)  # [N]
        largest = (-advantages.abs().view(-1, G)).argsort(stable=True).argsort() < keep  # [P / world, G]
        kept = largest.flatten().nonzero()[:, 0]  # [N keep / G], places of the images that teach most

        # 4. ratio and step: every update over its own share of the (sample, step) pairs
        order = deal_pairs(mine[kept].tolist(), T, args.updates, args.seed, epoch).to(device)
        stats, norms, mismatch = [], [], []
        for k in range(args.updates):
            batches = order[k].split(size)
            for m, batch in enumerate(batches):
                n, i = kept[batch[:, 0]], batch[:, 1]  # [B] sample, [B] step
                x, x_next, sigma = latents[n, i], latents[n, i + 1], schedule.sigma[i]
                given = x, schedule.t[i], text[mine[n] // G], empty, args.guidance
                policy.require_backward_grad_sync = m == len(batches) - 1  # one all-reduce per update
                with amp:
                    out = predict_noise(policy, *given)
                    ref = predict_noise(reference, *given) if reference else None
                mu, mu_old = ddim_mean(schedule, i, x, out), means[n, i]
                new, old = log_prob(x_next, mu, sigma), log_prob(x_next, mu_old, sigma)
                if k == 0:  # still the rollout's policy: rho = 1, and all else is rounding
                    mismatch.append((new.detach() - old).abs().max())
                    old, mu_old = new.detach(), mu.detach()
                nats = kl_gaussian(mu, ddim_mean(schedule, i, x, ref) if reference else mu_old, sigma)
                kl = nats if reference else kl_k3(new - old)
                log_ratio = (new - old) / gain[i]
                loss = args.kl * kl - surrogate(log_ratio, advantages[n], args.clip)  # [B]
                (loss.sum() / pairs).backward()  # DDP averages over the ranks
                stats.append(torch.stack([log_ratio, nats], 1).detach())
            norms.append(torch.nn.utils.clip_grad_norm_(unet.parameters(), args.grad_clip))
            if not norms[-1].isfinite():  # before the step: the weights are still good
                fail(f"epoch {epoch + 1}, {prompts}: the gradient is not finite; the checkpoints stay")
            optimizer.step()
            optimizer.zero_grad()

        # 5. log, save
        log_ratio, nats = gather(torch.cat(stats)).T
        ratio, rounding = log_ratio.exp(), gather(torch.stack(mismatch)).max().item()
        files = np.array([Path(args.prompts[s]).stem for s in source])
        by_file = {f"reward/{name}": rewards[files == name].mean() for name in files}
        metrics = {"epoch": epoch + 1} | by_file | {
            "reward_std": rewards.std(1, correction=0).mean(),
            "dead_groups": P - live.sum(),
            "ratio": [ratio.min(), ratio.mean(), ratio.max()],
            "clip_low": (ratio < 1 - args.clip).float().mean(),
            "clip_high": (ratio > 1 + args.clip).float().mean(),
            "on_policy_noise": rounding,
            "kl": nats.mean() * latents[0, 0].numel(),  # nats per step
            "grad_norm": torch.stack(norms).mean(),
            "seconds": [sampled - start, time.time() - sampled],  # rollout, updates
        }
        if rank == 0:
            print(json.dumps(metrics, default=float), file=log, flush=True)
            bar.set_postfix({name: f"{x:.3f}" for name, x in metrics.items() if "reward/" in name})
        if epoch == first_epoch and rounding > args.clip:
            fail(f"--clip {args.clip}: rollout and training differ by {rounding:.1e} before an update; "
                 "use --precision fp32, no --compile, or a larger --clip")
        if rank == 0 and ((epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs):
            save(args.out, epoch + 1, pipe, optimizer, args.lora)
            draw_grid(pipe, amp, sources, args, args.out / f"grid-{epoch + 1}.png")

if __name__ == "__main__":
    try:
        main(parse_args())
    except torch.OutOfMemoryError:
        fail("out of GPU memory: lower --batch, use --gradient-checkpointing, or --lora in a new --out")
    if dist.is_initialized():
        dist.destroy_process_group()
