"""Reruns the ablation record on the toy: every row below for each seed, trained and scored; prints the README's table and draws its pictures.

    python toy/ablate.py --seeds 0 1 2 --jobs 2            # hours on 2 cores; a rerun makes only what is missing
    python toy/ablate.py --rows start default none         # some rows
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).parent
UNSAFE_ONLY = "--anchors toy/prompts/anchors-unsafe-only.txt"
ROWS = {  # name: flags that follow @toy/train.args
    "default": "",
    "no-steering": "--steer none",  # the same run as --alpha 0
    "repel": f"--steer always --alpha 1e6 {UNSAFE_ONLY}",  # z* becomes v = -z_unsafe for every prompt: -1 x CLIP
    "alpha-0.3": "--alpha 0.3",
    "alpha-0.5": "--alpha 0.5",
    "alpha-0.7": "--alpha 0.7",
    "alpha-2": "--alpha 2",
    "compact-anchors": "--anchors toy/prompts/anchors-compact.txt",
    "unsafe-only-anchors": UNSAFE_ONLY,
    "steer-always": "--steer always",
    "kl-none": "--kl 0",
    "kl-old": "--kl-to old",
    "uneven-steps": "--no-even-steps",
    "one-update": "--updates 1",
}
FIGURES = ("unsafe_rate", "false_rate", "content_kept", "composition")


def result_of(row, seed, flags, folder, evaluation):
    """The scores of one run: trained under folder/row-seed unless they are there already. "start" is the model before training."""
    out = folder / f"{row}-{seed}"
    file = out / "result.json"
    if not file.exists():
        one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
        model = "toy/sd"
        if row != "start":
            resume = ["--resume"] if (out / "args.json").exists() else []
            command = [sys.executable, "train.py", "@toy/train.args", *shlex.split(flags), "--eval", "", "--seed", str(seed), "--out", str(out), *resume]
            done = subprocess.run(command, env=one_core, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
            model = max(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        out.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "toy/eval.py", "--model", str(model), "--seed", str(seed), "--out", str(file), *evaluation],
                       env=one_core, check=True, capture_output=True)
    return json.loads(file.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["start", *ROWS], help="names of rows, or name=FLAGS for a row of your own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--n", type=int, default=384, help="images per rate")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    args = parser.parse_args()
    rows = {name: flags if given else ROWS.get(name, "") for name, given, flags in (r.partition("=") for r in args.rows)}
    tasks = [(row, seed) for seed in args.seeds for row in rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(result_of, row, seed, rows[row], args.out, ["--n", str(args.n)]) for row, seed in tasks]
        for run in tqdm(runs, desc="runs"):
            run.result()
    scores = {row: [run.result() for run, (r, _) in zip(runs, tasks) if r == row] for row in rows}
    print("| row | flags | " + " | ".join(FIGURES) + " |\n|---|---" + "|---" * len(FIGURES) + "|")
    for row, found in scores.items():
        cells = [f"{100 * np.mean(x):.1f} ± {100 * np.std(x):.1f}" for x in ([f[k] for f in found] for k in FIGURES)]
        print(f"| {row} | `{rows[row]}` | " + " | ".join(cells) + " |")
