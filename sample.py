"""A file of prompts -> a folder of images {case_number}_{k}.png, by diffusers' own pipeline.

    python sample.py --model toy/sd --prompts toy/prompts/test-unsafe.txt --steps 10 --out out/toy
    python sample.py --prompts i2p.csv --out out/i2p              # SD v1.4, each row's own seed
    torchrun --nproc_per_node 8 sample.py --model runs/r1/checkpoint-300 --prompts i2p.csv --out out/r1

Each image has its own generator: neither the batch nor the number of GPUs matters. A rerun makes what is
missing. OUT/settings.json says how the images were made; other settings need another folder.
"""
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

from reward import check_numbers, fail, flags, loading, strictly

diffusers.utils.logging.set_verbosity_error()  # else it prints each over-long prompt, again and again
diffusers.utils.logging.disable_progress_bar()

def read_rows(path, column="prompt"):
    """The rows of a .txt (a prompt a line), .csv or .jsonl file: dicts of its columns, with "prompt" and
    "case_number" (the row's index, where the file has none) as texts."""
    with loading(path, f"give a .txt, or a .csv or .jsonl whose prompts are its {column!r}"):
        text, kind = Path(path).read_text("utf-8-sig"), Path(path).suffix.lower()
        if kind == ".csv":
            rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        else:
            row_of = {".txt": lambda line: {column: line.strip()}, ".jsonl": json.loads}[kind]
            rows = map(row_of, filter(str.strip, text.split("\n")))
        rows = [{"case_number": i} | row | {"prompt": row[column]} for i, row in enumerate(rows)]
        for row in rows:
            row["case_number"] = str(row["case_number"])
        if not "".join(row["prompt"] for row in rows).strip().encode():  # texts, no lone surrogates
            raise ValueError("it has no prompts")
    return rows

def load_pipeline(model, lora=None, dtype=torch.float32):
    """A StableDiffusionPipeline without safety checker, whose black images would hide what it draws."""
    with loading(f"--model {model}", "give the hub id or folder of a Stable Diffusion 1.x or 2.x"):
        unet = strictly(diffusers.UNet2DConditionModel, model, subfolder="unet", dtype=dtype)
        vae = strictly(diffusers.AutoencoderKL, model, subfolder="vae", dtype=dtype)
        text = strictly(CLIPTextModel, model, subfolder="text_encoder", dtype=dtype)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, unet=unet, vae=vae,
                                                                 text_encoder=text, safety_checker=None,
                                                                 requires_safety_checker=False)
        latents = {unet.config.in_channels, unet.config.out_channels, vae.config.latent_channels}
        if len(latents) > 1 or unet.config.addition_embed_type:
            raise ValueError("its UNet takes more than noise and one text, as for inpainting or SDXL")
    pipe.set_progress_bar_config(disable=True)
    if lora:
        with loading(f"--lora {lora}", "give a checkpoint of train.py --lora on this model"):
            pipe.load_lora_weights(lora)
            adapters = [w for name, w in unet.named_parameters() if "lora" in name]
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
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return rank, int(os.environ.get("WORLD_SIZE", 1)), device

def write(path, text):
    """Replaces a file in one step: a kill leaves the old one or the new one, whatever ranks write it."""
    temporary = path.with_name(f".{path.name}.{os.environ.get('RANK', os.getpid())}")
    temporary.write_text(text)
    temporary.rename(path)

def own(row, default, *columns):
    """A row's own value, of the first of these columns that it fills, as text."""
    return next((str(row[name]) for name in columns if row.get(name) not in (None, "")), default)

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
    args = parser.parse_args()
    check_numbers(parser, args, zero="guidance eta seed")
    jobs, groups = {}, {}  # {file: (seed, prompt)}, {(guidance, height, width): files}
    for i, row in enumerate(read_rows(args.prompts, args.column)):
        case = row["case_number"]
        with loading(f"{args.prompts}, case {case}, --seed or --guidance", "mend that row"):
            seed = int(own(row, args.seed + i * args.per_prompt, "evaluation_seed", "sd_seed"))
            guidance = float(own(row, args.guidance, "evaluation_guidance", "sd_guidance_scale"))
            size = [int(own(row, 0, name)) for name in ("sd_image_height", "sd_image_width")]
            named = case[:1].strip(".") and Path(case).name == case and case.isprintable()
            if not named or len(case.encode()) > 200 or f"{case}_0.png" in jobs:
                raise ValueError("its case_number is not a file name of its own")
            sized = all(side >= 0 == side % 8 for side in size)
            if not (0 <= seed < 2**62 and 0 <= guidance < 1e6 and sized):
                raise ValueError("its seed, guidance or size is out of range")
        names = [f"{case}_{k}.png" for k in range(args.per_prompt)]
        jobs |= {name: (seed + k, row["prompt"]) for k, name in enumerate(names)}
        groups.setdefault((guidance, *size), []).extend(names)

    settings = {name: x for name, x in vars(args).items() if name not in ("out", "batch")}
    settings["sha256"] = sha256(Path(args.prompts).read_bytes()).hexdigest()
    record = args.out / "settings.json"
    with loading(f"--out {args.out}", "give another folder"):
        made = json.loads(record.read_text()) if record.exists() else None
        if made != settings and args.out.exists() and {*args.out.glob("[!.]*")} - {record}:
            raise ValueError("what is there was made with other settings or prompts")

    rank, world, device = rank_and_device()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    pipe = load_pipeline(args.model, args.lora, dtype).to(device)
    pipe.scheduler = make_scheduler(pipe, args.steps, args.scheduler)
    with loading(f"--out {args.out}", "give another folder"):
        args.out.mkdir(parents=True, exist_ok=True)
        write(record, json.dumps(settings, indent=1))

    # Cut into batches before looking at what is there: a rerun draws the same bytes.
    batches = [(key, names[i:i + args.batch]) for key, names in groups.items()
               for i in range(0, len(names), args.batch)]
    for (guidance, *size), names in tqdm(batches[rank::world], "sample", disable=rank > 0):
        if all((args.out / name).exists() for name in names):
            continue
        seeds, prompts = zip(*map(jobs.get, names))
        images = pipe(list(prompts), *(x or None for x in size), args.steps, eta=args.eta,
                      guidance_scale=guidance, output_type="np",
                      generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images
        if not np.isfinite(images).all():
            fail(f"--model, --lora or --guidance: the images of {names} are not finite")
        for name, image in zip(names, pipe.numpy_to_pil(images)):
            image.save(args.out / f".{name}")
            (args.out / f".{name}").rename(args.out / name)  # a kill leaves no half picture
