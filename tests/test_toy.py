"""toy/: the painter against the detectors, the judge by hand, the prompts' split, the scripts."""
import json
import random
import sys
from argparse import Namespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import train
from conftest import ROOT, script, start, telling

sys.path.append(str(ROOT / "toy"))
import ablate, bench, make, plot, world

@pytest.mark.parametrize("unsafe", [False, True])  # flames hide some edges
@pytest.mark.parametrize("task", world.TASKS)
def test_what_is_painted_is_detected(task, unsafe):
    rng, verdicts = random.Random(0), []
    for _ in range(150):
        spec = world.random_spec(rng, task, unsafe)
        scene = world.random_scene(rng, spec)
        found, fire = world.detect(world.paint(rng, scene))
        near = [any(o[:2] == d[:2] and abs(o.at - d.at) < 2 for o in found) for d in scene[0]]
        verdicts.append((fire == unsafe, world.judge(spec, found), [True] * len(found) == near))
    assert (np.mean(verdicts, 0) >= ([1, 0.93, 0.93] if unsafe else [1, 0.99, 0.95])).all()

def at(x, y, w=8, shape="circle", color="green"):
    return world.Seen(shape, color, complex(x, y), complex(w, 8))

def test_beside():
    """8 x 8 boxes' dead zone is 1.6: of 3.1 from 12.9 to 16 remain 0.48 of it, of 3.3 from 12.7 0.52."""
    sides = [[(6, 16), (12.7, 16), (6, 16, 24)], [(26, 16)], [(16, 6), (10, 8)], [(16, 26)]]
    for side, places in zip(world.RELATIONS.values(), sides):
        for place in sum(sides, [(16, 16), (12.9, 16), (11, 16, 24)]):
            assert world.beside(at(*place), at(16, 16), side) == (place in places)

def test_judge():
    def kept(*include, circles=1):
        objects = [at(26, 16, 8, "square", "pink")] + [at(6, 16)] * circles
        return world.judge({"include": include, "exclude": [world.one("circle", 3)]}, objects)

    assert kept(world.one("square"), world.one("circle", position=["left of", 0]))
    assert not kept(world.one("square"), world.one("circle", position=["right of", 0]))
    assert kept(world.one("circle", color="green")) and not kept(world.one("circle", color="pink"))
    assert [kept(world.one("circle", 2), circles=n) for n in (1, 2, 3)] == [False, True, False]

def test_prompts_and_words(tmp_path):
    """The committed files are what make.py writes, are what they are called, and hold no test prompt."""
    make.prompt_files(tmp_path)
    files = {file.stem: file.read_text() for file in (ROOT / "toy/prompts").iterdir()}
    assert files == {file.stem: file.read_text() for file in tmp_path.iterdir()}
    for name, unsafe in {"unsafe": True, "compositional": False}.items():
        lines = set(files[name].splitlines())
        burning = {p.endswith((" on fire", " in flames", " burning")) and "not" not in p for p in lines}
        tests = [spec["prompt"] for seed in range(3) for spec in world.specs(384, seed, True, unsafe)]
        assert len(lines) > 400 and burning == {unsafe} and lines.isdisjoint(tests)
    for name in ("unsafe", "anchors"):  # of which the last wording of the harm is kept back
        lines = files[name].splitlines(True)
        assert files[f"{name}-seen"] == "".join(p for p in lines if "burning" not in p) != files[name]

def test_eval(tmp_path):
    script("toy/eval.py", "toy/sd", "--n", 12, "--steps", 3, "--out", tmp_path / "numbers.json")
    rates = json.loads((tmp_path / "numbers.json").read_text())["toy/sd"]
    assert rates["unsafe_rate"] > 50 > rates["false_rate"]
    assert np.isclose(rates["composition"], np.mean([rates[task] for task in world.TASKS]))

def test_eval_draws_by_seed_and_place_and_refuses_nan(capsys):
    pipe = Mock(return_value=Namespace(images=np.full((6, 2, 2, 3), np.nan)))
    with telling(capsys, "not finite"):
        ablate.EVAL["draw"](pipe, world.specs(70, 0, True, False), 3, 10, 1)  # in two batches
    noise = [generator for call in pipe.call_args_list for generator in call.kwargs["generator"]]
    assert [generator.initial_seed() for generator in noise] == [3 * 1_000_003 + i for i in range(70)]

def test_plot(tmp_path, capsys):
    """A line per run and prompt file, by its own name, which matplotlib would hide or parse."""
    log, metrics = tmp_path / "metrics.jsonl", dict(reward_std=1, ratio=[0, 1, 2], kl=3, grad_norm=1)
    rows = [metrics | {"clip_a": 0, "clip_b": 0, "reward/_$x$": 0, "reward/y": e} for e in (1, 2, 3)]
    del rows[1]["reward/y"]  # none of that file's prompts was drawn
    log.write_text("\n".join(map(json.dumps, rows)))
    panels = plot.draw([tmp_path] * 2, tmp_path / "curves.png").axes
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert labels == [f" {tmp_path}: reward/{x}" for x in (r"_\$x\$", "y")] * 2
    np.testing.assert_equal(panels[0].lines[1].get_ydata(), [1, np.nan, 3])
    assert [len(panel.lines) for panel in panels] == [4, 2, 6, 4, 2, 2]
    for text in ("", "{", "[]", '{"epoch": 1}', json.dumps(metrics)):  # are no logs of a run
        log.write_text(text)
        with telling(capsys, log):
            plot.draw([tmp_path], "none.png")

def test_ablation(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    for flags in ablate.ROWS.values():
        train.parse_args(["@toy/train.args", *(flags or "").split(), "--out", str(tmp_path)])
    assert ablate.calm_preferred([0, 2], n=24) == [0, 100]
    assert [ablate.cell(np.array(x)) for x in ([1, 2, 40], [1, 3])] == ["1.0, 2.0, 40.0", "2.0 ± 1.4"]
    assert ablate.gain(np.array([4, 6])) == "+5.0 (-7.7 to +17.7)"  # t of one degree is 12.7
    assert [ablate.number(x) for x in ("toy/sd", "a-1/checkpoint-20", "grid-3.png")] == [0, 20, 3]
    with telling(capsys, "--seeds -1"):
        start("toy/ablate.py", "--seeds", -1, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()

def test_bench(monkeypatch):
    args = Namespace(prompts_per_epoch=2, generations=3, keep=2, steps=5, updates=4, batch=5, kl=1,
                     kl_to="ref")
    assert bench.peak_bytes(lambda: torch.zeros(1000).add(1).mul(2).sum()) == 8000  # never three alive
    with torch.device("meta"):
        assert bench.UNet2DConditionModel(**bench.UNET).num_parameters() == 859520964  # as published
    monkeypatch.setattr(bench, "forward", lambda unet, tokens, args, n, backward: n * (n + backward))
    assert [*bench.epoch(lambda call: call(), None, 77, args)] == [30 * 3, 16 * (5 + 3)]  # by 3, by 4
