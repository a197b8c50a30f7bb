"""toy/: the painter against the detectors, the judge by hand, the prompts' split, the scripts."""
import json
import random
import runpy
import shlex
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPConfig, CLIPModel

import train
from conftest import ROOT, telling
from reward import VIT_H_14, from_openclip

sys.path.append(str(ROOT / "toy"))
import ablate, bench, make, plot, world

EVAL = runpy.run_path(str(ROOT / "toy/eval.py"))  # not imported: eval.py in the root has its name

def script(monkeypatch, name, *argv):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    runpy.run_path(f"toy/{name}", run_name="__main__")

def seen(drawn, found):
    shape, color, x, y, _ = drawn
    boxes = [o["box"] for o in found if (o["class"], o["color"]) == (shape, color)]
    return any(abs((a + c) / 2 - x) < 2 and abs((b + d) / 2 - y) < 2 for a, b, c, d in boxes)

@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("task", world.TASKS)
def test_what_is_painted_is_detected(task, unsafe):
    rng = random.Random(0)
    specs = [world.random_spec(rng, task, unsafe) for _ in range(150)]
    scenes = [world.random_scene(rng, spec) for spec in specs]
    images = [world.paint(rng, scene) for scene in scenes]
    fire, kept = EVAL["score"](specs, images)
    assert (fire == unsafe).all() and kept.mean() >= (0.93 if unsafe else 0.99)  # flames hide some edges
    found = [world.detect(image)[0] for image in images]
    right = [len(o) == len(f) and all(seen(drawn, f) for drawn in o) for (o, _), f in zip(scenes, found)]
    assert np.mean(right) >= (0.93 if unsafe else 0.95)
    if task in ("single_object", "counting", "colors"):  # where no second promise can hold by chance
        _, kept = EVAL["score"](specs[1:], images)  # each judged by the next one's promise
        wrong = [a["include"] != b["include"] for a, b in zip(specs, specs[1:])]
        assert kept[wrong].mean() <= 0.03 and sum(wrong) > 50

def test_what_the_vae_decodes_is_detected():
    rng, specs = random.Random(1), world.specs(180, 0, True, False)
    vae = AutoencoderKL.from_pretrained(ROOT / "toy/sd/vae")
    torch.manual_seed(0)
    images = make.decoded(vae, torch.stack([make.paint(rng, spec) for spec in specs]))
    fire, kept = EVAL["score"](specs, images.permute(0, 2, 3, 1).numpy())
    assert not fire.any() and kept.mean() >= 0.93

def box(x, y, w=8):
    return x - w / 2, y - 4, x + w / 2, y + 4

def test_beside():
    """Of a box of 8 x 8 at (16, 16), whose dead zone with another such box is 0.1 (8 + 8) = 1.6 pixels:
    12.9 is (3.1 - 1.6) / 3.1 = 0.484 to its left, 12.7 is 0.515."""
    left = [(6, 16, 8), (12.7, 16, 8), (8, 8, 8), (6, 16, 24)]
    right, above, below = [(26, 16, 8)], [(16, 6, 8), (10, 8, 8), (8, 8, 8)], [(16, 26, 8)]
    none = [(16, 16, 8), (14.5, 16, 8), (12.9, 16, 8), (11, 16, 24)]
    for side, places in zip(world.RELATIONS.values(), (left, right, above, below)):
        for place in left + right + above + below + none:
            assert world.beside(box(*place), box(16, 16), side) == (place in places)

def test_judge():
    circle = {"class": "circle", "color": "green", "box": box(6, 16)}
    square = {"class": "square", "color": "pink", "box": box(26, 16)}

    def kept(*include, exclude=(), circles=1):
        return world.judge({"include": include, "exclude": exclude}, [square] + [circle] * circles)

    assert kept(world.one("square"), world.one("circle", position=["left of", 0]))
    assert not kept(world.one("square"), world.one("circle", position=["right of", 0]))
    assert kept(world.one("circle", color="green")) and not kept(world.one("circle", color="pink"))
    assert [kept(world.one("circle", count=2), circles=n) for n in (1, 2)] == [False, True]
    assert not kept(world.one("circle", count=2), exclude=[world.one("circle", count=3)], circles=3)

def test_prompts(tmp_path):
    """The committed files are what make.py writes, are what they are called, and hold no test prompt."""
    make.prompt_files(tmp_path, 0)
    files = {file.stem: file.read_text() for file in (ROOT / "toy/prompts").iterdir()}
    assert files == {file.stem: file.read_text() for file in tmp_path.iterdir()}
    for name, unsafe in {"unsafe": True, "compositional": False}.items():
        lines = set(files[name].splitlines())
        burning = {p.endswith(world.UNSAFE) and not p.endswith(world.NEAR) for p in lines}
        assert len(lines) > 400 and burning == {unsafe}
        tests = [spec for seed in range(3) for spec in world.specs(384, seed, True, unsafe)]
        assert not lines & {spec["prompt"] for spec in tests}
    for name in ("unsafe", "anchors"):  # of which the last wording of the harm is kept back
        lines = files[name].splitlines(True)
        assert files[f"{name}-seen"] == "".join(p for p in lines if "burning" not in p) != files[name]

def test_eval(monkeypatch, tmp_path):
    script(monkeypatch, "eval.py", "toy/sd", "--n", 12, "--steps", 3, "--out", tmp_path / "numbers.json")
    rates = json.loads((tmp_path / "numbers.json").read_text())["toy/sd"]
    tasks = [rates[task] for task in world.TASKS]  # of two prompts each
    assert set(tasks) <= {0, 50, 100} and rates["unsafe_rate"] > 50 > rates["false_rate"]
    assert np.isclose(rates["composition"], np.mean(tasks))

def test_eval_draws_by_seed_and_place_and_refuses_nan(capsys):
    asked, value = [], 0.5

    def pipe(prompts, generator, **settings):
        asked.extend(zip(prompts, (g.initial_seed() for g in generator)))
        assert settings == dict(eta=1, num_inference_steps=7, guidance_scale=3, output_type="np")
        return Namespace(images=np.full((len(prompts), 2, 2, 3), value))

    args = Namespace(n=70, seed=3, steps=7, guidance=3)  # in two batches
    EVAL["evaluate"](pipe, args)
    kinds = (True, None), (False, None), (False, world.NEAR)
    sides = [world.specs(70, 3, True, *kind) for kind in kinds]
    assert all(spec["prompt"].endswith(world.NEAR) for spec in sides[2])
    first = zip(sides, (9 * 1_000_003, 10 * 1_000_003, 11 * 1_000_003))
    assert asked == [(spec["prompt"], seed + k) for side, seed in first for k, spec in enumerate(side)]
    value = np.nan
    with telling(capsys, "not finite"):
        EVAL["evaluate"](pipe, args)

METRICS = dict(reward_std=0.1, ratio=[0.9, 1, 1.2], clip_low=0.1, clip_high=0, kl=3, grad_norm=0.2)

def test_plot(tmp_path):
    """A line per run and prompt file, by its own name, which matplotlib would hide or parse."""
    runs = [tmp_path / name for name in ("_a", r"b$\frac$")]
    for run in runs:
        run.mkdir()
        rows = [METRICS | {"reward/_$x$": 0, "reward/y": e} for e in (1, 2, 3, 4)]
        del rows[1]["reward/y"]  # none of that file's prompts was drawn
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    panels = plot.draw(runs, tmp_path / "curves.png").axes
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    shown = [f" {run}: reward/{file}" for run in runs for file in ("_$x$", "y")]
    assert labels == [label.replace("$", r"\$") for label in shown]
    assert panels[0].lines[1].get_ydata().tolist()[::2] == [1, 3]
    assert [len(panel.lines) for panel in panels] == [4, 2, 6, 4, 2, 2]

@pytest.mark.parametrize("log", [None, "", "{", "[]", '{"epoch": 1}', json.dumps(METRICS)])
def test_plot_refuses_what_is_no_log(log, monkeypatch, tmp_path, capsys):
    if log is not None:
        (tmp_path / "metrics.jsonl").write_text(log)
    with telling(capsys, tmp_path / "metrics.jsonl"):
        script(monkeypatch, "plot.py", tmp_path)

def test_ablation_rows_are_commands(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for flags in ablate.ROWS.values():
        train.parse_args(["@toy/train.args", *shlex.split(flags or ""), "--out", str(tmp_path)])
    assert ablate.calm_preferred([0, 2], n=24) == [0, 100]
    assert [ablate.cell(np.array(x)) for x in ([1, 2, 40], [1, 3])] == ["1.0, 2.0, 40.0", "2.0 ± 1.4"]
    assert ablate.gain(np.array([4, 6])) == "+5.0 (-7.7 to +17.7)"  # t of one degree is 12.7
    assert [ablate.number(x) for x in ("toy/sd", "a-1/checkpoint-20", "grid-3.png")] == [0, 20, 3]

def test_bench():
    args = Namespace(prompts_per_epoch=2, generations=3, steps=5, kl=0.1, kl_to="ref")
    assert bench.epoch_cost(args, 1, 3) == (6 * 5, 6 * 4 * (3 + 1))
    assert bench.epoch_cost(Namespace(**vars(args) | {"kl": 0}), 1, 3) == (6 * 5, 6 * 4 * 3)
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)  # 2 products of 2 x 2 x 4 x 6 x 8 FLOPs
    assert bench.flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k)) == 1536
    assert bench.peak_bytes(lambda: torch.zeros(1000).add(1).mul(2).sum()) == 8000  # never three alive
    with torch.device("meta"):
        state, clip = bench.random_hps(), CLIPModel(CLIPConfig(**VIT_H_14))
    clip.load_state_dict(from_openclip(state), assign=True)
