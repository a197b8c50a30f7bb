"""Reruns the ablation record on the toy: every row for each seed, trained and scored; prints the table
and draws the pictures ablations.png, samples.png and curves.png.

    python toy/ablate.py --seeds 0 1 2 --jobs 2       # hours on 2 cores; a rerun makes what is missing
    python toy/ablate.py --rows start default no-kl   # some rows
    python toy/ablate.py --rows "mine=--alpha 1 --kl 0.1"
"""
import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import plot
import world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reward import Embedder, Help, fail, load_direction, reward, steered_targets

BASE = "--alpha 1 --kl 0 --epochs 40"  # quicker than the default run, without a KL that hides the rest
UNSAFE_ONLY = "--anchors toy/prompts/anchors-unsafe-only.txt"
ROWS = {  # name: flags that follow @toy/train.args
    "start": None,  # the model before training
    "default": "",
    "no-kl": "--kl 0",
    "lora": "--lora 8 --lr 1.5e-3",
    "base": BASE,
    "no-steering": f"{BASE} --steer none",  # the same run as --alpha 0
    "repel": f"{BASE} --steer always --alpha 1e6 {UNSAFE_ONLY}",  # z* is -z_unsafe for all: -1 x CLIP
    "alpha-0.3": f"{BASE} --alpha 0.3",
    "alpha-0.5": f"{BASE} --alpha 0.5",
    "alpha-0.7": f"{BASE} --alpha 0.7",
    "alpha-2": f"{BASE} --alpha 2",
    "compact-anchors": f"{BASE} --anchors toy/prompts/anchors-compact.txt",
    "unsafe-only-anchors": f"{BASE} {UNSAFE_ONLY}",
    "steer-always": f"{BASE} --steer always",
    "kl-ref": f"{BASE} --kl 0.03 --kl-to ref",
    "kl-old": f"{BASE} --kl 10 --kl-to old",  # k3 of mean log-probs is of the order of 1e-5
    "uneven-steps": f"{BASE} --no-even-steps",
    "one-update": f"{BASE} --updates 1",
    "one-update-long": f"{BASE} --updates 1 --epochs 160",  # as many optimizer steps as base
    "no-guidance": f"{BASE} --guidance 1 --epochs 80",  # epochs at half the cost, so twice as many
    "fewer-steps": f"{BASE} --steps 5 --epochs 80",
}
SWEEP = {0: "no-steering", 0.3: "alpha-0.3", 0.5: "alpha-0.5", 0.7: "alpha-0.7", 1: "base", 2: "alpha-2"}
FIGURES = ("unsafe_rate", "false_rate", "content_kept", "composition")

# ------------------------------------------------------------ runs
def run(*command):
    """A script on one core; its error output is the message where it fails."""
    command = [sys.executable, *map(str, command)]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_core, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr[-2000:]}")

def number(path):
    """N of checkpoint-N or grid-N.png; 0 of toy/sd."""
    return int(re.sub(r"\D", "", Path(path).name) or 0)

def scores_of(out, flags, seed, n):
    """{epoch: scores} of the run in folder `out`, trained and scored unless it has been already: of its
    last checkpoint, for the default run of all."""
    file = out / "scores.json"
    if not file.exists():
        models = ["toy/sd"]
        if any(out.glob("checkpoint-*")):
            run("train.py", "--resume", out)
        elif flags is not None:
            shutil.rmtree(out, ignore_errors=True)  # a run that was stopped before its first checkpoint
            run("train.py", "@toy/train.args", *shlex.split(flags), "--seed", seed, "--out", out)
        if flags is not None:
            models = sorted(out.glob("checkpoint-*"), key=number)[0 if flags == "" else -1:]
            if "--lora" in flags:
                models = ["toy/sd", "--lora", *models]
        out.mkdir(parents=True, exist_ok=True)
        run("toy/eval.py", *models, "--seed", seed, "--n", n, "--out", file)
    return {number(model): scores for model, scores in json.loads(file.read_text()).items()}

def calm_preferred(alphas, n=96):
    """% of unsafe test prompts, by alpha, under which a scene earns more calm than burning: what the
    reward asks for, before any training."""
    rng = random.Random(0)
    specs = world.specs(n, 0, True, True)
    scenes = [world.random_scene(rng, spec)[0] for spec in specs]
    burning, calm = ([world.paint(rng, (scene, fire)) for scene in scenes] for fire in (True, False))
    images = torch.from_numpy(np.stack(burning + calm)).permute(0, 3, 1, 2) / 255
    prompts = [spec["prompt"] for spec in specs]
    embedder = Embedder("toy/clip")
    v, z = load_direction(embedder, "toy/prompts/anchors.txt"), embedder.text(prompts)
    preferred = []
    for alpha in alphas:
        targets = steered_targets(z, v, alpha).repeat(2, 1)
        burning, calm = reward(embedder, images, targets, prompts * 2).chunk(2)
        preferred.append(100 * (calm > burning).float().mean().item())
    return preferred

# ------------------------------------------------------------ what they show
def rates(scores, name):
    """[seeds, checkpoints]"""
    return np.array([[at[name] for at in by_epoch.values()] for by_epoch in scores])

def spread(values):
    """Sample standard deviation over the first axis, the seeds; 0 of one."""
    return np.std(values, 0, ddof=len(values) > 1)

def draw(results, file):
    """The trade-off of all rows, the alpha sweep, and the default run over its epochs, with bars of one
    standard deviation."""
    figure = Figure(figsize=(17, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for k, (row, scores) in enumerate(results.items()):
        unsafe, composition = rates(scores, "unsafe_rate"), rates(scores, "composition")
        look = dict(color=f"C{k % 10}", markeredgecolor="0.3", label=row)
        left.plot(unsafe[:, -1], composition[:, -1], "o^sD"[k // 10], **look)
    left.set_xscale("symlog", linthresh=10)  # most rows lie below 10 %
    left.set(xlabel="unsafe rate (%), logarithmic above 10", ylabel="composition (%)", xlim=(-1, 130),
             title="trade-off, each seed: upper left is best")
    sweep = {alpha: results[row] for alpha, row in SWEEP.items() if row in results}
    for name in FIGURES:
        if sweep:
            points = np.stack([rates(scores, name)[:, -1] for scores in sweep.values()], 1)
            middle.errorbar(list(sweep), points.mean(0), spread(points), fmt="o-", label=name)
        if {"start", "default"} <= set(results):
            points = np.hstack([rates(results[row], name) for row in ("start", "default")])
            epochs = [0, *results["default"][0]]
            right.errorbar(epochs, points.mean(0), spread(points), fmt="o-", label=name)
    if sweep:
        alphas = (0, 0.3, 0.4, 0.5, 0.6, 0.7, 1, 2)
        preferred = calm_preferred(alphas)
        print("calm rewarded above burning, in %, by alpha:", dict(zip(alphas, preferred)))
        middle.plot(alphas, preferred, "k--", label="calm rewarded above burning")
    middle.set(xlabel="alpha", ylabel="%", title="steering strength", ylim=(-3, 103))
    right.set(xlabel="epoch", ylabel="%", title="the default run", ylim=(-3, 103))
    for panel in (left, middle, right):
        if panel.lines:
            panel.legend(fontsize=8)
    figure.savefig(file, dpi=110)

def draw_samples(run, file):
    """A line per checkpoint: the same prompts from the same noise."""
    lines = []
    for grid in sorted(run.glob("grid-*.png"), key=number):
        grid = Image.open(grid)  # a line of 256 pixels for each file of prompts
        tops = range(0, grid.height, 256)
        lines += [grid.crop((0, top, grid.width, top + 256)) for top in tops]
    make_image_grid(lines, len(lines) // len(tops), len(tops)).save(file)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--rows", nargs="+", default=list(ROWS), help="names of rows, or name=FLAGS for one of your own")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training and scoring")
    add("--jobs", type=int, default=2, help="runs at once, one core each")
    add("--n", type=int, default=384, help="images per rate")
    add("--out", type=Path, default="runs/ablations", help="folder of the runs and pictures")
    args = parser.parse_args()
    rows = dict(row.split("=", 1) if "=" in row else (row, ROWS.get(row, row)) for row in args.rows)
    if unknown := [name for name in rows if rows[name] == name]:
        fail(f"--rows {unknown[0]}: give name=FLAGS, or of {', '.join(ROWS)}")
    if args.n < len(world.TASKS) or min(args.seeds) < 0 or args.jobs < 1:  # before hours of training
        fail(f"--n is at least {len(world.TASKS)}, a prompt per task, --seeds 0, --jobs 1")

    tasks = [(args.out / f"{row}-{seed}", rows[row], seed, args.n) for row in rows
             for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        scores = list(tqdm(pool.map(lambda task: scores_of(*task), tasks), "runs", len(tasks)))
    seeds = len(args.seeds)
    results = {row: scores[i * seeds:(i + 1) * seeds] for i, row in enumerate(rows)}
    print(f"| row | flags | {' | '.join(FIGURES)} |\n|---|---{'|---' * len(FIGURES)}|")
    for row, scores in results.items():
        finals = [rates(scores, name)[:, -1] for name in FIGURES]
        cells = " | ".join(f"{x.mean():.1f} ± {spread(x):.1f}" for x in finals)
        print(f"| {row} | `{rows[row] or ''}` | {cells} |")
    draw(results, args.out / "ablations.png")
    if "default" in rows:
        runs = {f"seed {seed}": args.out / f"default-{seed}" for seed in args.seeds}
        plot.draw(runs, args.out / "curves.png")
        draw_samples(next(iter(runs.values())), args.out / "samples.png")
