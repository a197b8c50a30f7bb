"""toy/: the detectors on drawn scenes, the relations by hand, the prompts' split, and the two scripts."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from conftest import ROOT, refused
from reward import Embedder

sys.path.append(str(ROOT / "toy"))
import world

SCENES = 200


def drawn(task, unsafe, seed=0):
    """SCENES pictures of a task with their specs and scenes."""
    rng = random.Random(f"{task}{unsafe}{seed}")
    for _ in range(SCENES):
        spec = world.random_spec(rng, task, unsafe)
        scene = world.random_scene(rng, spec)
        yield spec, scene, world.paint(rng, scene)


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("task", world.TASKS)
def test_detectors_on_drawn_scenes(task, unsafe):
    """The promise is found kept in 97 % of scenes or more, burning or not; fire is seen exactly where it was drawn."""
    kept = []
    for spec, (objects, fire), image in drawn(task, unsafe):
        found, seen = world.detect(image)
        assert seen == fire == unsafe
        kept.append(world.judge(spec, found))
    assert np.mean(kept) >= 0.97


@pytest.mark.parametrize("unsafe", [False, True])
def test_detected_objects_are_the_drawn_ones(unsafe):
    """Shape, colour and place of every object, against the scene that was painted: a verdict cannot be right by luck."""
    right = []
    for task in world.TASKS:
        for _, (objects, _), image in list(drawn(task, unsafe, 1))[: SCENES // 2]:
            found, _ = world.detect(image)
            near = [
                o
                for s, c, x, y, r in objects
                for o in found
                if (o["class"], o["color"]) == (s, c)
                and abs((o["box"][0] + o["box"][2]) / 2 - x) < 2
                and abs((o["box"][1] + o["box"][3]) / 2 - y) < 2
            ]
            right.append(len(near) == len(objects) == len(found))
    assert np.mean(right) >= 0.97


def other(rng, spec):
    """The same task with another promise that the first one's scene breaks."""
    while True:
        wrong = world.random_spec(rng, spec["tag"])
        promises = [
            sorted((i["class"], i.get("color"), i["count"], str(i.get("position"))) for i in s["include"]) for s in (spec, wrong)
        ]
        if promises[0] != promises[1]:
            return wrong


@pytest.mark.parametrize("task", ["single_object", "counting", "colors"])
def test_a_broken_promise_is_seen(task):
    """Another shape, number or colour than the picture's is judged false (in these tasks no second promise can hold by chance)."""
    rng = random.Random(0)
    assert np.mean([world.judge(other(rng, spec), world.detect(image)[0]) for spec, _, image in drawn(task, False)]) <= 0.03


def box(x, y, w=8, h=8):
    return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


@pytest.mark.parametrize(
    "a, relation, expected",
    [
        # against a box of 8 x 8 at (16, 16): the dead zone of two such boxes is 0.1 * 16 = 1.6 in each direction
        (box(6, 16), "left of", True),
        (box(6, 16), "right of", False),
        (box(6, 16), "above", False),
        (box(6, 16), "below", False),
        (box(26, 16), "right of", True),
        (box(26, 16), "left of", False),
        (box(16, 6), "above", True),
        (box(16, 6), "below", False),
        (box(16, 26), "below", True),
        (box(16, 26), "above", False),
        (box(16, 16), "left of", False),  # no offset at all
        (box(14.5, 16), "left of", False),  # within the dead zone: 1.5 < 1.6
        (box(12.9, 16), "left of", False),  # (3.1 - 1.6) / 3.1 = 0.484
        (box(12.7, 16), "left of", True),  # (3.3 - 1.6) / 3.3 = 0.515
        (box(10, 8), "above", True),
        (box(10, 8), "left of", False),  # offset (-6, -8), length 10: 6.4 / 10 and 4.4 / 10
        (box(8, 8), "above", True),
        (box(8, 8), "left of", True),  # a diagonal is both: 6.4 / 11.3 = 0.57
        (box(6, 16, 24, 8), "left of", True),  # 32 wide together: (10 - 3.2) / 10
        (box(11, 16, 24, 8), "left of", False),
    ],
)  # (5 - 3.2) / 5 = 0.36
def test_beside_by_hand(a, relation, expected):
    assert world.beside(a, box(16, 16), world.RELATIONS[relation]) is expected


def test_judge_by_hand():
    """Count, colour, position against an earlier object, and GenEval's exclude."""

    def object_(shape, color, x, y):
        return {"class": shape, "color": color, "box": box(x, y)}

    circle, square = object_("circle", "green", 6, 16), object_("square", "pink", 26, 16)
    left = {
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
        "exclude": [],
    }
    right = {
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["right of", 0]}],
        "exclude": [],
    }
    two = {"include": [{"class": "circle", "count": 2}], "exclude": [{"class": "circle", "count": 3}]}
    green = {"include": [{"class": "circle", "count": 1, "color": "green"}], "exclude": []}
    assert world.judge(left, [circle, square]) and not world.judge(right, [circle, square]) and not world.judge(left, [circle])
    assert [world.judge(two, [circle] * n) for n in (1, 2, 3)] == [False, True, False]
    assert (
        world.judge(green, [circle, square])
        and not world.judge(green, [object_("circle", "pink", 6, 16)])
        and not world.judge(green, [])
    )


def test_no_training_prompt_is_a_test_prompt():
    training = {
        line for name in ("unsafe", "compositional") for line in (ROOT / f"toy/prompts/{name}.txt").read_text().splitlines()
    }
    tests = [spec for seed in range(3) for unsafe in (False, True) for spec in world.specs(384, seed, True, unsafe)]
    assert len(training) > 100 and not training & {spec["prompt"] for spec in tests}
    assert {spec["tag"] for spec in tests} == set(world.TASKS)
    for unsafe in (False, True):  # the hazard's words stand in every unsafe prompt and in no benign one
        assert all(spec["prompt"].endswith(world.UNSAFE) == unsafe for spec in tests if spec["unsafe"] == unsafe)


def test_training_prompts_are_what_their_files_say():
    unsafe, benign = ((ROOT / f"toy/prompts/{name}.txt").read_text().splitlines() for name in ("unsafe", "compositional"))
    assert all(p.endswith(world.UNSAFE) for p in unsafe) and not any(p.endswith(world.UNSAFE) for p in benign)
    assert len(set(unsafe)) == len(unsafe) and len(set(benign)) == len(benign)


def test_specs_are_a_function_of_their_seed():
    assert world.specs(12, 0, True, True) == world.specs(12, 0, True, True) != world.specs(12, 1, True, True)


# ----------------------------------------------------------------------------- the scripts


def test_eval_writes_its_numbers(tmp_path, run):
    """The whole evaluation at n = 12, on the committed model: rates that add up, and the same numbers printed and written."""
    result = run(
        "toy/eval.py",
        "--model",
        "toy/sd",
        "--n",
        12,
        "--steps",
        3,
        "--out",
        tmp_path / "r.json",
        code="import sys; sys.path.insert(0, 'toy')",
    )
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "r.json").read_text())
    assert numbers["n"] == 12 and set(numbers["tasks"]) == set(world.TASKS)
    assert numbers["composition"] == pytest.approx(np.mean(list(numbers["tasks"].values())))
    for name in ("unsafe_rate", "false_rate", "content_kept", "composition"):
        assert 0 <= numbers[name] <= 1 and f"{name} {numbers[name]:.3f}" in result.out
        if name != "composition":
            assert (numbers[name] * 12) % 1 == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "flags, word", [(["--model", "/nonexistent/model"], "--model"), (["--model", "toy/sd", "--n", 5], "--n 5")]
)
def test_eval_refuses_bad_input_in_one_line(flags, word, tmp_path, run):
    refused(run("toy/eval.py", *flags, "--out", tmp_path / "r.json", code="import sys; sys.path.insert(0, 'toy')"), word)
    assert not (tmp_path / "r.json").exists()


def test_scores_are_shares_of_detected_scenes():
    """eval.score on drawn scenes: fire as painted, promises kept."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("toy_eval", ROOT / "toy/eval.py")
    evaluation = module_from_spec(spec)
    spec.loader.exec_module(evaluation)
    scenes = [s for task in world.TASKS for unsafe in (False, True) for s in list(drawn(task, unsafe, 2))[:10]]
    fire, kept = evaluation.score([s[0] for s in scenes], [s[2] for s in scenes])
    assert fire.tolist() == [s[1][1] for s in scenes] and kept.mean() >= 0.97


def test_make_writes_what_is_committed_but_for_the_weights(tmp_path):
    """A thousandth of the training: the same prompt files to the byte, and weights of the same shapes in loadable folders."""
    command = [sys.executable, "toy/make.py", "--scale", "0.001", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in (ROOT / "toy/prompts").iterdir():
        assert (tmp_path / "prompts" / file.name).read_bytes() == file.read_bytes()
    made, committed = (StableDiffusionPipeline.from_pretrained(f / "sd", safety_checker=None) for f in (tmp_path, ROOT / "toy"))
    for part in ("unet", "vae"):
        shapes = [{k: v.shape for k, v in getattr(pipe, part).state_dict().items()} for pipe in (made, committed)]
        assert shapes[0] == shapes[1]
    assert Embedder(str(tmp_path / "clip")).text(["a circle on fire"]).shape == (1, 64)
