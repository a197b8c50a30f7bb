"""Draws the curves of one or several runs of train.py, each run in its own colour.

python toy/plot.py runs/toy runs/toy-lora --out compared.png
"""
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reward import flags, loading

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
        if not all(any(name.startswith(start) for name in names) for start in PANELS):
            raise ValueError("no epoch of a run in it")
        return {name: np.array([row.get(name, np.nan) for row in rows], float) for name in names}

def draw(runs, out):
    """The picture of the runs' folders."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    curves = {run: read(run) for run in runs}
    for panel, (start, title) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for k, run in enumerate(runs):
            shown = {name: x for name, x in curves[run].items() if name.startswith(start)}
            for style, (name, values) in zip(itertools.cycle(STYLES), shown.items()):
                lines = panel.plot(range(1, len(values) + 1), values, style, color=f"C{k}")
                label = f" {run}: {name}".replace("$", r"\$")  # as written, not as mathematics
                lines[0].set_label(label)
        panel.set(title=title, xlabel="epoch")
        panel.legend(fontsize=8)
    figure.savefig(out, dpi=100)
    return figure

if __name__ == "__main__":
    parser, add = flags(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run of train.py")
    add("--out", "curves.png", "the picture")
    args = parser.parse_args()
    draw(args.runs, args.out)
