"""Draws the curves of one or several runs of train.py, each run in its own colour.

python toy/plot.py runs/toy runs/toy-lora --out compared.png
"""
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reward import flags, loading

PANELS = {  # first letters of the metrics: title
    "reward/": "reward (cosine) by prompt file", "reward_std": "reward's spread within a group",
    "ratio": "ratio: smallest, mean, largest", "clip_": "share of pairs clipped",
    "kl": "KL (nats per step)", "grad_norm": "gradient norm before clipping"
}

def read(run, start):
    """{metric: its values by epoch, nan where it has none} of RUN/metrics.jsonl's that start so."""
    file = Path(run) / "metrics.jsonl"
    with loading(file):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        names = sorted({name for row in rows for name in row if name.startswith(start)})
        if not names:
            raise ValueError("no epoch of a run in it")
        return {name: [row.get(name, float("nan")) for row in rows] for name in names}

def draw(runs, out):
    """The picture of the runs' folders."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    for panel, (start, title) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for k, run in enumerate(runs):
            panel.set_prop_cycle(linestyle=("-", "--", ":", "-."))
            for name, values in read(run, start).items():
                line, *_ = panel.plot(range(1, len(values) + 1), values, color=f"C{k}")
                line.set_label(f" {run}: {name}".replace("$", r"\$"))  # as written, not as mathematics
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
