"""Draws the curves of one or several runs of train.py, each run in its own colour.

python toy/plot.py runs/toy
python toy/plot.py runs/toy runs/toy-lora --out compared.png
"""
import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reward import Help, loading

PANELS = {  # metric: title
    "reward/": "reward (cosine) by prompt file",
    "reward_std": "reward's spread within a group",
    "ratio": "ratio: mean, smallest to largest",
    "clip_": "share of pairs clipped",
    "kl": "KL (nats per step)",
    "grad_norm": "gradient norm before clipping",
}
STYLES = ("-", "--", ":", "-.")

def read(run):
    """{metric: an array of its values by epoch} from RUN/metrics.jsonl; the ratio's is [epochs, 3]."""
    file = Path(run) / "metrics.jsonl"
    with loading(file):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        names = ("epoch", "reward_std", "ratio", "clip_low", "clip_high", "kl", "grad_norm")
        curves = {name: np.array([row[name] for row in rows], float) for name in names}
        curves["ratio"] = curves["ratio"].reshape(len(rows), 3)
        if not rows:
            raise ValueError("no epoch in it yet")
        for name in sorted({name for row in rows for name in row if name.startswith("reward/")}):
            curves[name] = np.array([row.get(name, np.nan) for row in rows], float)
    return curves

def label(*names):
    """As it is written: neither $mathematics$ nor left out for its leading underscore."""
    return " " + ": ".join(names).replace("$", r"\$")

def draw(runs, out):
    """The picture of runs: {name: folder}."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(2, 3).flat))
    for k, (run, folder) in enumerate(runs.items()):
        curves, color = read(folder), f"C{k}"
        epochs = curves.pop("epoch")
        smallest, mean, largest = curves.pop("ratio").T
        panels["ratio"].plot(epochs, mean, color=color, label=label(run))
        panels["ratio"].fill_between(epochs, smallest, largest, color=color, alpha=0.2)
        for metric, panel in panels.items():
            shown = {name: values for name, values in curves.items() if name.startswith(metric)}
            for style, (name, values) in zip(itertools.cycle(STYLES), shown.items()):
                names = (run, name.removeprefix(metric)) if len(shown) > 1 else (run, )
                panel.plot(epochs, values, style, color=color, label=label(*names))
    for metric, panel in panels.items():
        panel.set(title=PANELS[metric], xlabel="epoch")
        panel.legend(fontsize=8)
    figure.savefig(out, dpi=100)
    return figure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run of train.py")
    parser.add_argument("--out", default="curves.png", help="the picture")
    args = parser.parse_args()
    draw({run: run for run in args.runs}, args.out)
