"""Reruns the ablation record on the toy: every row for each seed, trained and scored; prints the table and draws the pictures.

python toy/ablate.py --seeds 0 1 2 --jobs 2            # hours on 2 cores; a rerun makes only what is missing
python toy/ablate.py --rows start default no-kl        # some rows
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reward import Embedder, direction_from, read_anchors, reward, steered_targets
from sample import check, fail

UNSAFE_ONLY = "--anchors toy/prompts/anchors-unsafe-only.txt"
BASE = "--alpha 1 --kl 0 --epochs 40"  # quicker than the default run, and without the KL that would hide the rest
ROWS = {  # name: flags that follow @toy/train.args
    "default": "--save-every 10",
    "no-kl": "--kl 0",
    "lora": "--lora 8 --lr 1.5e-3",
    "base": BASE,
    "no-steering": f"{BASE} --steer none",  # the same run as --alpha 0
    "repel": f"{BASE} --steer always --alpha 1e6 {UNSAFE_ONLY}",  # z* becomes v = -z_unsafe for every prompt: -1 x CLIP
    "alpha-0.3": f"{BASE} --alpha 0.3",
    "alpha-0.5": f"{BASE} --alpha 0.5",
    "alpha-0.7": f"{BASE} --alpha 0.7",
    "alpha-2": f"{BASE} --alpha 2",
    "compact-anchors": f"{BASE} --anchors toy/prompts/anchors-compact.txt",
    "unsafe-only-anchors": f"{BASE} {UNSAFE_ONLY}",
    "steer-always": f"{BASE} --steer always",
    "kl-ref": f"{BASE} --kl 0.03 --kl-to ref",
    "kl-old": f"{BASE} --kl 10 --kl-to old",  # k3 of mean log-probs is of the order of 1e-5: a small beta would do nothing
    "uneven-steps": f"{BASE} --no-even-steps",
    "one-update": f"{BASE} --updates 1",
    "one-update-long": f"{BASE} --updates 1 --epochs 160",  # as many optimizer steps as base
    "no-guidance": f"{BASE} --guidance 1 --epochs 80",  # cheaper epochs, so more of them at the same compute
    "fewer-steps": f"{BASE} --steps 5 --epochs 80",
}
FIGURES = ("unsafe_rate", "false_rate", "content_kept", "composition")


def run(command):
    """A command on one core; its error output is the message where it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))}\n{done.stderr[-2000:]}")


def result_of(row, seed, flags, folder, n):
    """{epoch: scores} of one run, trained under folder/row-seed unless it is there already: of the last checkpoint, for the
    default run of all. "start" is the model before training, epoch 0."""
    out = folder / f"{row}-{seed}"
    if row == "start":
        models = {0: "toy/sd"}
    else:
        if not (out / "finished").exists():
            resume = ["--resume"] if (out / "args.json").exists() else []
            run(["train.py", "@toy/train.args", *shlex.split(flags), "--eval", "", "--seed", seed, "--out", out, *resume])
            (out / "finished").touch()
        models = {int(p.name.split("-")[1]): p for p in out.glob("checkpoint-*")}  # with --lora, the adapters
        models = models if row == "default" else {max(models): models[max(models)]}
    for epoch, model in models.items():
        file = out / f"scores-{epoch}.json"
        if not file.exists():
            out.mkdir(parents=True, exist_ok=True)
            model = ["toy/sd", "--lora", model] if "--lora" in flags.split() else [model]
            run(["toy/eval.py", "--model", *model, "--seed", seed, "--n", n, "--out", file])
    return {epoch: json.loads((out / f"scores-{epoch}.json").read_text()) for epoch in sorted(models)}


def calm_preferred(alphas, n=96):
    """{alpha: share of unsafe test prompts under which a scene painted calm earns more than the same scene burning}: what the
    reward asks for, before any training."""
    rng = random.Random(0)
    specs = world.specs(n, 0, True, True)
    scenes = [world.random_scene(rng, spec)[0] for spec in specs]
    embedder = Embedder("toy/clip")
    v, z = direction_from(embedder, *read_anchors("toy/prompts/anchors.txt")), embedder.text([s["prompt"] for s in specs])
    burning, calm = (
        torch.from_numpy(np.stack([world.paint(rng, (scene, fire)) for scene in scenes])).permute(0, 3, 1, 2) / 255
        for fire in (True, False)
    )
    targets = {alpha: steered_targets(z, v, alpha) for alpha in alphas}
    return {a: (reward(embedder, calm, t) > reward(embedder, burning, t)).float().mean().item() for a, t in targets.items()}


def last(scores, figure):
    """In %, one value per seed: of the last checkpoint scored."""
    return [100 * list(s.values())[-1][figure] for s in scores]


def spread(values, axis=0):
    """Sample standard deviation over the seeds; 0 of one."""
    return np.std(values, axis, ddof=np.shape(values)[axis] > 1)


def pictures(results, folder, seed):
    """ablations.png: the trade-off of all rows, the alpha sweep, the default run over its epochs, with bars of one standard
    deviation over the seeds. samples.png: what the default run of one seed draws for the same prompts and noise, a line per checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    colors = plt.get_cmap("tab20").colors
    for k, row in enumerate(results):
        look = dict(marker="o^sD"[k % 4], color=colors[k % 20], linestyle="", markeredgecolor="0.3", markeredgewidth=0.4)
        left.plot(last(results[row], "unsafe_rate"), last(results[row], "composition"), label=row, **look)
    left.set(xlabel="unsafe rate (%), logarithmic above 10", ylabel="composition (%)", title="trade-off, each seed: upper left is best")
    left.set_xscale("symlog", linthresh=10)  # most rows lie below 10 %
    left.set_xlim(-1, 130)
    left.legend(fontsize=7, ncols=2)
    sweep = {0: "no-steering", 0.3: "alpha-0.3", 0.5: "alpha-0.5", 0.7: "alpha-0.7", 1: "base", 2: "alpha-2"}
    sweep = {alpha: row for alpha, row in sweep.items() if row in results}
    if sweep:
        for name in FIGURES:
            points = [last(results[row], name) for row in sweep.values()]
            middle.errorbar(list(sweep), np.mean(points, 1), spread(points, 1), fmt="o-", capsize=2, label=name)
        preferred = calm_preferred([0, 0.3, 0.4, 0.5, 0.6, 0.7, 1, 2])
        print("calm rewarded above burning, by alpha: " + ", ".join(f"{a:g}: {100 * p:.0f} %" for a, p in preferred.items()))
        middle.plot(list(preferred), [100 * p for p in preferred.values()], "k--", label="calm rewarded above burning")
    middle.set(xlabel="alpha", ylabel="%", title="steering strength")
    if "start" in results and "default" in results:
        runs = [{**start, **trained} for start, trained in zip(results["start"], results["default"])]
        for name in FIGURES:
            points = [[100 * scores[name] for scores in run.values()] for run in runs]  # [seeds, checkpoints]
            right.errorbar(list(runs[0]), np.mean(points, 0), spread(points), fmt="o-", capsize=2, label=name)
    right.set(xlabel="epoch", ylabel="%", title="the default run")
    for axis in (middle, right):
        axis.set_ylim(-3, 103)  # rates; some bars reach beyond
        if axis.lines:
            axis.legend(loc=(0.45, 0.12))
    figure.savefig(folder / "ablations.png", dpi=110)

    grids = {int(file.stem.split("-")[1]): file for file in (folder / f"default-{seed}").glob("grid-*.png")}
    if grids:
        lines = [np.asarray(Image.open(grids[epoch])) for epoch in sorted(grids)]
        height = len(lines[0])  # the start model's; the later ones hold it above their own
        Image.fromarray(np.concatenate([line[-height:] for line in lines])).save(folder / "samples.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["start", *ROWS], help="names of rows, or name=FLAGS for a row of your own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training and scoring")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--n", type=int, default=384, help="images per rate")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs; gets ablations.png and samples.png")
    args = parser.parse_args()
    check(args, "jobs", lambda x: x >= 1, "at least 1")
    check(args, "n", lambda x: x >= len(world.TASKS), f"at least {len(world.TASKS)}, one prompt per task")  # before any training
    check(args, "seeds", lambda x: min(x) >= 0, "0 or more")
    unknown = [r for r in args.rows if "=" not in r and r not in ("start", *ROWS)]
    if unknown:
        fail(f"--rows {unknown[0]}: unknown; give one of start, {', '.join(ROWS)}, or name=FLAGS")
    rows = {name: flags if given else ROWS.get(name, "") for name, given, flags in (r.partition("=") for r in args.rows)}
    tasks = [(row, seed) for seed in args.seeds for row in rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(result_of, row, seed, rows[row], args.out, args.n) for row, seed in tasks]
        for future in tqdm(runs, desc="runs"):
            future.result()
    results = {row: [future.result() for future, (r, _) in zip(runs, tasks) if r == row] for row in rows}
    print(f"| row | flags | {' | '.join(FIGURES)} |\n|---|---{'|---' * len(FIGURES)}|")
    for row, scores in results.items():
        cells = [f"{np.mean(x):.1f} ± {spread(x):.1f}" for x in (last(scores, name) for name in FIGURES)]
        print(f"| {row} | `{rows[row]}` | {' | '.join(cells)} |")
    pictures(results, args.out, args.seeds[0])
