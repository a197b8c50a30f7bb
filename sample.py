"""DDIM sampling with log-probabilities (imported by train.py) and, as a script, a file of prompts -> a folder of images.

    python sample.py --model toy/sd --prompts toy/prompts/test-unsafe.txt --steps 10 --guidance 2 --eta 1 --out out/toy
    python sample.py --model CompVis/stable-diffusion-v1-4 --prompts i2p.csv --out out/i2p       # 4,703 images, row seeds
    torchrun --nproc_per_node 8 sample.py --model runs/r1/checkpoint-300 --prompts evaluation_metadata.jsonl --out out/geneval

The script uses diffusers' own pipeline and any of its schedulers; each image has its own generator, so that it does not
depend on the batch, on the number of GPUs, or on what was already there. A rerun makes only what is missing.
"""
import argparse
import csv
import io
import json
import math
import os
import sys
from collections import namedtuple
from itertools import groupby
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns that torchvision, which nothing here needs, is missing
import numpy as np
import torch
from tqdm import tqdm

# ----------------------------------------------------------------------------- DDIM as a Gaussian policy

Schedule = namedtuple("Schedule", "t a b sigma")  # per step i: timestep, and x_{t-1} ~ N(a x_t + b out, sigma^2 I)


def ddim_schedule(scheduler, steps, eta, device="cpu"):
    """The DDIM step (arXiv 2010.02502, eq. 12 and 16), mu = a x_t + b out, for every step: a Schedule of [steps] tensors.

        x0    = (x_t - sqrt(1 - A_t) eps) / sqrt(A_t)                                  A = scheduler.alphas_cumprod
        sigma = eta sqrt((1 - A_prev) / (1 - A_t)) sqrt(1 - A_t / A_prev)
        mu    = sqrt(A_prev) x0 + sqrt(1 - A_prev - sigma^2) eps                       = a x_t + b eps, with x0 inserted

    With v-prediction (arXiv 2202.00512) x0 = sqrt(A_t) x_t - sqrt(1 - A_t) v and eps = sqrt(A_t) v + sqrt(1 - A_t) x_t.
    Agrees with diffusers' DDIMScheduler.step without its clipping of x0. ValueError for another prediction type.
    """
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.long()
    prev = t - scheduler.config.num_train_timesteps // steps
    A = scheduler.alphas_cumprod.double()
    A_t, A_prev = A[t], torch.where(prev >= 0, A[prev.clamp(min=0)], scheduler.final_alpha_cumprod.double())
    sigma = eta * ((1 - A_prev) / (1 - A_t) * (1 - A_t / A_prev)).sqrt()
    eps_part = (1 - A_prev - sigma**2).clamp(min=0).sqrt()
    if scheduler.config.prediction_type == "epsilon":
        a = (A_prev / A_t).sqrt()
        b = eps_part - a * (1 - A_t).sqrt()
    elif scheduler.config.prediction_type == "v_prediction":
        a = (A_prev * A_t).sqrt() + eps_part * (1 - A_t).sqrt()
        b = eps_part * A_t.sqrt() - (A_prev * (1 - A_t)).sqrt()
    else:
        raise ValueError(f"prediction_type {scheduler.config.prediction_type!r}: this DDIM step knows epsilon and v_prediction")
    return Schedule(t.to(device), *(c.float().to(device) for c in (a, b, sigma)))


def ddim_mean(schedule, i, x, out):
    """mu of the policy's Gaussian at steps i [B] for latents x and UNet outputs out [B, C, H, W], all fp32."""
    return schedule.a[i].view(-1, 1, 1, 1) * x + schedule.b[i].view(-1, 1, 1, 1) * out


def log_prob(x_prev, mean, sigma):
    """log N(x_prev; mean, sigma^2 I) in nats, as the MEAN over the latent's dimensions: [B]. sigma is [B], above 0."""
    sigma = sigma.view(-1, 1, 1, 1)
    return (-((x_prev - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)).mean(dim=(1, 2, 3))


def predict_noise(unet, x, t, text, empty, guidance, autocast=None):
    """The UNet's output with classifier-free guidance, fp32 [B, C, H, W]: the one function for rollout and for training, so
    that the ratio is 1 before an update. x [B, C, H, W], t [B], text [B, L, D], empty [1, L, D]; guidance <= 1 runs no
    unconditional half. autocast: a dtype, or None for the weights' own."""
    guided = guidance > 1
    if guided:
        x, t, text = torch.cat([x, x]), torch.cat([t, t]), torch.cat([empty.expand_as(text), text])  # [2B, ...]
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        out = unet(x, t, encoder_hidden_states=text, return_dict=False)[0]
    if not guided:
        return out.float()
    unconditional, conditional = out.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def noise_for(seed, epoch, samples, count, shape):
    """Standard normal fp32 [len(samples), count, *shape], each sample's from its own (seed, epoch, global sample index)."""
    draw = [np.random.default_rng([seed, epoch, s]).standard_normal((count, *shape), dtype=np.float32) for s in samples]
    return torch.from_numpy(np.stack(draw))


@torch.no_grad()
def rollout(unet, schedule, text, empty, noise, guidance, autocast=None):
    """Samples one DDIM trajectory per row of noise [B, steps, C, H, W] (x_T, then the noise of all steps but the last).

    Returns latents [B, steps + 1, C, H, W], fp32, and log-probs [B, steps - 1]. The last step is taken at its mean, so
    that the image carries no fresh noise; a step without noise has no density and no ratio, and is never trained.
    """
    steps, x = len(schedule.t), noise[:, 0]
    latents, log_probs = [x], []
    for i in range(steps):
        index = torch.full((len(x),), i, device=x.device)
        mean = ddim_mean(schedule, index, x, predict_noise(unet, x, schedule.t[index], text, empty, guidance, autocast))
        x = mean if i == steps - 1 else mean + schedule.sigma[i] * noise[:, i + 1]
        if i < steps - 1:
            log_probs.append(log_prob(x, mean, schedule.sigma[index]))  # scores the very tensor that is stored
        latents.append(x)
    return torch.stack(latents, 1), torch.stack(log_probs, 1)


# ----------------------------------------------------------------------------- files and models

def fail(message):
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check(args, names, fine, mend):
    """fail() where one of the flags (spaces between their names) is given and not fine."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not fine(value):
            fail(f"--{name.replace('_', '-')} {value}: must be {mend}")


def write(path, content):
    """Replaces a file (text or a picture) in one step, so that a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content) if isinstance(content, str) else content.save(temporary, "png")
    os.replace(temporary, path)


def read_rows(path):
    """Prompts of a .txt (one a line), .csv (column prompt) or .jsonl ({"prompt": ...}) file: a list of dicts, each row's own
    columns with "prompt" and "case_number" (the file's, else the row's index) as strings. fail() names the file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{path}: cannot be read as text ({e}); give a .txt, .csv or .jsonl file")
    if Path(path).suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            rows = [dict(row) for row in reader]
        except csv.Error as e:
            fail(f"{path}, line {reader.line_num}: not csv ({e})")
        if "prompt" not in (reader.fieldnames or ()):
            fail(f"{path}: no column 'prompt' among {reader.fieldnames}; rename the prompts' column to 'prompt'")
        if any(row["prompt"] is None for row in rows):
            fail(f"{path}: a row ends before its column 'prompt'")
    elif Path(path).suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.rstrip("\n").split("\n") if text.strip() else [], 1):  # splitlines breaks at U+2028
            try:
                rows.append(json.loads(line))
                assert isinstance(rows[-1]["prompt"], str)
            except (ValueError, KeyError, TypeError, AssertionError):
                fail(f"{path}, line {number}: not a JSON object with a text \"prompt\"")
    else:
        rows = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    if not rows:
        fail(f"{path}: no prompts in it")
    return [{**row, "case_number": str(row.get("case_number", i))} for i, row in enumerate(rows)]


def model_path(model, subfolder=None):
    """The folder or hub id to load; fail() where a local folder is no pipeline. A hub's subfolder is downloaded alone."""
    if subfolder and not Path(model).is_dir():
        from huggingface_hub import snapshot_download
        model = snapshot_download(model, allow_patterns=f"{subfolder}/*")
    path = str(Path(model) / subfolder) if subfolder else model
    looks_local = Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (Path(path) / "model_index.json").is_file():
        fail(f"--model {path}: not a pipeline folder (model_index.json is missing); give a diffusers folder or a hub id")
    return path


def load_pipeline(path, lora=None, **kwargs):
    """StableDiffusionPipeline without safety checker, whose black images would hide what a model draws; with LoRA adapters."""
    import diffusers.utils.logging
    import transformers
    diffusers.utils.logging.set_verbosity_error()  # else it prints what it cuts off long prompts, every time they are drawn
    diffusers.utils.logging.disable_progress_bar()  # "Loading weights" bars would drown the run's own
    transformers.logging.disable_progress_bar()
    try:
        kwargs = {"safety_checker": None, "requires_safety_checker": False, **kwargs}
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(path, **kwargs)
    except Exception as e:  # OSError, ValueError, SafetensorError, ... for what a folder may lack
        fail(f"--model {path}: not readable as a StableDiffusionPipeline ({first_line(e)})")
    try:
        if lora:
            pipe.load_lora_weights(lora)
        return pipe
    except Exception as e:
        fail(f"--lora {lora}: no adapters of this model ({first_line(e)}); give a checkpoint of train.py --lora")


def device_of_rank():
    """(rank, world size, device) from torchrun's variables, or one process."""
    rank, local, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        return rank, world, torch.device("cuda", local)
    return rank, world, torch.device("cpu")


# ----------------------------------------------------------------------------- the script

SCHEDULERS = dict(ddim="DDIMScheduler", ddpm="DDPMScheduler", pndm="PNDMScheduler", lms="LMSDiscreteScheduler",
                  heun="HeunDiscreteScheduler", euler="EulerDiscreteScheduler", euler_a="EulerAncestralDiscreteScheduler",
                  dpm="DPMSolverMultistepScheduler", unipc="UniPCMultistepScheduler")  # any other by its class name


def jobs_of(rows, args):
    """One job per image: (path, prompt, seed, guidance, width, height). A row's own seed, guidance and size (I2P's columns on
    the hub or in evaluation code, or plain ones) come before the flags'; copy k of a row adds k to its seed."""
    def column(row, names, kind, default):
        name = next((n for n in names if row.get(n) not in (None, "")), None)
        try:
            return default if name is None else kind(float(row[name]))  # "512.0" too; a seed of 2^32 - 1 is exact
        except (ValueError, OverflowError, TypeError):
            fail(f"{args.prompts}: case {row['case_number']}: {name} is {row[name]!r}, not a number")
    jobs = []
    for i, row in enumerate(rows):
        if os.path.basename(row["case_number"]) != row["case_number"] or row["case_number"] in ("", ".", ".."):
            fail(f"{args.prompts}: case_number {row['case_number']!r} cannot be used as the file name of its images")
        geneval = "tag" in row and "include" in row
        guidance = column(row, ("evaluation_guidance", "sd_guidance_scale", "guidance"), float, args.guidance)
        width = column(row, ("sd_image_width", "width"), int, args.size)
        height = column(row, ("sd_image_height", "height"), int, args.size)
        for k in range(args.per_prompt or (4 if geneval else 1)):
            seed = column(row, ("evaluation_seed", "sd_seed", "seed"), int, None)
            name = f"{i:05d}/samples/{k:04d}.png" if geneval else f"{row['case_number']}_{k}.png"
            seed = args.seed + len(jobs) if seed is None else seed + k
            if not 0 <= seed < 2**63 or not 0 <= guidance < math.inf:
                fail(f"{args.prompts} / --seed, --guidance: case {row['case_number']} has seed {seed} and guidance {guidance}; "
                     "a seed is from 0 to 2^63 - 1, a guidance scale 0 or more")
            if any(side is not None and (side < 8 or side % 8) for side in (width, height)):
                fail(f"{args.prompts} / --size: {width} x {height} pixels for {name}; sides must be multiples of 8")
            jobs.append((args.out / name, row["prompt"], seed, guidance, width, height))
    return jobs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="CompVis/stable-diffusion-v1-4", help="diffusers pipeline: hub id or folder")
    parser.add_argument("--subfolder", help="folder inside --model that holds the pipeline")
    parser.add_argument("--lora", help="folder with pytorch_lora_weights.safetensors (a checkpoint of train.py --lora)")
    parser.add_argument("--prompts", required=True, help=".txt, .csv or .jsonl (GenEval's metadata gets GenEval's folders)")
    parser.add_argument("--out", required=True, type=Path, help="folder of images: {case_number}_{k}.png")
    parser.add_argument("--per-prompt", type=int, help="images per prompt (default 1; GenEval 4)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=7.5, help="guidance scale, where a row has none of its own")
    parser.add_argument("--scheduler", default="ddim", help=f"{', '.join(SCHEDULERS)}, or a diffusers scheduler class's name")
    parser.add_argument("--eta", type=float, default=0.0, help="DDIM's noise: 0 none, 1 as in training")
    parser.add_argument("--size", type=int, help="pixels, where a row has none of its own (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="image i gets seed + i, where a row has none of its own")
    parser.add_argument("--batch", type=int, default=8, help="images per forward")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="dtype of the weights")
    args = parser.parse_args()

    import diffusers
    check(args, "steps batch per_prompt size", lambda x: x >= 1, "at least 1")
    check(args, "eta", lambda x: 0 <= x <= 1, "from 0 (no noise) to 1 (as in training)")
    rows = read_rows(args.prompts)
    jobs = jobs_of(rows, args)
    if len({job[0] for job in jobs}) < len(jobs):
        fail(f"{args.prompts}: two rows have the same case_number, so their images would have the same name")
    path = model_path(args.model, args.subfolder)

    try:
        scheduler_class = getattr(diffusers, SCHEDULERS.get(args.scheduler, args.scheduler))
        scheduler = scheduler_class.from_pretrained(path, subfolder="scheduler")
        scheduler.set_timesteps(args.steps)
    except Exception as e:  # no such class, a missing package of its, more steps than it has, ...
        fail(f"--scheduler {args.scheduler} with --steps {args.steps}: not for {path} ({first_line(e)}); give one of "
             f"{', '.join(SCHEDULERS)} or the name of a diffusers scheduler class")

    rank, world, device = device_of_rank()
    pipe = load_pipeline(path, args.lora, dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32).to(device)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)

    # Batches are cut before looking at what exists, and drawn whole: a rerun or another number of ranks gives the same bytes.
    def alike(job):  # guidance, width, height
        return [v or 0 for v in job[3:]]
    groups = [list(group) for _, group in groupby(sorted(jobs, key=alike), alike)]
    batches = [group[i:i + args.batch] for group in groups for i in range(0, len(group), args.batch)]
    missing = [b for b in batches[rank::world] if not all(job[0].exists() for job in b)]
    for batch in tqdm(missing, desc=f"sample x{args.batch}", disable=rank > 0):
        paths, prompts, seeds, guidances, widths, heights = zip(*batch)
        images = pipe(list(prompts), num_inference_steps=args.steps, guidance_scale=guidances[0], eta=args.eta, width=widths[0],
                      height=heights[0], generator=[torch.Generator().manual_seed(s) for s in seeds]).images
        for file, image in zip(paths, images):
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                write(file, image)
    for i, row in enumerate(rows):
        if rank == 0 and "tag" in row and "include" in row:
            keep = {k: v for k, v in row.items() if k != "case_number"}
            (args.out / f"{i:05d}").mkdir(parents=True, exist_ok=True)
            (args.out / f"{i:05d}/metadata.jsonl").write_text(json.dumps(keep) + "\n")
