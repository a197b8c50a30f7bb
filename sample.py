"""A file of prompts -> a folder of images {case_number}_{k}.png, by diffusers' own pipeline.

    python sample.py --model toy/sd --prompts toy/prompts/test-unsafe.txt --steps 8 --out out/toy
    python sample.py --prompts i2p.csv --out out/i2p              # SD v1.4, each row's own seed
    torchrun --nproc_per_node 8 sample.py --model runs/r1/checkpoint-300 --prompts i2p.csv --out out/r1
Each image has its own generator; a rerun makes what is missing, by the settings in OUT/settings.json.
"""
import csv
import json
import os
import re
from hashlib import sha256
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextModel

from reward import check_numbers, fail, flags, loading, strictly

diffusers.utils.logging.set_verbosity_error()  # else it prints each over-long prompt, again and again
diffusers.utils.logging.disable_progress_bar()

def read_rows(path, column="prompt"):
    """The rows of a .txt (a prompt a line), .csv or .jsonl, with texts "prompt" and "case_number"."""
    mend = f"give a .txt, or a .csv or .jsonl whose prompts are its {column!r}"
    with loading(path, mend), open(path, encoding="utf-8-sig", newline="") as file:
        lines = filter(str.strip, file)
        kinds = {".txt": ({column: line.strip()} for line in lines), ".jsonl": map(json.loads, lines)}
        kinds[".csv"] = csv.DictReader(file, strict=True)
        rows = [{"case_number": i} | row for i, row in enumerate(kinds[Path(path).suffix.lower()])]
        rows = [r | {"prompt": r[column], "case_number": str(r["case_number"])} for r in rows]
        cases = {r["case_number"] for r in rows}
        if len(cases) < len(rows) or not all(re.fullmatch(r"\w[\w.-]{,199}", c, re.A) for c in cases):
            raise ValueError("a case_number is no file name of its own")
        if not "".join(row["prompt"] for row in rows).strip().encode():  # texts, no lone surrogates
            raise ValueError("it has no prompts")
    return rows

def load_pipeline(model, lora=None, dtype=torch.float32):
    """A StableDiffusionPipeline without safety checker, whose black images would hide what it draws."""
    parts = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)
    with loading(f"--model {model}", "give the hub id or folder of a Stable Diffusion 1.x or 2.x"):
        parts = {part: strictly(cls, model, subfolder=part, dtype=dtype) for part, cls in parts.items()}
        pipe = StableDiffusionPipeline.from_pretrained(model, **parts, safety_checker=None)
        unet, latents = pipe.unet.config, pipe.vae.config.latent_channels
        if {unet.in_channels, unet.out_channels} != {latents} or unet.addition_embed_type:
            raise ValueError("its UNet takes more than noise and one text, as for inpainting or SDXL")
    pipe.set_progress_bar_config(disable=True)
    if lora:
        with loading(f"--lora {lora}", "give a checkpoint of train.py --lora on this model"):
            pipe.load_lora_weights(lora)
            fit = [w for n, w in pipe.unet.named_parameters() if "lora" in n and w.isfinite().all()]
            if len(fit) != len(pipe.lora_state_dict(lora)[0]):
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
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return rank, int(os.environ.get("WORLD_SIZE", 1)), device

def write(path, x):
    """x as JSON, in one step: a kill leaves the old file or the new one, whatever ranks write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.environ.get('RANK', os.getpid())}")
    temporary.write_text(json.dumps(x, default=str, indent=1, allow_nan=False))
    temporary.rename(path)

if __name__ == "__main__":
    parser, add = flags(__doc__)
    add("--model", "CompVis/stable-diffusion-v1-4", "pipeline: hub id or folder")
    add("--lora", None, "a checkpoint of train.py --lora: adapters of that model", str)
    add("--prompts", None, ".txt, .csv or .jsonl file", str, required=True)
    add("--column", "prompt", "of the prompts, in a .csv or .jsonl")
    add("--out", None, "folder of images", Path, required=True)
    add("--per-prompt", 1, "images per prompt (GenEval: 4)")
    add("--steps", 50, "denoising steps")
    add("--guidance", 7.5, "where a row has none of its own")
    add("--scheduler", "DDIMScheduler", "of diffusers, as LMSDiscreteScheduler", metavar="CLASS",
        choices=diffusers.schedulers.KarrasDiffusionSchedulers.__members__)
    add("--eta", 0.0, "DDIM's noise: 0 none, 1 as in training")
    add("--seed", 0, "of the first image, where a row has none of its own")
    add("--batch", 8, "images per forward")
    add("--precision", "fp32", "of the weights", choices=["fp32", "bf16"])
    args = check_numbers(parser, parser.parse_args(), zero="guidance eta seed")
    groups = {}  # {(guidance, height, width): [(seed, prompt, file), ...]}
    for i, row in enumerate(read_rows(args.prompts, args.column)):
        own = {name: str(x) for name, x in row.items() if x not in (None, "")}
        own = {re.sub("sd_|evaluation_|_scale", "", name): x for name, x in own.items()}
        with loading(f"{args.prompts}, case {row['case_number']}, --seed or --guidance", "mend it"):
            seed = int(own.get("seed", args.seed + i * args.per_prompt))
            guidance = float(own.get("guidance", args.guidance))
            size = int(own.get("image_height", 0)), int(own.get("image_width", 0))  # 0: the model's own
            if not (0 <= seed < 2**62 and 0 <= guidance < 1e6 and min(size) >= 0 == sum(size) % 8):
                raise ValueError("its seed, guidance or size is out of range")
        jobs = groups.setdefault((guidance, *size), [])
        files = [f"{row['case_number']}_{k}.png" for k in range(args.per_prompt)]
        jobs += [(seed + k, row["prompt"], file) for k, file in enumerate(files)]

    prompts = sha256(Path(args.prompts).read_bytes()).hexdigest()
    settings = vars(args) | {"prompts": prompts, "batch": None, "out": None}
    record = args.out / "settings.json"
    rank, world, device = rank_and_device()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    pipe = load_pipeline(args.model, args.lora, dtype).to(device)
    pipe.scheduler = make_scheduler(pipe, args.steps, args.scheduler)
    with loading(f"--out {args.out}", "give another folder"):
        if {*args.out.glob("[!.]*")} - {record} and json.loads(record.read_text()) != settings:
            raise ValueError("what is there was made with other settings or prompts")
        write(record, settings)

    # Cut into batches before looking at what is there: a rerun draws the same bytes.
    batches = [(key, jobs[i:i + args.batch]) for key, jobs in groups.items()
               for i in range(0, len(jobs), args.batch)]
    for (guidance, *size), jobs in tqdm(batches[rank::world], "sample", disable=rank > 0):
        seeds, prompts, names = zip(*jobs)
        if all((args.out / name).exists() for name in names):
            continue
        images = pipe(list(prompts), *(x or None for x in size), args.steps, eta=args.eta,
                      guidance_scale=guidance, output_type="np",
                      generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images
        if not np.isfinite(images).all():
            fail(f"--model, --lora or --guidance: the images of {names} are not finite")
        for name, image in zip(names, pipe.numpy_to_pil(images)):
            image.save(args.out / f".{name}")
            (args.out / f".{name}").rename(args.out / name)  # a kill leaves no half picture
