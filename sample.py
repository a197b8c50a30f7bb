"""A file of prompts -> a folder of images {case_number}_{k}.png, by diffusers' own pipeline.

    python sample.py --model toy/sd --prompts toy/prompts/test-unsafe.txt --steps 10 --out out/toy
    python sample.py --prompts i2p.csv --out out/i2p              # SD v1.4, each row's own seed
    torchrun --nproc_per_node 8 sample.py --model runs/r1/checkpoint-300 --prompts i2p.csv --out out/r1

Each image has its own generator: neither the batch nor the number of GPUs matters. A rerun makes what is
missing. OUT/settings.json says how the images were made; other settings need another folder.
"""
import argparse
import csv
import io
import json
import os
from hashlib import sha256
from pathlib import Path

import diffusers
import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPTextModel

from reward import Help, check_numbers, fail, loading, strictly

diffusers.utils.logging.set_verbosity_error()  # else it prints each over-long prompt, again and again
diffusers.utils.logging.disable_progress_bar()

def read_rows(path, column="prompt"):
    """The rows of a .txt (a prompt a line), .csv or .jsonl file: dicts of its columns, with "prompt" and
    "case_number" (the row's index, where the file has none) as texts."""
    with loading(path, f"give a .txt, or a .csv or .jsonl whose prompts are its {column!r}"):
        text, kind = Path(path).read_text("utf-8-sig"), Path(path).suffix.lower()
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        rows = {
            ".txt": lambda: [{column: line} for line in lines],
            ".csv": lambda: csv.DictReader(io.StringIO(text, newline=""), strict=True),
            ".jsonl": lambda: map(json.loads, lines)
        }[kind]()
        rows = [{"case_number": i, **row, "prompt": row[column]} for i, row in enumerate(rows)]
        for row in rows:
            row["case_number"] = str(row["case_number"])
            row["prompt"].encode()  # a text, without lone surrogates
        if not rows:
            raise ValueError("it has no prompts")
    return rows

def load_pipeline(model, lora=None, dtype=torch.float32):
    """A StableDiffusionPipeline without safety checker, whose black images would hide what it draws."""
    classes = [diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, CLIPTextModel]
    with loading(f"--model {model}", "give the hub id or folder of a Stable Diffusion 1.x or 2.x"):
        parts = {
            name: strictly(cls, model, subfolder=name, dtype=dtype)
            for name, cls in zip(("unet", "vae", "text_encoder"), classes)
        }
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None,
                                                                 requires_safety_checker=False, **parts)
        unet, vae = pipe.unet.config, pipe.vae.config
        alike = unet.in_channels == unet.out_channels == vae.latent_channels
        if not alike or unet.addition_embed_type:
            raise ValueError("its UNet takes more than noise and one text, as for inpainting or SDXL")
    pipe.set_progress_bar_config(disable=True)
    if lora:
        with loading(f"--lora {lora}", "give a checkpoint of train.py --lora on this model"):
            pipe.load_lora_weights(lora)
            adapters = [w for name, w in pipe.unet.named_parameters() if "lora" in name]
            fit = len(adapters) == len(pipe.lora_state_dict(lora)[0])
            if not fit or not all(w.isfinite().all() for w in adapters):
                raise ValueError("some of its weights fit no layer, or are not finite")
    return pipe

def make_scheduler(pipe, steps, name="DDIMScheduler"):
    """A scheduler with the pipeline's noise schedule. It never clips x0, as training does not."""
    with loading(f"--steps {steps}, {name}", "give other steps, or another scheduler or model"):
        scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, clip_sample=False)
        scheduler.set_timesteps(steps)
        t, last = scheduler.timesteps, scheduler.config.num_train_timesteps - 1
        if t.min() < 0 or t.max() > last or len(t) < steps or scheduler.config.get("thresholding"):
            raise ValueError(f"{len(t)} timesteps from {t.max()} to {t.min()}, or thresholding of x0")
    return scheduler

def rank_and_device():
    """(rank, number of ranks, device), from torchrun's variables or of one process."""
    rank, local, world = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return rank, max(world, 1), device

def write(path, text):
    """Replaces a file in one step: a kill leaves the old one or the new one, whatever ranks write it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.rename(path)

def own(row, default, *columns):
    """A row's own value, of the first of these columns that it fills, as text."""
    return next((str(row[name]) for name in columns if row.get(name) not in (None, "")), default)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", default="CompVis/stable-diffusion-v1-4", help="pipeline: hub id or folder")
    add("--lora", help="a checkpoint of train.py --lora: adapters of that model")
    add("--prompts", required=True, help=".txt, .csv or .jsonl file")
    add("--column", default="prompt", help="of the prompts, in a .csv or .jsonl")
    add("--out", required=True, type=Path, help="folder of images")
    add("--per-prompt", type=int, default=1, help="images per prompt (GenEval: 4)")
    add("--steps", type=int, default=50, help="denoising steps")
    add("--guidance", type=float, default=7.5, help="where a row has none of its own")
    add("--scheduler", default="DDIMScheduler",
        choices=diffusers.schedulers.KarrasDiffusionSchedulers.__members__, metavar="CLASS",
        help="of diffusers: DDIMScheduler, LMSDiscreteScheduler, ...")
    add("--eta", type=float, default=0.0, help="DDIM's noise: 0 none, 1 as in training")
    add("--seed", type=int, default=0, help="of the first image, where a row has none of its own")
    add("--batch", type=int, default=8, help="images per forward")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the weights")
    args = parser.parse_args()
    check_numbers(parser, args, zero="guidance eta seed")
    jobs = {}  # file name: guidance, width, height, seed, prompt
    for i, row in enumerate(read_rows(args.prompts, args.column)):
        case = row["case_number"]
        with loading(f"{args.prompts}, case {case}, --seed or --guidance", "mend that row"):
            seed = int(own(row, args.seed + i * args.per_prompt, "evaluation_seed", "sd_seed"))
            guidance = float(own(row, args.guidance, "evaluation_guidance", "sd_guidance_scale"))
            width, height = (int(own(row, 0, f"sd_image_{side}")) for side in ("width", "height"))
            if not (0 <= seed < 2**62 and 0 <= guidance < 1e6 and width >= 0 == width % 8
                    and height >= 0 == height % 8):
                raise ValueError(
                    f"seed {seed}, guidance {guidance} or size {width} x {height} is out of range")
            named = Path(case).name == case and case.isprintable() and len(case) < 200
            if f"{case}_0.png" in jobs or not named:
                raise ValueError("its case_number is not a file name of its own")
        for k in range(args.per_prompt):
            jobs[f"{case}_{k}.png"] = guidance, width, height, seed + k, row["prompt"]

    settings = {name: x for name, x in vars(args).items() if name not in ("out", "batch")}
    settings["sha256"] = sha256(Path(args.prompts).read_bytes()).hexdigest()
    record = args.out / "settings.json"
    with loading(f"--out {args.out}", "give another folder"):
        made = json.loads(record.read_text()) if record.exists() else None
        if made != settings and args.out.exists() and {*args.out.iterdir()} - {record}:
            raise ValueError("what is there was made with other settings or prompts")

    rank, world, device = rank_and_device()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    pipe = load_pipeline(args.model, args.lora, dtype).to(device)
    pipe.scheduler = make_scheduler(pipe, args.steps, args.scheduler)
    args.out.mkdir(parents=True, exist_ok=True)
    write(record, json.dumps(settings, indent=1))

    groups = {}  # that share guidance and size, cut before looking at what is there: the same bytes
    for name in jobs:
        groups.setdefault(jobs[name][:3], []).append(name)
    batches = [
        group[i:i + args.batch] for group in groups.values() for i in range(0, len(group), args.batch)
    ]
    for names in tqdm(batches[rank::world], "sample", disable=rank > 0):
        if all((args.out / name).exists() for name in names):
            continue
        guidances, widths, heights, seeds, prompts = zip(*map(jobs.get, names))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(list(prompts), heights[0] or None, widths[0] or None, args.steps, eta=args.eta,
                      guidance_scale=guidances[0], generator=generators, output_type="np").images
        if not np.isfinite(images).all():
            fail(f"--model, --lora or --guidance: the images of {names} are not finite")
        for name, image in zip(names, pipe.numpy_to_pil(images)):
            image.save(args.out / f".{name}")
            (args.out / f".{name}").rename(args.out / name)  # a kill leaves no half picture
