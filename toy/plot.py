"""Draws the curves of one or several runs of train.py, each run in its own colour.

python toy/plot.py runs/toy
python toy/plot.py runs/toy runs/toy-lora --out compared.png
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reward import Help, loading

PANELS = {  # first letters of the metrics: title
    "reward/": "reward (cosine) by prompt file",
    "reward_std": "reward's spread within a group",
    "ratio": "ratio: smallest, mean, largest",
    "clip_": "share of pairs clipped",
    "kl": "KL (nats per step)",
    "grad_norm": "gradient norm before clipping",
}
STYLES = ("-", "--", ":", "-.")

def read(run):
    """{metric: its values by epoch, nan where it has none} from RUN/metrics.jsonl."""
    file = Path(run) / "metrics.jsonl"
    with loading(file):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        names = sorted({name for row in rows for name in row if name.startswith(tuple(PANELS))})
        if not all(any(name.startswith(panel) for name in names) for panel in PANELS):
            raise ValueError("no epoch of a run in it")
        return {name: np.array([row.get(name, np.nan) for row in rows], float) for name in names}

def label(*names):
    """As it is written: neither $mathematics$ nor left out for its leading underscore."""
    return " " + ": ".join(names).replace("$", r"\$")

def draw(runs, out):
    """The picture of runs: {name: folder}."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    for (metric, title), panel in zip(PANELS.items(), figure.subplots(2, 3).flat):
        for k, (run, folder) in enumerate(runs.items()):
            shown = {name: x for name, x in read(folder).items() if name.startswith(metric)}
            for style, (name, values) in zip(STYLES * len(shown), shown.items()):
                names = (run, name.removeprefix(metric)) if len(shown) > 1 else (run, )
                lines = panel.plot(range(1, len(values) + 1), values, style, color=f"C{k}")
                lines[0].set_label(label(*names))
        panel.set(title=title, xlabel="epoch")
        panel.legend(fontsize=8)
    figure.savefig(out, dpi=100)
    return figure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run of train.py")
    parser.add_argument("--out", default="curves.png", help="the picture")
    args = parser.parse_args()
    draw({run: run for run in args.runs}, args.out)
