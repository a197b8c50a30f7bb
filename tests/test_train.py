"""train.py: equations against oracles, the loop against a slow second implementation, tiny runs."""
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import reward
import train
from conftest import (ROOT, SCHEDULE, TEXTS, command_line, metrics, same_run, script, start, telling,
                      told, weights)

NOISE = torch.Generator().manual_seed(0)

def pipeline(folder):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)

def half_dead(embedder, images, targets, prompts, true=reward.reward):
    """The reward, but 0 for all prompts of one.txt; it is given fp32 whatever --precision is."""
    assert images.dtype == embedder.clip.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    live = torch.tensor([prompt not in TEXTS["one.txt"] for prompt in prompts])
    return true(embedder, images, targets, prompts) * live

def edited(tiny, folder, part, **changes):
    """A copy of the tiny pipeline in folder, whose part's config is changed."""
    file, = (shutil.copytree(tiny / "sd", folder) / part).glob("*config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder

def deviation(a, b, start):
    """The distance of two UNets, as a part of their way from the start: Adam moves a few weights, whose
    gradient is rounding alone, by a whole lr."""
    between, way = (torch.cat([(a[k] - other[k]).flatten() for k in a]) for other in (b, start))
    return (between.norm() / way.norm()).item()

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("alpha_one", [False, True])
def test_ddim_step_is_diffusers(kind, spacing, alpha_one):
    config = dict(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=alpha_one)
    scheduler = DDIMScheduler(**SCHEDULE | config)
    x, out, noise = torch.randn(3, 2, 4, 4, 4, generator=NOISE)
    for steps, eta in [(10, 1.0), (50, 1.0), (7, 0.0), (50, 0.3)]:
        scheduler.set_timesteps(steps)
        schedule = train.ddim_schedule(scheduler, eta)
        for i, t in enumerate(scheduler.timesteps):
            mu = train.ddim_mean(schedule, torch.tensor([i, i]), x, out)
            theirs = scheduler.step(out, t, x, eta=eta, variance_noise=noise).prev_sample
            torch.testing.assert_close(mu + schedule.sigma[i] * noise, theirs, rtol=2e-5, atol=2e-4)
        assert torch.equal(schedule.t, scheduler.timesteps)

@pytest.mark.parametrize("bf16", [False, True])
def test_rollout_is_repeated_by_training_and_by_the_pipeline(bf16, tiny):
    """Bit for bit: fp32 latents, each the mean plus its noise, the last bare; eta 0 as the pipeline."""
    pipe, prompts = pipeline(tiny / "sd"), ["a circle", "on fire"]
    pipe.scheduler.set_timesteps(5)
    text, empty = (pipe.encode_prompt(p, "cpu", 1, False)[0].detach() for p in (prompts, [""]))
    noise = train.noise_for(0, 0, [0, 1], 5, (4, 4, 4))
    schedule, still = (train.ddim_schedule(pipe.scheduler, eta) for eta in (1.0, 0.0))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        x, means = train.rollout(pipe.unet, schedule, text, empty, noise, 2.0)
        assert x.dtype == means.dtype == torch.float32 and (x != x.bfloat16()).any()
        for i, t in enumerate(schedule.t):
            out = train.predict_noise(pipe.unet, x[:, i], t.expand(2), text, empty, 2.0)
            mu = train.ddim_mean(schedule, torch.tensor([i, i]), x[:, i], out)
            drawn = mu + schedule.sigma[i] * noise[:, i + 1] if i < 4 else mu
            assert torch.equal(means[:, i], mu) and torch.equal(x[:, i + 1], drawn)
    for guidance in (1.0, 4.0):
        theirs = pipe(prompts, num_inference_steps=5, guidance_scale=guidance, latents=noise[:, 0],
                      output_type="latent").images
        ours, _ = train.rollout(pipe.unet, still, text, empty, noise, guidance)
        torch.testing.assert_close(ours[:, -1], theirs, rtol=1e-4, atol=1e-4)

def test_advantages_by_hand():
    """(1, 3): mean 2, std 1. Fifteen 0s and a 1: sqrt(15), clipped. No spread but rounding: dead."""
    rewards = torch.tensor([[1.0, 3], [0.3, 0.3 + 3e-8], [0.3, 0.3003]])
    advantages, live = train.group_advantages(rewards, 5.0)
    assert live.tolist() == [True, False, True] and not advantages[1].any()
    torch.testing.assert_close(advantages[[0, 2]], torch.tensor([[-1.0, 1]] * 2), rtol=0, atol=1e-3)
    sixteen = torch.eye(16)[[15, 15]] * torch.tensor([[1], [-1]])
    (a, *_, b), (*_, c) = train.group_advantages(sixteen, 2.5)[0].tolist()
    assert (a, b, c) == (pytest.approx(-1 / math.sqrt(15)), 2.5, -2.5)

def ppo(ratio, advantage, clip):
    """PPO's objective by case: constant where the ratio has gone far enough in the right direction."""
    far = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    return advantage * (ratio.clamp(1 - clip, 1 + clip).detach() + 0 * ratio if far else ratio)

def test_log_prob_and_kl_are_torchs():
    """The closed form, and k3: its mean over samples of the old policy, which is never negative."""
    x, a, b = torch.randn(3, 4, 2, 3, 3, generator=NOISE)
    sigma = torch.tensor([0.01, 0.3, 1.0, 2.0]).view(-1, 1, 1, 1)
    log_prob, kl = Normal(a, sigma).log_prob(x), kl_divergence(Normal(a, sigma), Normal(b, sigma))
    torch.testing.assert_close(train.log_prob(x, a, sigma.flatten()), log_prob.mean((1, 2, 3)))
    torch.testing.assert_close(train.kl_gaussian(a, b, sigma.flatten()), kl.mean((1, 2, 3)))
    old, new = Normal(0.0, 1.0), Normal(0.4, 1.0)
    x = torch.randn(200_000, dtype=torch.float64, generator=NOISE)
    k3 = train.kl_k3(new.log_prob(x) - old.log_prob(x))
    assert k3.min() >= 0 and k3.mean().item() == pytest.approx(kl_divergence(old, new).item(), rel=0.02)

def test_prompts_noise_and_pairs_are_functions_of_the_seed():
    """Files take turns, over epochs too; no prompt comes twice before its file is used up."""
    first, again, other = (train.draw_prompts([list("abcd"), list("xyz")], 7, 0, e) for e in (1, 1, 2))
    assert first == again != other
    assert [[s for s, _ in drawn] for drawn in (first, other)] == [[1, 0] * 3 + [1], [0, 1] * 3 + [0]]
    assert sorted(p for s, p in first if s == 0) == sorted({*"abcd"} & {p for _, p in first})
    assert sum(p in "xyz" for s, p in first) == 4 == len({p for _, p in other if p in "abcd"})
    whole, *others = (train.noise_for(*key, range(6), 4, (4, 2, 2)) for key in ((7, 3), (7, 4), (8, 3)))
    assert torch.equal(train.noise_for(7, 3, [5, 2], 4, (4, 2, 2)), whole[[5, 2]])
    values = torch.stack([whole, *others])
    assert values.dtype == torch.float32 and values.unique().numel() == values.numel()
    dealt, other = (train.deal_pairs(range(6), 4, 3, 0, epoch) for epoch in (5, 6))
    assert dealt.shape == (3, 8, 2) and not torch.equal(dealt, other)
    assert sorted(map(tuple, dealt.flatten(0, 1).tolist())) == [*itertools.product(range(6), range(4))]

def test_flags_are_used_and_memory_flags_are_not_maths(tiny, run, monkeypatch):
    """6 samples and 9 pairs are cut into batches of 3: one shape, at most --batch."""
    start, plain = weights(tiny / "sd"), weights(run("plain", epochs=1, batch=64) / "checkpoint-1")
    forwards = Mock(wraps=train.predict_noise)
    monkeypatch.setattr(train, "predict_noise", forwards)
    changes = dict(steer="always", guidance=1, seed=1, batch=5, gradient_checkpointing=True)
    for name, value in changes.items():
        changed = weights(run(name, **dict(epochs=1, batch=5) | {name: value}) / "checkpoint-1")
        apart = deviation(changed, plain, start)
        assert apart < 2e-3 if name in ("batch", "gradient_checkpointing") else apart > 0.02, name
    assert {len(call.args[1]) for call in forwards.call_args_list} == {3}
    assert [train.even_batch(*x) for x in ((9, 4), (4, 9), (196, 16), (7, 6))] == [3, 4, 14, 1]

def test_two_ranks_train_as_one(tiny, run, flags, monkeypatch, tmp_path):
    """torchrun and gloo, with live and dead groups: the same weights and metrics."""
    (tmp_path / "two.py").write_text(
        "import sys; sys.path[:0] = sys.argv.pop().split(); import reward, train\n"
        "from test_train import half_dead; reward.reward = half_dead\n"
        "train.main(train.parse_args())\n")
    monkeypatch.setattr(reward, "reward", half_dead)
    changes = dict(lr=1e-4, kl=1, even_steps=True, prompts_per_epoch=4, updates=3, clip=2e-3, keep=2)
    one, argv = run("one", **changes), [*flags("two", **changes), f"{ROOT} {ROOT / 'tests'}"]
    done = script(tmp_path / "two.py", *argv, ranks=2)
    assert done.returncode == 0, done.stderr
    a, b = (weights(out / "checkpoint-2") for out in (one, tmp_path / "two"))
    assert deviation(a, b, weights(tiny / "sd")) < 1e-3  # of 1e-4: 1e-7
    for a, b in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert a["dead_groups"] == 2
        for name in a.keys() - {"seconds"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=2e-6), name

def second_implementation(args):
    """The run of args a pair at a time, with diffusers' step, torch's Normal, clip_grad_norm_, AdamW:
    the trained weights, and ratio, clip fractions, KL and gradient norm of each epoch."""
    pipe, frozen = pipeline(args.model), pipeline(args.model).unet
    unet, scheduler, embedder = pipe.unet, pipe.scheduler, reward.Embedder(args.reward)
    v = reward.load_direction(embedder, args.anchors)
    optimizer = torch.optim.AdamW(unet.parameters(), args.lr, weight_decay=args.weight_decay)
    sources = [Path(file).read_text().splitlines() for file in args.prompts]
    texts = {p: pipe.encode_prompt([p], "cpu", 1, False)[0].detach() for p in [""] + sum(sources, [])}
    scheduler.set_timesteps(args.steps)
    schedule = train.ddim_schedule(scheduler, args.eta)
    gain = schedule.b.abs() / schedule.sigma
    P, G, T, rows = args.prompts_per_epoch, args.generations, args.steps - 1, []

    def following(net, i, x, prompt):  # p(x_next | x) of step i
        t, both = scheduler.timesteps[i], torch.cat([texts[prompt], texts[""]])
        out, empty = net(torch.cat([x, x]), t, both).sample.split(1)
        out = empty + args.guidance * (out - empty)
        mean = scheduler.step(out, t, x, args.eta, variance_noise=torch.zeros_like(x)).prev_sample
        return Normal(mean, schedule.sigma[i])

    for epoch in range(args.epochs):
        prompts = [p for _, p in train.draw_prompts(sources, P, args.seed, epoch) for _ in range(G)]
        noises = train.noise_for(args.seed, epoch, range(P * G), args.steps, (4, 4, 4))
        paths, rewards, ratios, divergences, norms = [], [], [], [], []
        for prompt, noise in zip(prompts, noises):
            path, _ = train.rollout(unet, schedule, texts[prompt], texts[""], noise[None], args.guidance)
            paths.append(path[0])
            with torch.no_grad():
                image = pipe.vae.decode(path[:, -1] / pipe.vae.config.scaling_factor).sample / 2 + 0.5
            z = embedder.text([prompt])
            target = (z + args.alpha * v) / (z + args.alpha * v).norm() if z @ v < 0 else z
            rewards.append(reward.reward(embedder, image.clamp(0, 1), target, [prompt]).item())
        A, live = train.group_advantages(torch.tensor(rewards).view(P, G), args.advantage_clip)
        groups = [sorted(range(G), key=lambda n: -abs(a[n])) for a in A]
        kept = [p * G + n for p, group in enumerate(groups) for n in sorted(group[:args.keep or G])]
        order = train.deal_pairs(kept, T, args.updates, args.seed, epoch)
        for k, pairs in enumerate(order.tolist()):
            for n, i in ((kept[place], i) for place, i in pairs):
                x, x_next, noise = paths[n][i:i + 1], paths[n][i + 1:i + 2], noises[n, i + 1]
                policy = following(unet, i, x, prompts[n])
                before = Normal(x_next - policy.stddev * noise, policy.stddev)
                new = policy.log_prob(x_next).mean()
                log_ratio = new - (before.log_prob(x_next).mean() if k else new.detach())
                nats, kl = kl_divergence(before, policy).mean(), log_ratio.exp() - 1 - log_ratio
                if args.kl_to == "ref":
                    start = following(frozen, i, x, prompts[n])
                    nats = kl = kl_divergence(policy, Normal(start.mean.detach(), start.stddev)).mean()
                ratio = (log_ratio * (gain[:T].mean() / gain[i] if args.even_steps else 1)).exp()
                objective = ppo(ratio, A.flatten()[n], args.clip) / live.float().mean()
                ((args.kl * kl - objective) / len(pairs)).backward()
                ratios.append(ratio.item())
                divergences.append(nats.item() * noise.numel())
            norms.append(torch.nn.utils.clip_grad_norm_(unet.parameters(), args.grad_clip).item())
            optimizer.step()
            optimizer.zero_grad()
        rho = np.array(ratios)
        far = (rho < 1 - args.clip).mean(), (rho > 1 + args.clip).mean()
        two = np.mean([r for r, prompt in zip(rewards, prompts) if prompt in TEXTS["two.txt"]])
        rows.append([rho.min(), rho.mean(), rho.max(), *far, np.mean(divergences), np.mean(norms), two])
    return unet.state_dict(), rows

@pytest.mark.parametrize(
    "kind", ["epsilon", "v_prediction --even-steps", "epsilon --kl-to ref --even-steps --keep 2"])
def test_the_loop_by_a_second_implementation(kind, tiny, flags, tmp_path, monkeypatch):
    """Two epochs of three updates, with a dead group before two live ones, where KL and clips bite."""
    monkeypatch.setattr(reward, "reward", half_dead)
    kind, *more = kind.split()
    model = edited(tiny, tmp_path / "sd", "scheduler", prediction_type=kind)
    prompts = [tiny / name for name in ("one.txt", "two.txt", "two.txt")]
    argv = flags("run", model=model, prompts=prompts, prompts_per_epoch=3, updates=3, clip=0.01, kl=3,
                 seed=1, weight_decay=3, grad_clip=0.5, advantage_clip=1, alpha=2, eta=0.8)
    args = train.parse_args(argv + more)
    train.main(args)
    trained, rows = second_implementation(args)
    assert deviation(weights(args.out / "checkpoint-2"), trained, weights(model)) < 0.01
    for row, theirs in zip(metrics(args.out), rows, strict=True):
        ours = [*row["ratio"], row["clip_low"], row["clip_high"], row["kl"], row["grad_norm"]]
        ours.append(row["reward/two"])  # of a file that is named twice
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-4) and row["dead_groups"] == 1

@pytest.mark.parametrize("noise", [0, 1e-3, 1])
def test_the_first_update_starts_at_ratio_one(noise, tiny, run, monkeypatch, tmp_path, capsys):
    """Exactly, with dropout in the config, and where training and rollout differ by rounding alone."""
    mean = train.ddim_mean
    monkeypatch.setattr(train, "ddim_mean", lambda *args: mean(*args) *
                        (1 + noise * torch.is_grad_enabled()))
    model = edited(tiny, tmp_path / "sd", "unet", dropout=0.1)
    with telling(capsys, "--clip 0.1", "--precision fp32") if noise == 1 else nullcontext():
        run("run", model=model, updates=1, kl=1, clip=0.1, even_steps=True)
    for row in metrics(tmp_path / "run")[noise == 1:]:
        assert row["ratio"] == [1, 1, 1] and row["clip_low"] == row["clip_high"] == row["kl"] == 0
        assert (row["on_policy_noise"] > 0) == (noise > 0)

@pytest.mark.parametrize("lora", [0, 2])
def test_a_half_precision_model_trains_in_fp32(lora, tiny, run, monkeypatch, tmp_path):
    """And its KL to the start, in the forward's bf16, begins at 0: both models are compiled, or none."""
    compiled = Mock()  # not all machines have a C++ compiler
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    monkeypatch.setattr(reward, "reward", half_dead)
    pipeline(tiny / "sd").to(torch.float16).save_pretrained(tmp_path / "half")
    changes = dict(kl_to="ref", lr=3e-3, updates=1, clip=1, lora=lora, precision="bf16", compile=True)
    out = run("run", model=tmp_path / "half", **changes)
    first, last = metrics(out)
    assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 1e-3
    trained = torch.load(out / "checkpoint-2/train_state.pt")["trained"].values()
    assert all(w.dtype == torch.float32 and (w != w.bfloat16()).any() for w in trained)
    assert [call.kwargs for call in compiled.call_args_list] == [{"dynamic": False}] * 2

def test_a_run_says_and_leaves(tiny, run, monkeypatch, tmp_path, capsys):
    calm, long = "a photo of " + ", ".join(["a red circle"] * 30), tmp_path / "$long$.csv"
    long.write_text(f'prompt\n"{calm}, on fire"\n"{calm}"\n""\na circle\n')
    (tmp_path / "one.txt").write_text("a circle on fire")  # which s(p) < 0 cannot split
    files = [tmp_path / "one.txt", tiny / "two.txt", long]
    out = run("run", prompts=files, prompts_per_epoch=3, updates=3)
    lines = capsys.readouterr().out.splitlines()
    count = sum(w.numel() for w in weights(tiny / "sd").values())
    parts = "3 prompts", "3 of 3 images", "3 steps", "3 update", "9 pairs", "3 per", f"{count:,} weights"
    assert all(part in lines[0] for part in parts)
    embedder = reward.Embedder(str(tiny / "clip"))
    v = reward.load_direction(embedder, tiny / "anchors.txt")
    share = (embedder.text(TEXTS["two.txt"].splitlines()) @ v < 0).float().mean().item()
    assert f"two.txt: 3 prompts, s(p) < 0 for {share:.1%}, 0 cut" in lines[2] and 0.1 < share < 0.9
    assert "warning" in lines[2] and "warning" not in lines[1]
    assert "3 prompts" in lines[3] and " 2 cut" in lines[3]
    files = "args.json checkpoint-1 checkpoint-2 grid-0.png grid-1.png grid-2.png metrics.jsonl"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    keys = "epoch reward/one reward/two reward/$long$ reward_std dead_groups ratio"
    keys += " clip_low clip_high on_policy_noise kl grad_norm seconds"
    assert [" ".join(row) for row in metrics(out)] == [keys] * 2 and metrics(out)[1]["epoch"] == 2
    first, last = (np.asarray(Image.open(out / f"grid-{n}.png")) for n in (0, 2))
    assert first.shape == (768, 1024, 3) and (first != last).any()

def test_lora_is_what_diffusers_loads_and_resumes(tiny, run, monkeypatch):
    """And ComfyUI, in Kohya's names: loaded, it predicts what the trained UNet in memory predicts."""
    saved = Mock(wraps=train.save)
    monkeypatch.setattr(train, "save", saved)
    out, pipe = run("run", lora=2, lr=0.05), pipeline(tiny / "sd")
    x, text = torch.randn(1, 4, 4, 4, generator=NOISE), torch.randn(1, 5, 16, generator=NOISE)
    start, trained = (unet(x, 500, text).sample for unet in (pipe.unet, saved.call_args.args[2].unet))
    layers = load_file(out / "checkpoint-2/pytorch_lora_weights.safetensors")
    for state in layers, convert_state_dict_to_kohya(layers):
        pipe.load_lora_weights(state)
        torch.testing.assert_close(pipe.unet(x, 500, text).sample, trained)
        pipe.unload_lora_weights()
    assert (start - trained).abs().max() > 0.01
    parts = run("parts", lora=2, lr=0.05, epochs=1)
    with open(parts / "metrics.jsonl", "a") as log:
        log.write('{"epoch": 2, "rew')  # of a kill
    resume(parts, "--epochs", "2", "--batch", "3")  # memory: 3 are a batch of --batch 4, too
    assert same_run(out, parts)

def test_a_picture_that_fails_is_a_warning_and_a_bug_a_traceback(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "make_image_grid", Mock(side_effect=OSError("no space left")))
    bug = Mock(wraps=reward.reward, side_effect=[DEFAULT, ZeroDivisionError])
    monkeypatch.setattr(reward, "reward", bug)
    with pytest.raises(ZeroDivisionError):
        run("run", batch=64)
    assert "warning" in capsys.readouterr().out and weights(tmp_path / "run/checkpoint-1")

@pytest.mark.parametrize("owner, name, call", [(reward, "reward", 2), (train, "surrogate", 3)])
def test_a_nan_is_told_before_the_weights_change(owner, name, call, run, monkeypatch, tmp_path, capsys):
    """In the second epoch, of its first prompt; the first epoch's checkpoint stays."""
    true, calls = getattr(owner, name), itertools.count(1)

    def first_is_nan(*args):
        place = torch.arange(len(args[1]))
        return true(*args) * torch.where((place > 0) | (next(calls) != call), 1, math.nan)

    monkeypatch.setattr(owner, name, first_is_nan)
    with telling(capsys, "epoch 2", "reward" if owner is reward else "gradient", "'a pink triangle'"):
        run("run", batch=64)
    assert len(metrics(tmp_path / "run")) == 1 and not (tmp_path / "run/checkpoint-2").exists()
    assert all(w.isfinite().all() for w in weights(tmp_path / "run/checkpoint-1").values())

SMALL = dict(generations=2, steps=3, epochs=3, save_every=2, kl_to="ref", kl=1)

@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An uninterrupted run of three epochs."""
    args = train.parse_args(command_line(tiny, tmp_path_factory.mktemp("whole") / "run", **SMALL))
    train.main(args)
    return args.out

def resume(out, *flags):
    train.main(train.parse_args(["--resume", str(out), *flags]))

@pytest.mark.parametrize("moment", [*range(1, 9), *["random"] * int(os.environ.get("KILLS", 2))])
def test_killed_and_resumed(moment, whole, flags, tmp_path):
    """By its n-th write (args.json, halves and names of two checkpoints, an old state), or at random."""
    argv, out, count = flags("run", **SMALL), tmp_path / "run", itertools.count(1)

    def kill(event, args):
        write = event in ("os.rename", "os.remove") or event == "os.mkdir" and "vae" in str(args[0])
        if write and str(out) in str(args[0]) and next(count) == moment:  # not the .pyc of an import
            os.kill(os.getpid(), 9)

    child = os.fork()
    if child == 0:
        sys.addaudithook(kill)
        try:
            train.main(train.parse_args(argv))
        finally:
            os._exit(0)
    if moment == "random":
        time.sleep(np.random.uniform(0, 1.5))
        os.kill(child, 9)
    assert os.waitpid(child, 0)[1] == 9 or moment == "random"
    for checkpoint in out.glob("checkpoint-*"):
        pipeline(checkpoint)
    train.main(train.parse_args(["--resume", str(out)] if (out / "args.json").exists() else argv))
    assert same_run(whole, out)

@pytest.mark.parametrize(
    "damage", ["truncate -s 9999 */*state.pt", "rm args.json", "rm */*state.pt", "echo [1] > args.json"])
def test_damaged_runs_are_told(damage, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    assert os.system(f"cd {out} && {damage}") == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    with telling(capsys, f"--resume {out}"):
        resume(out)
    assert before == {path: path.read_bytes() for path in out.rglob("*.*")}

def test_flags_of_presets_and_runs(whole, tmp_path, capsys):
    """@FILE has comments, and later flags win; --resume takes the run's flags, and no others."""
    preset, stored = tmp_path / "a.args", json.loads((whole / "args.json").read_text())
    preset.write_text(f"# comment\n--lr 3e-4 --out {tmp_path}/r # more\n--epochs 7 --prompts a 'b c'\n")
    args = train.parse_args([f"@{preset}", "--epochs", "2"])
    assert (args.lr, args.epochs, args.prompts) == (3e-4, 2, ["a", "b c"])
    args = vars(train.parse_args(["--resume", str(whole), "--batch", "3"]))
    assert json.loads(json.dumps(args, default=str)) == stored | dict(batch=3, resume=str(whole))
    preset.write_text("--prompts 'a.txt\n")
    for flag in (f"@{preset}", "--lr 0.002", "--lora 2", "--prompts a", "--kl-to old", "--even-steps"):
        with telling(capsys, *flag.replace(str(preset), "FILE").split()):
            train.parse_args(["--resume", str(whole), *flag.split()])

@pytest.fixture(scope="module")
def bad(tiny, tmp_path_factory):
    """A folder of models that train.py cannot train."""
    folder, trailing = tmp_path_factory.mktemp("bad"), dict(timestep_spacing="trailing")
    edited(tiny, folder / "trailing", "scheduler", **trailing)
    edited(tiny, folder / "zero_snr", "scheduler", **trailing, rescale_betas_zero_snr=True)
    edited(tiny, folder / "sample", "scheduler", prediction_type="sample")
    edited(tiny, folder / "thresholding", "scheduler", thresholding=True)
    edited(tiny, folder / "key", "unet", layers_per_block=2)
    sdxl = dict(addition_embed_type="text_time", projection_class_embeddings_input_dim=32)
    for name, change in ("nine", dict(in_channels=9)), ("sdxl", sdxl | dict(addition_time_embed_dim=8)):
        unet = edited(tiny, folder / name, "unet", **change) / "unet"
        UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(unet)).save_pretrained(unet)
    (folder / "blank.csv").write_text('prompt,x\n"",1\n')
    return folder

BAD = """--alpha -0.1, --lr nan, --clip inf, --eta 0, --eta 1e-60, --eta 1.5, --epochs 0, --guidance 0
--kl -1, --seed -1, --steps 1.5, --kl-to x, --none 1, --out tests, --out LICENSE, --lr x, --out LICENSE/x
--updates 5, --keep 1, --keep 4, --generations 1, --steps 1, --steps 1000, --prompts no.txt, --clip 0
--lr 0, --prompts LICENSE, --prompts BAD/blank.csv, --anchors no.txt, --anchors LICENSE, --model toy/sdd
--reward toy/sd, --model BAD/nine, --model BAD/sdxl, --model BAD/key, --model BAD/zero_snr, --batch 0
--model BAD/sample, --steps 61 --updates 1 --model BAD/trailing, --steps 5 --model BAD/thresholding"""

@pytest.mark.parametrize("flag", re.split(", |\n", BAD))
def test_bad_flags_and_files_are_told(flag, bad, flags, tmp_path, monkeypatch, capsys):
    """In one line with flag and value, or the file's name; nothing is written."""
    monkeypatch.chdir(ROOT)
    flag = flag.replace("BAD", str(bad)).split()
    with telling(capsys, *flag[flag[0] == "--prompts":2]):
        train.main(train.parse_args(flags("run") + flag))
    assert not (tmp_path / "run").exists()

def test_out_of_memory_and_ranks_are_told(flags, run, monkeypatch, capsys):
    monkeypatch.setattr(reward, "reward", Mock(side_effect=torch.OutOfMemoryError))
    with telling(capsys, "--batch", "--gradient-checkpointing", "--lora"):
        start("train.py", *flags("run"))
    monkeypatch.setattr(train, "rank_and_device", lambda: (0, 3, torch.device("cpu")))
    monkeypatch.setattr(train.dist, "init_process_group", Mock())
    with telling(capsys, "--prompts-per-epoch 4", "3 ranks"):
        run("ranks", prompts_per_epoch=4)

def test_a_script_tells_too(bad, flags, tmp_path):
    """As a user starts it: nothing that an import prints drowns the line."""
    told(script("train.py", *flags("run", model=bad / "key")), f"--model {bad / 'key'}", "missing_keys")
    assert not (tmp_path / "run").exists()
