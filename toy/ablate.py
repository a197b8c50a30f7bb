"""Reruns the toy's record, or what is missing of it: a table, record.png and hero.png."""
import json
import random
import runpy
import shlex
import shutil
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

import world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reward import Embedder, check_numbers, fail, flags, load_direction, steered_targets
from sample import load_pipeline, make_scheduler

EVAL = runpy.run_path(str(Path(__file__).with_name("eval.py")))  # not imported: the root has an eval.py
ROWS = {  # name: flags that follow @toy/train.args
    "start": None,  # the model before training
    "default": "",
    "no-steering": "--steer none",  # the same run as --alpha 0
    "offline": "--epochs 1 --prompts-per-epoch 288 --updates 192",  # as many pictures and updates
    "unseen": "--anchors toy/prompts/anchors-seen.txt "  # neither file has "burning"
              "--prompts toy/prompts/unsafe-seen.txt toy/prompts/compositional.txt",
    "repel": "--steer always --alpha 1e6 --anchors toy/prompts/anchors-unsafe-only.txt",  # -1 x CLIP
    "steer-always": "--steer always",
    "alpha-0.5": "--alpha 0.5",
    "alpha-2": "--alpha 2",
    "group-4": "--prompts-per-epoch 36 --generations 4 --keep 2",
    "unsafe-only": "--anchors toy/prompts/anchors-unsafe-only.txt",
    "compact": "--anchors toy/prompts/anchors-compact.txt",
    "no-kl": "--kl 0",
    "one-update": "--updates 1",
    "uneven-steps": "--no-even-steps",
    "lora": "--lora 8 --lr 1e-3",
}
SWEEP = {0: "no-steering", 0.5: "alpha-0.5", 1: "default", 2: "alpha-2"}
NAMED = "start default no-steering steer-always repel unsafe-only offline alpha-2".split()
FIGURES = "unsafe_rate burning content_kept false_rate near_kept composition".split()

def run(log, *command):
    """A script in this process (imports take longer than scoring), its output goes to file `log`."""
    sys.argv = [*map(str, command)]
    try:
        with open(log, "a") as file, redirect_stdout(file), redirect_stderr(file):
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit:
        fail(f"{log}: this run failed; read it")

def number(path):
    """N of checkpoint-N; 0 of toy/sd."""
    return int("0" + "".join(filter(str.isdigit, Path(path).name)))

def scores_of(folder, row, seed):
    """{epoch: scores} of folder/row-seed, made where missing: its last checkpoint's, for default all."""
    out, flags, models = folder / f"{row}-{seed}", ROWS[row], ["toy/sd"]
    file, log = out / "scores.json", f"{out}.log"
    if not file.exists():
        shutil.rmtree(out, ignore_errors=True)
        if flags is not None:
            run(log, "train.py", "@toy/train.args", *shlex.split(flags), "--seed", seed, "--out", out)
            checkpoints = sorted(out.glob("checkpoint-*"), key=number)
            adapters = [*models, "--lora"] if "--lora" in flags else []
            models = adapters + checkpoints[-1 if flags else 0:]
        out.mkdir(parents=True, exist_ok=True)
        run(log, "toy/eval.py", *models, "--seed", seed, "--out", file)
    return {number(model): scores for model, scores in json.loads(file.read_text()).items()}

def calm_preferred(alphas, n=96):
    """% of unsafe test prompts, by alpha, whose drawn scene earns more calm than burning."""
    rng, embedder, specs = random.Random(0), Embedder("toy/clip"), world.specs(n, 0, True, True)
    scenes = [world.random_scene(rng, spec)[0] for spec in specs]
    images = [world.paint(rng, (scene, fire)) for fire in (True, False) for scene in scenes]
    images = torch.tensor(np.array(images)).permute(0, 3, 1, 2) / 255
    burning, calm = embedder.image(images).chunk(2)  # [n, D]
    z, v = embedder.text(s["prompt"] for s in specs), load_direction(embedder, "toy/prompts/anchors.txt")
    gains = [(calm - burning) * steered_targets(z, v, alpha) for alpha in alphas]
    return [100 * (gain.sum(1) > 0).float().mean().item() for gain in gains]

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

def print_table(last):
    print(f"| row | flags | {' | '.join(FIGURES)} | gain in composition |\n|{'---|' * 9}")
    for row, figures in last.items():
        cells = [cell(x) for x in figures.values()]
        if "start" in last:
            cells += [gain(figures["composition"] - last["start"]["composition"])]
        print(f"| {row} | `{ROWS[row] or ''}` | {' | '.join(cells)} |")

def draw_record(results, last, file):
    """The trade-off of a few rows, the alpha sweep, and the unsafe rate of default over its epochs."""
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for row, marker in zip(NAMED, "o^sDvP*X"):
        if row in last:
            left.plot(last[row]["unsafe_rate"], last[row]["composition"], marker, label=row, mec="0.3")
    alphas = [alpha for alpha, row in SWEEP.items() if row in last]
    for name in ("unsafe_rate", "content_kept", "near_kept", "composition"):
        points = [last[SWEEP[alpha]][name] for alpha in alphas]
        middle.errorbar(alphas, np.mean(points, 1), np.std(points, 1), fmt="o-", label=name)
    alphas = (0, 0.25, 0.5, 0.75, 1, 1.5, 2)
    middle.plot(alphas, calm_preferred(alphas), "k--", label="calm rewarded above burning")
    for start, scores in zip(results["start"], results["default"]):
        rates = {epoch: at["unsafe_rate"] for epoch, at in (start | scores).items()}
        right.plot(rates.keys(), rates.values(), "C0", linewidth=0.8)
    left.set(xlabel="unsafe rate (%)", ylabel="composition (%)", title="each seed: upper left is best")
    middle.set(xlabel="alpha", ylabel="%", title="steering strength")
    right.set(xlabel="epoch", ylabel="unsafe rate (%)", title="the default run, a line per seed")
    left.legend(fontsize=8)
    middle.legend(fontsize=8, loc=(0.52, 0.58))
    figure.savefig(file, dpi=110)

def draw_hero(run, file):
    """The start model above the trained one, same noise, on the first test prompt of four tasks that the
    trained model gets right: one that burnt before, and a benign one that was wrong."""
    specs = world.specs(192, 1, True, True) + world.specs(192, 1, True, False)
    seen = []
    for model in ("toy/sd", max(run.glob("checkpoint-*"), key=number)):
        pipe = load_pipeline(model)
        pipe.scheduler = make_scheduler(pipe, 8)
        images = EVAL["draw"](pipe, specs, 0, 8, 1)
        seen.append((images, *EVAL["score"](specs, images)))
    (before, fire, kept), (after, still, right) = seen
    bad = np.append(fire[:192], ~kept[192:])
    first = (bad & right & ~still).reshape(2, 32, 6).argmax(1)  # [2, 6]: of a task's 32 prompts
    shown = [192 * k + 6 * first[k, task] + task for k in (0, 1) for task in (0, 2, 3, 4)]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for panel, i in zip(figure.subplots(1, 8, subplot_kw=dict(xticks=[], yticks=[])), shown):
        panel.imshow(np.insert(np.vstack([before[i], after[i]]), 32, 255, 0))  # a white line between
        panel.set_title(textwrap.fill(specs[i]["prompt"], 20), fontsize=9)
    figure.axes[0].set_ylabel("after           before")
    figure.savefig(file, dpi=90)

if __name__ == "__main__":
    parser, add = flags(__doc__)
    add("--rows", list(ROWS), "which of the rows", str, nargs="+", choices=ROWS)
    add("--seeds", 5, "runs of a row, by seeds from 0")
    add("--jobs", 2, "runs at once, one core each")
    add("--out", Path("runs/ablations"), "folder of the runs and pictures")
    args = check_numbers(parser, parser.parse_args(), zero="")
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = [(args.out, row, seed) for row in args.rows for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.jobs, None, torch.set_num_threads, (1, )) as pool:
        scores = iter(tqdm(pool.map(scores_of, *zip(*tasks)), "runs", len(tasks)))
        results = {row: [next(scores) for _ in range(args.seeds)] for row in args.rows}
    last = {}  # {row: {figure: [seeds]}} of the last checkpoints
    for row, of_row in results.items():
        last[row] = {name: np.array([of[max(of)][name] for of in of_row]) for name in FIGURES}
    print_table(last)
    if {"start", "default"} <= set(args.rows):
        draw_record(results, last, args.out / "record.png")
        draw_hero(args.out / "default-0", args.out / "hero.png")
