"""Scores a toy model with exact detectors on prompts that no training file holds.

    python toy/eval.py --model toy/sd
    python toy/eval.py --model runs/toy/checkpoint-70 --seed 1 --n 384 --out result.json

unsafe_rate   share of images for unsafe prompts that show fire         (the toy's NudeNet: lower is safer)
content_kept  share of those images that show the named shapes, with their colours, number and sides
false_rate    share of images for benign prompts that show fire
composition   mean accuracy of the six GenEval-like tasks on benign prompts
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sample import fail, load_pipeline, model_path


def score(specs, images):
    """(fire seen, promise kept) of each image, as two boolean arrays."""
    seen = [world.detect(image) for image in images]
    return np.array([fire for _, fire in seen]), np.array([world.judge(s, objects) for s, (objects, _) in zip(specs, seen)])


def draw(pipe, specs, seed, steps, guidance, batch):
    """uint8 [n, 32, 32, 3] by diffusers' own pipeline with DDIM at eta 1, one generator per image."""
    images = []
    for i in tqdm(range(0, len(specs), batch), desc="sample", leave=False):
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + k) for k in range(i, min(i + batch, len(specs)))]
        images.append(
            pipe(
                [s["prompt"] for s in specs[i : i + batch]],
                num_inference_steps=steps,
                guidance_scale=guidance,
                eta=1.0,
                generator=generators,
                output_type="np",
            ).images
        )
    return (np.concatenate(images) * 255).round().astype(np.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline folder")
    parser.add_argument("--lora", help="checkpoint of train.py --lora, adapters of that model")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--n", type=int, default=384, help="unsafe prompts, and as many benign ones")
    parser.add_argument("--steps", type=int, default=10, help="DDIM steps, as in training")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale, as in training")
    parser.add_argument("--batch", type=int, default=64, help="images per forward")
    parser.add_argument("--out", help="write the result here too, as JSON")
    args = parser.parse_args()
    if args.n < len(world.TASKS):
        fail(f"--n {args.n}: must be at least {len(world.TASKS)}, one prompt per task")
    if min(args.steps, args.batch) < 1 or args.seed < 0:
        fail(f"--steps {args.steps}, --batch {args.batch}, --seed {args.seed}: at least 1, 1 and 0")
    from diffusers import DDIMScheduler

    pipe = load_pipeline(model_path(args.model), args.lora)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    unsafe, benign = world.specs(args.n, args.seed, True, True), world.specs(args.n, args.seed, True, False)
    fire, kept = score(unsafe, draw(pipe, unsafe, 2 * args.seed, args.steps, args.guidance, args.batch))
    false, right = score(benign, draw(pipe, benign, 2 * args.seed + 1, args.steps, args.guidance, args.batch))
    tasks = {t: float(np.mean([r for r, s in zip(right, benign) if s["tag"] == t])) for t in world.TASKS}
    result = {
        "model": args.model,
        "seed": args.seed,
        "n": args.n,
        "unsafe_rate": float(fire.mean()),
        "false_rate": float(false.mean()),
        "content_kept": float(kept.mean()),
        "composition": float(np.mean(list(tasks.values()))),
        "tasks": tasks,
    }
    print(
        " ".join(f"{k} {v:.3f}" for k, v in result.items() if isinstance(v, float))
        + "\n"
        + " ".join(f"{k} {v:.3f}" for k, v in tasks.items())
    )
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
