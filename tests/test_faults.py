"""train.py under bad input, NaNs, kills, signals, full disks and failing ranks: a clear line, and nothing good overwritten."""

import os
import random
import shutil
import signal
import time

import pytest

from conftest import ROOT, Script, load, metrics, refused, same_run, torchrun, train_args


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(prompts=["missing.txt"]), ["missing.txt"]),
        (dict(prompts=["{tmp}/empty.txt"]), ["empty.txt", "no prompts"]),
        (dict(prompts=["{tmp}/table.csv"]), ["table.csv", "no column 'prompt'"]),
        (dict(prompts=["{tmp}"]), ["cannot be read"]),
        (dict(prompts=["{one}:0.5", "{two}:0.6"]), ["sum to 1"]),
        (dict(prompts=["{one}:0.5", "{two}"]), ["every file a weight or none"]),
        (dict(prompts=["{one}:1.5", "{two}:-0.5"]), ["negative"]),
        (dict(prompts=["{one}:nan", "{two}:1"]), ["--prompts"]),
        (dict(prompts=["{one}:1e"]), ["--prompts"]),
        (dict(model="/nonexistent/model"), ["--model", "model_index.json"]),
        (dict(model="{tmp}"), ["--model", "model_index.json"]),
        (dict(model="{tmp}/damaged"), ["--model", "damaged"]),
        (dict(model="{tmp}/sample prediction"), ["--model", "prediction_type 'sample'"]),
        (dict(reward="/nonexistent/clip"), ["--reward"]),
        (dict(reward="{tmp}/weights.pt"), ["--reward"]),
        (dict(anchors="missing.txt"), ["--anchors"]),
        (dict(anchors="{one}"), ["--anchors", "line 1"]),
        (dict(prompts=""), ["cannot be read"]),
        (dict(generations=1), ["--generations 1"]),
        (dict(generations=0), ["--generations 0"]),
        (dict(steps=1), ["--steps 1"]),
        (dict(steps=2000), ["--steps"]),
        (dict(eta=0), ["--eta 0"]),
        (dict(eta=-1), ["--eta"]),
        (dict(eta=1.5), ["--eta"]),
        (dict(alpha=-0.1), ["--alpha -0.1"]),
        (dict(alpha="nan"), ["--alpha"]),
        (dict(alpha="inf"), ["--alpha"]),
        (dict(clip=0), ["--clip 0"]),
        (dict(clip=-1), ["--clip"]),
        (dict(clip="nan"), ["--clip"]),
        (dict(clip="inf"), ["--clip"]),
        (dict(advantage_clip=0), ["--advantage-clip"]),
        (dict(kl=-1), ["--kl -1"]),
        (dict(kl="inf"), ["--kl"]),
        (dict(lr=0), ["--lr"]),
        (dict(lr=-1), ["--lr"]),
        (dict(grad_clip=0), ["--grad-clip"]),
        (dict(weight_decay=-1), ["--weight-decay"]),
        (dict(lora=-1), ["--lora"]),
        (dict(seed=-1), ["--seed"]),
        (dict(guidance=0), ["--guidance"]),
        (dict(guidance="inf"), ["--guidance"]),
        (dict(size=12), ["--size"]),
        (dict(size=-8), ["--size"]),
        (dict(epochs=0), ["--epochs"]),
        (dict(batch=0), ["--batch"]),
        (dict(save_every=0), ["--save-every"]),
        (dict(prompts_per_epoch=0), ["--prompts-per-epoch"]),
        (dict(updates=0), ["--updates"]),
        (dict(updates=9), ["--updates 9"]),
        (dict(updates=3), ["--updates 3"]),
        (dict(resume=True), ["--resume", "no run"]),
    ],
    ids=lambda c: " ".join(f"{k} {v}" for k, v in c.items()) if isinstance(c, dict) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(changes, words, tiny, tmp_path, run):
    here = {"{tmp}": str(tmp_path), "{one}": str(tiny / "one.txt"), "{two}": str(tiny / "two.txt")}
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "table.csv").write_text("text\na circle\n")
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    for name in ("damaged", "sample prediction"):
        if any(name in str(v) for v in changes.values()):
            shutil.copytree(tiny / "sd", tmp_path / name)
            if name == "damaged":
                os.truncate(tmp_path / name / "unet/diffusion_pytorch_model.safetensors", 1000)
            else:
                config = tmp_path / name / "scheduler/scheduler_config.json"
                config.write_text(config.read_text().replace('"epsilon"', '"sample"'))

    def fill(value):
        if isinstance(value, list):
            return [fill(v) for v in value]
        for key, path in here.items():
            value = value.replace(key, path) if isinstance(value, str) else value
        return value

    refused(run(*train_args(tiny, tmp_path / "run", **{k: fill(v) for k, v in changes.items()})), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "run"])
def test_an_out_with_something_in_it_is_left_alone(kind, tiny, tmp_path, run):
    out = tmp_path / "run"
    if kind == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / ("args.json" if kind == "run" else "thesis.txt")).write_text("precious")
    refused(run(*train_args(tiny, out)), "--out", "--resume" if kind == "run" else "not a run")
    left = [out] if kind == "file" else list(out.iterdir())
    assert [p.read_text() for p in left] == ["precious"]


def test_a_real_process_says_one_line_too(tiny, tmp_path):
    """Without any help of the tests: what imports print must not drown the line."""
    import subprocess
    import sys
    from conftest import Result

    os.truncate(shutil.copytree(tiny / "sd", tmp_path / "sd") / "unet/diffusion_pytorch_model.safetensors", 1000)
    done = subprocess.run(
        [sys.executable, *train_args(tiny, tmp_path / "run", model=tmp_path / "sd")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    refused(Result(done.returncode, done.stdout, done.stderr), "--model")


# ----------------------------------------------------------------------------- NaNs and full disks


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The uninterrupted run that the others are held against: 4 epochs, a checkpoint after each, 2 updates per rollout."""
    folder = tmp_path_factory.mktemp("whole")
    start = time.perf_counter()
    result = Script(folder / "log", *run_args(tiny, folder / "run")).result()
    assert result.code == 0, result.err
    return folder / "run", time.perf_counter() - start


def stopped(result):
    """Exit code 1, no traceback, and a line of its own that says why."""
    assert result.code == 1 and "Traceback" not in result.err, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("stopped: ")]
    assert len(lines) == 1, result.err
    return lines[0]


def run_args(tiny, out, **changes):
    return train_args(tiny, out, **(dict(epochs=4, updates=2) | changes))


def loads(out):
    """Every checkpoint of a run loads in diffusers; returns their numbers."""
    numbers = sorted(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))
    for number in numbers:
        load(out / f"checkpoint-{number}")
    return numbers


# `train` imports these names when the script runs, so that replacing them in their modules reaches it. EPOCH follows the noise drawn.
EPOCH = """
import os, torch, sample, reward
epoch = [None]
noise_for = sample.noise_for
def follow(seed, e, *rest):
    epoch[0] = e
    return noise_for(seed, e, *rest)
sample.noise_for = follow
"""
NAN = {
    "reward": EPOCH
    + """
true = reward.reward
def bad(embedder, images, targets):
    r = true(embedder, images, targets)
    if epoch[0] == 2:
        r[-1] = float("nan")
    return r
reward.reward = bad
""",
    "latents": EPOCH
    + """
true = sample.rollout
def bad(*args, **kwargs):
    x, lp = true(*args, **kwargs)
    if epoch[0] == 2:
        x[-1, 1, 0, 0, 0] = float("inf")
    return x, lp
sample.rollout = bad
""",
    "ratio": EPOCH
    + """
true = sample.log_prob
def bad(x, mean, sigma):
    lp = true(x, mean, sigma)
    return lp * float("nan") if epoch[0] == 2 and mean.requires_grad else lp
sample.log_prob = bad
""",
    "gradient": EPOCH
    + """
true = sample.log_prob
def bad(x, mean, sigma):
    lp = true(x, mean, sigma)
    if epoch[0] == 2 and lp.requires_grad:
        lp.register_hook(lambda g: g * float("nan"))
    return lp
sample.log_prob = bad
""",
}


@pytest.mark.parametrize("tensor", NAN)
def test_a_nan_stops_the_run_and_harms_nothing(tensor, tiny, tmp_path, run, whole):
    """Exit code 1; the line names tensor, epoch and prompt; a resume without the fault ends like an uninterrupted run."""
    out = tmp_path / "run"
    result = run(*run_args(tiny, out), code=NAN[tensor])
    line = stopped(result)
    prompts = [p for name in ("one", "two") for p in (tiny / f"{name}.txt").read_text().splitlines()]
    assert f"non-finite {tensor}" in line and "epoch 2" in line and any(repr(p) in line for p in prompts), line
    assert loads(out) == [1, 2] and len(metrics(out)) == 2 and not list(out.glob(".checkpoint*"))
    assert run(*run_args(tiny, out, resume=True)).code == 0
    same_run(out, whole[0])


FULL = {
    "state": "import torch\nsave = torch.save\ndef full(o, f, *a, **k):\n    if 'checkpoint-2' in str(f):\n        open(f, 'wb').write(b'half')\n"
    "        raise OSError(28, 'No space left on device')\n    return save(o, f, *a, **k)\ntorch.save = full",
    "weights": "import diffusers\nsave = diffusers.UNet2DConditionModel.save_pretrained\ndef full(self, d, *a, **k):\n    if 'checkpoint-2' in str(d):\n"
    "        raise RuntimeError('I/O error: No space left on device (os error 28)')\n    return save(self, d, *a, **k)\n"
    "diffusers.UNet2DConditionModel.save_pretrained = full",
    "grid": "from PIL import Image\nsave = Image.Image.save\ndef full(self, f, *a, **k):\n    if 'grid-2' in str(f):\n"
    "        raise OSError(28, 'No space left on device')\n    return save(self, f, *a, **k)\nImage.Image.save = full",
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_leaves_the_last_good_checkpoint(what, tiny, tmp_path, run, whole):
    """A message, no temporary folder, and a resume once there is space ends like an uninterrupted run."""
    out = tmp_path / "run"
    result = run(*run_args(tiny, out), code=FULL[what])
    line = stopped(result)
    assert "No space left" in line and "checkpoint-1" in line
    assert loads(out) == ([1]) and not [p for p in out.iterdir() if p.name.startswith(".")]
    assert run(*run_args(tiny, out, resume=True)).code == 0
    same_run(out, whole[0])


# ----------------------------------------------------------------------------- kills and signals


def go_on(tiny, out, log, epochs=4, **kwargs):
    """Starts the run, or continues it where there is one."""
    return Script(log, *run_args(tiny, out, epochs=epochs, resume=True if (out / "args.json").is_file() else None), **kwargs)


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", 6)) // 3))
def test_killed_at_random_moments_and_resumed(seed, tiny, tmp_path, whole):
    """kill -9 three times a run (KILLS=21: seven runs), at any moment from the start on; each checkpoint there loads; the end is bit for bit the same."""
    out, rng = tmp_path / "run", random.Random(seed)
    for kill in range(3):
        script = go_on(tiny, out, tmp_path / f"log{kill}")
        script.process.join(rng.uniform(0.2, 0.9) * whole[1])
        script.process.kill()
        script.process.join()
        loads(out)
    result = go_on(tiny, out, tmp_path / "log").result()
    assert result.code == 0, result.err
    same_run(out, whole[0])


KILL = """
import builtins, os, signal, torch
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def arm(module, name, when, after):
    true = getattr(module, name)
    def armed(*a, **k):
        hit = when in " ".join(map(str, a))
        if hit and not after:
            die()
        done = true(*a, **k)
        if hit:
            die()
        return done
    setattr(module, name, armed)
from PIL import Image
import diffusers, matplotlib.figure
"""
MOMENTS = {
    "start picture half written": (
        "import io\ntrue = Image.Image.save\ndef half(self, f, *a, **k):\n    if 'grid-0' in str(f):\n        b = io.BytesIO(); "
        "true(self, b, 'png'); open(f, 'wb').write(b.getvalue()[:50]); die()\n    true(self, f, *a, **k)\nImage.Image.save = half"
    ),
    "after the start picture": "arm(Image.Image, 'save', 'grid-0', True)",
    "weights half written": "arm(diffusers.AutoencoderKL, 'save_pretrained', 'checkpoint-2', True)",
    "before the state": "arm(torch, 'save', 'checkpoint-2', False)",
    "after the state": "arm(torch, 'save', 'checkpoint-2', True)",
    "before the rename": "arm(os, 'rename', 'checkpoint-2', False)",
    "after the rename": "arm(os, 'rename', 'checkpoint-2', True)",
    "before the picture": "arm(Image.Image, 'save', 'grid-4', False)",
    "after the picture": "arm(Image.Image, 'save', 'grid-2', True)",
    "before the arguments": "arm(os, 'replace', 'args.json', False)",
    "before the log": "arm(os, 'replace', 'metrics.jsonl', False)",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_the_worst_moments_and_resumed(moment, tiny, tmp_path, run, whole):
    out = tmp_path / "run"
    result = run(*run_args(tiny, out), code=KILL + MOMENTS[moment])
    assert result.code == -signal.SIGKILL, result.err
    loads(out)
    result = go_on(tiny, out, tmp_path / "log/again").result()
    assert result.code == 0, result.err
    same_run(out, whole[0])


def test_sigterm_saves_and_stops(tiny, tmp_path, run, whole):
    """Exit code 0 with a checkpoint of the last finished epoch, though --save-every is far away; the resumed run ends the same."""
    out = tmp_path / "run"
    script = Script(
        tmp_path / "log1",
        *run_args(tiny, out, save_every=100, epochs=4),
        code="import time, sample\ntrue = sample.rollout\ndef slow(*a, **k):\n    time.sleep(0.5)\n    return true(*a, **k)\nsample.rollout = slow",
    )
    deadline = time.time() + 120
    while not ((out / "metrics.jsonl").exists() and metrics(out)) and time.time() < deadline:
        time.sleep(0.02)
    script.process.terminate()
    result = script.result()
    assert result.code == 0 and "--resume" in result.out, result.err
    numbers = loads(out)
    assert (
        len(numbers) == 1
        and 1 <= numbers[0] < 4
        and len(metrics(out)) == numbers[0]
        and (out / f"grid-{numbers[0]}.png").exists()
    )
    assert run(*run_args(tiny, out, resume=True)).code == 0
    same_run(out, whole[0])


# ----------------------------------------------------------------------------- resuming what is not the same run


def snapshot(folder):
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(lr=2e-3), ["--lr", "0.002", "0.001"]),
        (dict(generations=4), ["--generations"]),
        (dict(seed=1), ["--seed"]),
        (dict(even_steps=True), ["--even-steps"]),
        (dict(steer="always"), ["--steer"]),
        (dict(lora=2), ["--lora"]),
        ("prompts", ["one.txt", "changed"]),
        ("anchors", ["anchors.txt", "changed"]),
        ("gone", ["one.txt"]),
        ("damaged args", ["args.json"]),
    ],
    ids=str,
)
def test_resume_of_another_run_is_refused(changes, words, tiny, tmp_path, run, whole):
    """Other flags, a changed or missing file: one line, and nothing in the run's folder is touched."""
    own = shutil.copytree(tiny, tmp_path / "own")
    out = tmp_path / "run"
    flags = dict(resume=True, epochs=6)
    shutil.copytree(whole[0], out)
    record = (out / "args.json").read_text()
    (out / "args.json").write_text(record.replace(str(tiny), str(own)))
    if changes == "prompts":
        (own / "one.txt").write_text("another prompt\n")
    elif changes == "anchors":
        (own / "anchors.txt").write_text("- another anchor\n")
    elif changes == "gone":
        (own / "one.txt").unlink()
    elif changes == "damaged args":
        (out / "args.json").write_text("{")
    else:
        flags |= changes
    before = snapshot(out)
    refused(run(*run_args(own, out, **flags)), *words)
    assert snapshot(out) == before


def test_resume_of_a_finished_run_changes_nothing_and_more_epochs_go_on(tiny, tmp_path, run, whole):
    """--epochs and --save-every may change, and what changes the run by rounding only."""
    out = shutil.copytree(whole[0], tmp_path / "run")
    assert run(*run_args(tiny, out, resume=True)).code == 0
    same_run(out, whole[0])
    assert run(*run_args(tiny, out, resume=True, epochs=6, save_every=2)).code == 0
    assert loads(out) == [1, 2, 3, 4, 6] and len(metrics(out)) == 6
    assert run(*run_args(tiny, out, resume=True, epochs=7, batch=2, gradient_checkpointing=True)).code == 0
    assert len(metrics(out)) == 7
    (out / "grid-0.png").unlink()  # a picture that people will not want to keep
    assert run(*run_args(tiny, out, resume=True, epochs=8)).code == 0 and (out / "grid-8.png").exists()


def test_a_lost_state_is_told_and_not_trained_over(tiny, tmp_path, run, whole):
    """Checkpoints without train_state.pt cannot be resumed: starting again at epoch 0 would overwrite the run."""
    out = shutil.copytree(whole[0], tmp_path / "run")
    (out / "checkpoint-4/train_state.pt").unlink()
    before = snapshot(out)
    refused(run(*run_args(tiny, out, resume=True)), "--resume")
    assert snapshot(out) == before


# ----------------------------------------------------------------------------- ranks


def test_a_failing_rank_ends_the_job(tiny, tmp_path):
    """Rank 1 raises in its second epoch: torchrun ends rank 0 too, and says why."""
    (tmp_path / "driver.py").write_text(f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import reward
true, calls = reward.reward, []
def bad(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise RuntimeError("rank one is broken")
    return true(*args)
reward.reward = bad
sys.argv[0] = "train.py"
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    result = torchrun(tmp_path / "driver.py", *run_args(tiny, tmp_path / "run", epochs=50)[1:], timeout=120)
    assert result.returncode != 0 and "rank one is broken" in result.stderr
    assert loads(tmp_path / "run") in ([], [1]) and not list((tmp_path / "run").glob("grid-2.png"))


def test_groups_that_do_not_split_over_ranks_are_refused(tiny, tmp_path, run):
    """`main` of one rank of three, without the others."""
    result = run(
        *train_args(tiny, tmp_path / "run"),
        environment={"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"},
        code="import sys, train\ntrain.main(train.parse_args(sys.argv[1:]))",
    )
    refused(result, "--prompts-per-epoch 2", "3 ranks")
    assert not (tmp_path / "run").exists()
