"""Scores toy models with exact detectors on prompts that no training file holds.

    python toy/eval.py toy/sd runs/toy/checkpoint-48
    python toy/eval.py toy/sd --lora runs/toy-lora/checkpoint-48 --seed 1 --out scores.json

unsafe_rate, false_rate  images for unsafe and for benign prompts that show fire (the toy's NudeNet)
content_kept             images for unsafe prompts that show the shapes, colours, number and places
composition              mean accuracy of the six GenEval-like tasks on benign prompts
near_kept                benign prompts in the harm's words, "... not on fire", drawn calm and right
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reward import check_numbers, fail, flags
from sample import load_pipeline, make_scheduler

def draw(pipe, specs, seed, steps, guidance):
    """uint8 [n, 32, 32, 3]: DDIM at eta 1, as in training, with one generator per image."""
    noise = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(len(specs))]
    images = []
    for i in tqdm(range(0, len(specs), 64), "sample", leave=False):
        drawn = pipe([s["prompt"] for s in specs[i:i + 64]], None, None, steps, eta=1,
                     guidance_scale=guidance, generator=noise[i:i + 64], output_type="np")
        images.extend(drawn.images)
    if not np.isfinite(images).all():
        fail("the model draws images that are not finite")
    return (np.array(images) * 255).round().astype(np.uint8)

def score(specs, images):
    """(fire seen, promise kept) of each image: boolean arrays."""
    seen, fire = zip(*map(world.detect, images))
    return np.array(fire), np.array([*map(world.judge, specs, seen)])

def evaluate(pipe, args):
    """{name: share in %}."""
    sides = []
    for k, kind in enumerate([(True, ), (False, ), (False, world.NEAR)]):
        specs = world.specs(args.n, args.seed, True, *kind)
        images = draw(pipe, specs, 3 * args.seed + k, args.steps, args.guidance)
        sides.append((specs, *score(specs, images)))
    (unsafe, fire, kept), (benign, false, right), (_, lit, near) = sides
    tasks = {task: right[[spec["tag"] == task for spec in benign]].mean() for task in world.TASKS}
    rates = {
        "unsafe_rate": fire.mean(), "false_rate": false.mean(), "content_kept": kept.mean(),
        "composition": np.mean(list(tasks.values())), "near_kept": (near & ~lit).mean()
    }
    for words in world.UNSAFE:  # the unsafe rate by wording
        rates[words.strip()] = fire[[spec["ending"] == words for spec in unsafe]].mean()
    return {name: 100 * float(rate) for name, rate in (rates | tasks).items()}

if __name__ == "__main__":
    parser, add = flags(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="pipeline folder")
    add("--lora", None, "a checkpoint of train.py --lora: adapters of these models", str)
    add("--seed", 0, "of prompts and noise")
    add("--n", 384, "prompts of each of the three kinds")
    add("--steps", 8, "DDIM steps, as in training")
    add("--guidance", 1.0, "as in training")
    add("--out", None, "write the numbers here too, as JSON", Path)
    args = check_numbers(parser, parser.parse_args(), zero="seed guidance")
    if args.n < len(world.TASKS):
        fail(f"--n {args.n}: give a prompt per task, {len(world.TASKS)}, or more")
    numbers = {}
    for model in args.models:
        pipe = load_pipeline(model, args.lora)
        pipe.scheduler = make_scheduler(pipe, args.steps)
        numbers[model] = evaluate(pipe, args)
        print(f"{model}: " + ", ".join(f"{name} {rate:.1f} %" for name, rate in numbers[model].items()))
    if args.out:
        args.out.write_text(json.dumps(numbers, indent=1) + "\n")
