"""Reruns the record on the toy: every row for each seed, trained and scored; prints the table and draws
record.png and hero.png.

    python toy/ablate.py                              # a rerun makes what is missing
    python toy/ablate.py --rows start default kl-ref "mine=--alpha 1 --kl 0.1" --seeds 0 1
"""
import json
import os
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

import world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reward import Embedder, check_numbers, fail, flags, load_direction, reward, steered_targets
from sample import load_pipeline, make_scheduler

EVAL = runpy.run_path(str(Path(__file__).with_name("eval.py")))  # not imported: the root has an eval.py
UNSAFE_ONLY = "--anchors toy/prompts/anchors-unsafe-only.txt"
ROWS = {  # name: flags that follow @toy/train.args
    "start": None,  # the model before training
    "default": "",
    "no-steering": "--steer none",  # the same run as --alpha 0
    "offline": "--epochs 1 --prompts-per-epoch 432 --updates 144",  # as many pictures and updates
    "offline-unclipped": "--epochs 1 --prompts-per-epoch 432 --updates 144 --clip 10",
    "unseen": "--anchors toy/prompts/anchors-seen.txt "  # neither file has "burning"
              "--prompts toy/prompts/unsafe-seen.txt toy/prompts/compositional.txt",
    "repel": f"--steer always --alpha 1e6 {UNSAFE_ONLY}",  # z* is -z_unsafe for all: -1 x CLIP
    "steer-always": "--steer always",
    "alpha-0.5": "--alpha 0.5",
    "alpha-2": "--alpha 2",
    "group-12": "--prompts-per-epoch 6 --generations 12",
    "group-24": "--prompts-per-epoch 3 --generations 24",
    "unsafe-only": UNSAFE_ONLY,
    "kl-ref": "--kl 0.03 --kl-to ref",
    "uneven-steps": "--no-even-steps",
    "lora": "--lora 8 --lr 1e-3",
}
SWEEP = {0: "no-steering", 0.5: "alpha-0.5", 1: "default", 2: "alpha-2"}
NAMED = ("start", "default", "no-steering", "steer-always", "repel", "unsafe-only", "offline", "alpha-2")
TAGS = ("single_object", "counting", "colors", "position")
FIGURES = ("unsafe_rate", "burning", "content_kept", "false_rate", "near_kept", "composition")

def run(log, *command):
    """A script on one core, whose output goes to the file `log`."""
    command, one_core = [sys.executable, *map(str, command)], os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=one_core)
    if done.returncode:
        fail(f"{shlex.join(command)} failed: see {log}")

def number(path):
    """N of checkpoint-N; 0 of toy/sd."""
    return int(re.sub(r"\D", "", Path(path).name) or 0)

def scores_of(out, flags, seed):
    """{epoch: scores} of the run in folder `out`, trained and scored unless it has been already: of its
    last checkpoint, for the default run of all."""
    file, models, log = out / "scores.json", ["toy/sd"], f"{out}.log"
    if not file.exists():
        shutil.rmtree(out, ignore_errors=True)
        if flags is not None:
            run(log, "train.py", "@toy/train.args", *shlex.split(flags), "--seed", seed, "--out", out)
            checkpoints = sorted(out.glob("checkpoint-*"), key=number)[0 if flags == "" else -1:]
            models = [*models, "--lora", *checkpoints] if "--lora" in flags else checkpoints
        out.mkdir(parents=True, exist_ok=True)
        run(log, "toy/eval.py", *models, "--seed", seed, "--out", file)
    return {number(model): scores for model, scores in json.loads(file.read_text()).items()}

def calm_preferred(alphas, n=96):
    """% of unsafe test prompts, by alpha, under which a scene earns more calm than burning: what the
    reward asks for, before any training."""
    rng, specs = random.Random(0), world.specs(n, 0, True, True)
    scenes = [world.random_scene(rng, spec)[0] for spec in specs]
    pictures = [world.paint(rng, (scene, fire)) for fire in (True, False) for scene in scenes]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    prompts, embedder = [spec["prompt"] for spec in specs], Embedder("toy/clip")
    v, z = load_direction(embedder, "toy/prompts/anchors.txt"), embedder.text(prompts)
    targets = [steered_targets(z, v, alpha).repeat(2, 1) for alpha in alphas]
    rewards = [reward(embedder, images, target, prompts * 2).view(2, n) for target in targets]
    return [100 * (calm > burning).float().mean().item() for burning, calm in rewards]

# ------------------------------------------------------------ what they show
def last(scores, name):
    """[seeds]: a figure of the last checkpoints."""
    return np.array([list(of_seed.values())[-1][name] for of_seed in scores])

def cell(x):
    """Mean and standard deviation of x [seeds], or all of x where it falls into two clusters."""
    if len(x) > 1 and np.diff(np.sort(x)).max() > 15:
        return ", ".join(f"{value:.1f}" for value in x)
    return f"{x.mean():.1f} ± {x.std(ddof=len(x) > 1):.1f}"

def gain(x):
    """Mean of paired differences x [seeds], with its 95 % interval by Student's t."""
    if len(x) < 2:
        return f"{x.mean():+.1f}"
    half = stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)
    return f"{x.mean():+.1f} ({x.mean() - half:+.1f} to {x.mean() + half:+.1f})"

def print_table(results, rows):
    print(f"| row | flags | {' | '.join(FIGURES)} | gain in composition |\n|{'---|' * 9}")
    for row, scores in results.items():
        cells = [cell(last(scores, name)) for name in FIGURES]
        if "start" in results:
            cells += [gain(last(scores, "composition") - last(results["start"], "composition"))]
        print(f"| {row} | `{rows[row] or ''}` | {' | '.join(cells)} |")

def draw_record(results, file):
    """The trade-off of a few rows, the alpha sweep, and the unsafe rate of default over its epochs."""
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for k, row in enumerate(row for row in NAMED if row in results):
        x, y = (last(results[row], name) for name in ("unsafe_rate", "composition"))
        left.plot(x, y, "o^sDvP*X"[k], label=row, markeredgecolor="0.3")
    sweep = {alpha: results[row] for alpha, row in SWEEP.items() if row in results}
    for name in ("unsafe_rate", "content_kept", "near_kept", "composition"):
        points = [last(scores, name) for scores in sweep.values()]
        middle.errorbar(list(sweep), *zip(*((x.mean(), x.std()) for x in points)), fmt="o-", label=name)
    alphas = (0, 0.25, 0.5, 0.75, 1, 1.5, 2)
    middle.plot(alphas, calm_preferred(alphas), "k--", label="calm rewarded above burning")
    for start, scores in zip(results["start"], results["default"]):
        rates = [at["unsafe_rate"] for at in (start | scores).values()]
        right.plot([0, *scores], rates, "C0", linewidth=0.8)
    left.set(xlabel="unsafe rate (%)", ylabel="composition (%)", title="each seed: upper left is best")
    middle.set(xlabel="alpha", ylabel="%", title="steering strength")
    right.set(xlabel="epoch", ylabel="unsafe rate (%)", title="the default run, a line per seed")
    left.legend(fontsize=8)
    middle.legend(fontsize=8, loc=(0.52, 0.58))
    figure.savefig(file, dpi=110)

def draw_hero(run, file):
    """The start model above the trained one, same noise, on the first test prompt of four tasks that the
    trained model gets right: one that burnt before, and a benign one that was wrong."""
    specs = [spec for unsafe in (True, False) for spec in world.specs(192, 0, True, unsafe)]
    seen = []
    for model in ("toy/sd", max(run.glob("checkpoint-*"), key=number)):
        pipe = load_pipeline(model)
        pipe.scheduler = make_scheduler(pipe, 10)
        images = EVAL["draw"](pipe, specs, 0, 10, 1.0)
        seen.append((images, *EVAL["score"](specs, images)))
    (before, fire, kept), (after, still, right) = seen
    unsafe = np.array([spec["unsafe"] for spec in specs])
    burnt, wrong = (right & ~still & was for was in (unsafe & fire, ~unsafe & ~kept))
    tags = np.array([spec["tag"] for spec in specs])
    shown = [(case & (tags == tag)).argmax() for case in (burnt, wrong) for tag in TAGS]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for column, i in zip(figure.subplots(2, 8, subplot_kw=dict(xticks=[], yticks=[])).T, shown):
        for panel, images in zip(column, (before, after)):
            panel.imshow(images[i])
        column[0].set_title(textwrap.fill(specs[i]["prompt"], 18), fontsize=9)
    for panel, name in zip(figure.axes[::8], ("before", "after")):
        panel.set_ylabel(name)
    figure.savefig(file, dpi=90)

if __name__ == "__main__":
    parser, add = flags(__doc__)
    add("--rows", list(ROWS), "names of rows, or name=FLAGS for one of your own", str, nargs="+")
    add("--seeds", [0, 1, 2, 3, 4], "of training and scoring", int, nargs="+")
    add("--jobs", 2, "runs at once, one core each")
    add("--out", Path("runs/ablations"), "folder of the runs and pictures")
    args = parser.parse_args()
    check_numbers(parser, args, zero="")
    if min(args.seeds) < 0:  # before hours of training
        fail(f"--seeds {min(args.seeds)}: give seeds from 0")
    rows = ROWS | dict(row.split("=", 1) for row in args.rows if "=" in row)
    names = [row.split("=")[0] for row in args.rows]
    if unknown := set(names) - set(rows):
        fail(f"--rows {' '.join(unknown)}: give name=FLAGS, or of {', '.join(ROWS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = [(args.out / f"{name}-{seed}", rows[name], seed) for name in names for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        scores = iter(tqdm(pool.map(lambda task: scores_of(*task), tasks), "runs", len(tasks)))
        results = {name: [next(scores) for _ in args.seeds] for name in names}
    print_table(results, rows)
    if {"start", "default"} <= set(names):
        draw_record(results, args.out / "record.png")
        draw_hero(args.out / f"default-{args.seeds[0]}", args.out / "hero.png")
