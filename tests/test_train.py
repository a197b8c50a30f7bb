"""train.py: each equation against an oracle, the loop against a slow second implementation, and what a run
must hold, on runs of a second."""
import copy
import itertools
import json
import math
import os
import random
import runpy
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch.distributions import Normal, kl_divergence

import reward
import train
from conftest import (ROOT, SCHEDULE, TEXTS, command_line, distance, metrics, same_run, script, telling,
                      told, weights)

NOISE = torch.Generator().manual_seed(0)
DRAW_GRID = train.draw_grid

@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):  # which take a third of a tiny run's time
    monkeypatch.setattr(train, "draw_grid", lambda *args: None)

def pipeline(folder):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)

def edited(tiny, folder, part, **changes):
    """A copy of the tiny pipeline in folder, whose part's config is changed."""
    file, = (shutil.copytree(tiny / "sd", folder) / part).glob("*config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder

def deviation(a, b, start):
    """The distance of two trained UNets, as a part of their way from the start. (Adam moves the few weights
    whose gradient is rounding alone by a whole lr, so that the largest difference says nothing.)"""
    between, way = (torch.cat([(a[k] - other[k]).flatten() for k in a]) for other in (b, start))
    return (between.norm() / way.norm()).item()

# ------------------------------------------------------------ the policy
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("alpha_one", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_step_is_diffusers(spacing, alpha_one, prediction_type):
    config = dict(set_alpha_to_one=alpha_one, prediction_type=prediction_type, timestep_spacing=spacing)
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

def test_log_prob_is_the_mean_of_a_normal():
    x, mu = torch.randn(2, 5, 4, 4, 4, generator=NOISE)
    sigma = torch.tensor([1e-2, 0.1, 0.5, 1, 3])
    expected = Normal(mu, sigma.view(-1, 1, 1, 1)).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(train.log_prob(x, mu, sigma), expected)

@pytest.mark.parametrize("bf16", [False, True])
def test_rollout_is_repeated_by_training_and_by_the_pipeline(bf16, tiny):
    """To the last bit: latents are fp32, each the mean plus the noise it is scored with; the last the mean.
    Without noise they are the pipeline's."""
    pipe, prompts = pipeline(tiny / "sd"), ["a circle", "a square", "fire"]
    pipe.scheduler.set_timesteps(5)
    text, empty = (pipe.encode_prompt(p, "cpu", 1, False)[0].detach() for p in (prompts, [""]))
    noise, schedule = train.noise_for(0, 0, range(3), 5,
                                      (4, 4, 4)), train.ddim_schedule(pipe.scheduler, 1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        x, means = train.rollout(pipe.unet, schedule, text, empty, noise, 2.0)
        assert x.dtype == means.dtype == torch.float32 and (x != x.bfloat16()).any()
        for i, t in enumerate(pipe.scheduler.timesteps):
            out = train.predict_noise(pipe.unet, x[:, i], t.expand(3), text, empty, 2.0)
            mu = train.ddim_mean(schedule, torch.tensor([i] * 3), x[:, i], out)
            drawn = mu + schedule.sigma[i] * noise[:, i + 1] if i < 4 else mu
            assert torch.equal(means[:, i], mu) and torch.equal(x[:, i + 1], drawn)
    schedule = train.ddim_schedule(pipe.scheduler, 0.0)
    for guidance in (1.0, 4.0):
        theirs = pipe(prompts, num_inference_steps=5, guidance_scale=guidance, latents=noise[:, 0],
                      output_type="latent").images
        ours, _ = train.rollout(pipe.unet, schedule, text, empty, noise, guidance)
        torch.testing.assert_close(ours[:, -1], theirs, rtol=1e-4, atol=1e-4)

# ------------------------------------------------------------ GRPO
def test_advantages_by_hand():
    """(1, 3): mean 2, std 1. Fifteen 0s and a 1: sqrt(15), clipped. No spread, or rounding alone: dead."""
    rewards = torch.tensor([[1.0, 3], [0.3, 0.3 + 3e-8], [0.3, 0.3003]])
    advantages, live = train.group_advantages(rewards, 5.0)
    assert live.tolist() == [True, False, True] and not advantages[1].any()
    torch.testing.assert_close(advantages[[0, 2]], torch.tensor([[-1.0, 1]] * 2), rtol=0, atol=1e-3)
    advantages, _ = train.group_advantages(torch.tensor([[0.0] * 15 + [1], [1.0] * 15 + [0]]), 2.5)
    assert advantages[:, -1].tolist() == [2.5, -2.5]
    assert advantages[0, 0].item() == pytest.approx(-1 / math.sqrt(15))

def ppo(ratio, advantage, clip):
    """PPO's objective by case: constant where the ratio has gone far enough in the right direction."""
    if advantage > 0 and ratio > 1 + clip:
        return (1 + clip) * advantage + 0 * ratio
    if advantage < 0 and ratio < 1 - clip:
        return (1 - clip) * advantage + 0 * ratio
    return ratio * advantage

@pytest.mark.parametrize("clip", [0.2, 1e-4])
def test_surrogate_and_its_gradient_are_ppos(clip):
    cases = list(itertools.product((-0.5, -5e-5, 0.0, 5e-5, 0.5), (-2.0, 0.5)))
    log_ratio, advantages = torch.tensor(cases, dtype=torch.float64).T
    log_ratio.requires_grad_()
    ours = train.surrogate(log_ratio, advantages, clip)
    theirs = torch.stack([ppo(x.exp(), a, clip) for x, a in zip(log_ratio, advantages)])
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(value.sum(), log_ratio) for value in (ours, theirs))
    torch.testing.assert_close(ours, theirs)

def test_kl_is_torchs():
    """k3: its mean over samples of the old policy, never negative. The closed form: kl_divergence."""
    old, new = Normal(0.0, 1.0), Normal(0.4, 1.0)
    x = torch.randn(200_000, dtype=torch.float64, generator=NOISE)
    k3 = train.kl_k3(new.log_prob(x) - old.log_prob(x))
    assert k3.min() >= 0 and k3.mean().item() == pytest.approx(kl_divergence(old, new).item(), rel=0.02)
    a, b = torch.randn(2, 4, 2, 3, 3, generator=NOISE)
    sigma = torch.tensor([0.05, 0.3, 1.0, 2.0]).view(-1, 1, 1, 1)
    expected = kl_divergence(Normal(a, sigma), Normal(b, sigma)).mean((1, 2, 3))
    torch.testing.assert_close(train.kl_gaussian(a, b, sigma.flatten()), expected)

# ------------------------------------------------------------ chance, ranks and micro-batches
@pytest.mark.parametrize("samples, timesteps, updates", [(8, 9, 6), (6, 4, 3), (4, 49, 14)])
def test_pairs_are_dealt_alike_on_any_ranks(samples, timesteps, updates):
    whole = train.deal_pairs(range(samples), timesteps, updates, 0, 5)
    everything = list(itertools.product(range(samples), range(timesteps)))
    assert len(whole) == updates and sorted(map(tuple, whole.flatten(0, 1).tolist())) == everything
    assert not torch.equal(whole, train.deal_pairs(range(samples), timesteps, updates, 0, 6))
    first, second = torch.arange(samples).chunk(2)
    parts = [train.deal_pairs(part.tolist(), timesteps, updates, 0, 5) for part in (first, second)]
    parts[1][..., 0] += len(first)
    for both, k in zip(torch.cat(parts, 1), whole):
        assert sorted(both.tolist()) == sorted(k.tolist())

def test_prompts_and_noise_are_functions_of_the_seed():
    sources = [list("abcdefgh"), list("xyz")]
    drawn = train.draw_prompts(sources, 6, 0, 1)
    assert drawn == train.draw_prompts(sources, 6, 0, 1) != train.draw_prompts(sources, 6, 1, 1)
    assert [s for s, _ in drawn] == [0] * 3 + [1] * 3 and len(set(drawn)) == 6
    assert all(prompt in sources[s] for s, prompt in drawn)
    assert len(train.draw_prompts([["a"]], 3, 0, 0)) == 3  # repeated rather than refused
    shares = [sum(s for s, _ in train.draw_prompts(sources, 3, 0, epoch)) for epoch in range(200)]
    assert set(shares) == {1, 2} and sum(shares) / 600 == pytest.approx(0.5, abs=0.05)
    whole = train.noise_for(7, 3, range(6), 4, (4, 2, 2))
    assert torch.equal(train.noise_for(7, 3, [5, 2], 4, (4, 2, 2)), whole[[5, 2]])
    assert whole.dtype == torch.float32 and whole.unique().numel() == whole.numel()
    for seed, epoch in ((7, 4), (8, 3)):
        assert not torch.isin(train.noise_for(seed, epoch, range(6), 4, (4, 2, 2)), whole).any()

@pytest.mark.parametrize("n, size", [(9, 4), (4, 9), (8, 4), (1, 1), (196, 16)])
def test_micro_batches_have_one_shape(n, size):
    batches = train.micro_batches(n, size)
    assert {(len(index), len(weight)) for index, weight in batches} == {(min(n, size), ) * 2}
    index, weight = (torch.cat(column) for column in zip(*batches))
    assert index[weight > 0].tolist() == list(range(n)) and set(weight.tolist()) <= {0, 1}
    assert len(batches) == math.ceil(n / size) and index.max() < n

def test_memory_flags_are_not_maths(tiny, run, monkeypatch):
    """And the last micro-batch, here of 1 sample or 4 pairs, has the shape of the others."""
    shapes, forward = set(), UNet2DConditionModel.forward

    def record(self, x, *rest):
        shapes.add(len(x))
        return forward(self, x, *rest)

    start, plain = weights(tiny / "sd"), weights(run("plain", batch=64, kl=1) / "checkpoint-2")
    monkeypatch.setattr(UNet2DConditionModel, "forward", record)
    for name, changes in dict(batch=dict(), both=dict(gradient_checkpointing=True)).items():
        changed = weights(run(name, batch=5, kl=1, **changes) / "checkpoint-2")
        assert deviation(changed, plain, start) < 2e-3 and shapes == {10}

LIVE = "lambda e, images, _, prompts: images.mean((1, 2, 3)) * torch.tensor(['c' in p for p in prompts])"

def test_two_ranks_train_as_one(tiny, run, flags, monkeypatch, tmp_path):
    """torchrun and gloo, with live and dead groups: the same weights and metrics."""
    driver, two = tmp_path / "driver.py", tmp_path / "two"
    driver.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reward, torch, train\n"
                      f"reward.reward = {LIVE}\ntrain.main(train.parse_args())\n")
    monkeypatch.setattr(reward, "reward", eval(LIVE))
    changes = dict(lr=1e-4, kl=1, even_steps=True, prompts_per_epoch=4, updates=3, clip=1e-3)
    one, done = run("one", **changes), script(driver, *flags("two", **changes), ranks=2)
    assert done.returncode == 0, done.stderr
    a, b = (weights(out / "checkpoint-2") for out in (one, two))
    assert deviation(a, b, weights(
        tiny / "sd")) < 1e-3 and (a["conv_in.bias"] - b["conv_in.bias"]).norm() < 1e-6
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert 0 < a["dead_groups"] < 4
        for name in a.keys() - {"seconds_rollout", "seconds_update"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=2e-6), name

def test_groups_that_do_not_split_over_ranks_are_told(run, monkeypatch, capsys):
    monkeypatch.setattr(train, "rank_and_device", lambda: (0, 3, torch.device("cpu")))
    monkeypatch.setattr(train.dist, "init_process_group", Mock())
    with telling(capsys, "--prompts-per-epoch 4", "3 ranks"):
        run("run", prompts_per_epoch=4)

# ------------------------------------------------------------ the loop
def second_implementation(args):
    """The run of args, a pair at a time, with diffusers' step, torch's Normal, clip_grad_norm_ and AdamW:
    the trained UNet and some of each epoch's metrics."""
    pipe, embedder = pipeline(args.model), reward.Embedder(args.reward)
    unet, frozen, scheduler = pipe.unet, copy.deepcopy(pipe.unet), pipe.scheduler
    v = reward.load_direction(embedder, args.anchors)
    sources = [Path(file).read_text().splitlines() for file in args.prompts]
    texts = {p: pipe.encode_prompt([p], "cpu", 1, False)[0].detach() for p in [""] + sum(sources, [])}
    optimizer = torch.optim.AdamW(unet.parameters(), args.lr, weight_decay=args.weight_decay)
    zero, one = torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4)
    P, G, T = args.prompts_per_epoch, args.generations, args.steps - 1
    scheduler.set_timesteps(args.steps)
    times, rows = scheduler.timesteps, []

    def step(out, i, x, noise):
        return scheduler.step(out, times[i], x, args.eta, variance_noise=noise).prev_sample

    def following(net, i, x, prompt, noise):
        out, empty = net(torch.cat([x, x]), times[i], torch.cat([texts[prompt],
                                                                 texts[""]])).sample.split(1)
        return step(empty + args.guidance * (out - empty), i, x, noise)

    sigma = [step(zero, i, zero, one).mean().item() for i in range(T)]
    gain = np.array([abs(step(one, i, zero, zero).mean().item()) / sigma[i] for i in range(T)])
    for epoch in range(args.epochs):
        drawn = train.draw_prompts(sources, P, args.seed, epoch)
        prompts = [prompt for _, prompt in drawn for _ in range(G)]
        noises = train.noise_for(args.seed, epoch, range(P * G), args.steps, (4, 4, 4)).unsqueeze(2)
        paths, rewards, ratios, divergences, norms = [], [], [], [], []
        for prompt, noise in zip(prompts, noises):
            paths.append([noise[0]])
            with torch.no_grad():
                for i in range(args.steps):
                    z = noise[i + 1] if i < T else zero
                    paths[-1].append(following(unet, i, paths[-1][i], prompt, z))
                image = pipe.vae.decode(paths[-1][-1] / pipe.vae.config.scaling_factor).sample / 2 + 0.5
            z = embedder.text([prompt])
            target = F.normalize(z + args.alpha * v) if z @ v < 0 else z
            rewards.append(reward.reward(embedder, image.clamp(0, 1), target, [prompt]).item())
        r = np.array(rewards).reshape(P, G)
        std = r.std(1, keepdims=True)
        A = ((r - r.mean(1, keepdims=True)) / (std + 1e-12)).flatten()
        A = A.clip(-args.advantage_clip, args.advantage_clip)
        order = train.deal_pairs(range(P * G), T, args.updates, args.seed, epoch)
        for k, pairs in enumerate(order.tolist()):
            for n, i in pairs:
                x, x_next, noise = *paths[n][i:i + 2], noises[n, i + 1]
                before = Normal(x_next - sigma[i] * noise, sigma[i])
                policy = Normal(following(unet, i, x, prompts[n], zero), sigma[i])
                new = policy.log_prob(x_next).mean()
                log_ratio = new - (before.log_prob(x_next).mean() if k else new.detach())
                nats, kl = kl_divergence(before, policy).mean(), log_ratio.exp() - 1 - log_ratio
                if args.even_steps:
                    log_ratio = (log_ratio + nats) * gain.mean() / gain[i]
                if args.kl_to == "ref":
                    start = Normal(following(frozen, i, x, prompts[n], zero).detach(), sigma[i])
                    nats = kl = kl_divergence(policy, start).mean()
                objective = ppo(log_ratio.exp(), A[n], args.clip) / (std > 0).mean()
                ((args.kl * kl - objective) / len(pairs)).backward()
                ratios.append(log_ratio.exp().item())
                divergences.append(nats.item() * zero.numel())
            norms.append(torch.nn.utils.clip_grad_norm_(unet.parameters(), args.grad_clip).item())
            optimizer.step()
            optimizer.zero_grad()
        x = np.array(ratios)
        rows.append(
            dict(ratio=[x.min(), x.mean(), x.max()], clip_low=(x < 1 - args.clip).mean(),
                 clip_high=(x > 1 + args.clip).mean(), kl=np.mean(divergences), grad_norm=np.mean(norms),
                 dead_groups=(std == 0).sum(), reward_std=std.mean()))
    return unet.state_dict(), rows

@pytest.mark.parametrize("kind, changes", [("epsilon", dict(kl_to="old")),
                                           ("v_prediction", dict(kl_to="old", even_steps=True)),
                                           ("epsilon", dict(kl_to="ref", even_steps=True))])
def test_the_loop_by_a_second_implementation(kind, changes, tiny, flags, tmp_path, monkeypatch):
    """Two epochs of three updates, with a dead group before two live ones, where KL and clips bite."""
    def half_dead(embedder, images, targets, prompts, true=reward.reward):
        live = torch.tensor([prompt not in TEXTS["one.txt"] for prompt in prompts])
        return live * true(embedder, images, targets, prompts)

    monkeypatch.setattr(reward, "reward", half_dead)
    model = edited(tiny, tmp_path / "sd", "scheduler", prediction_type=kind)
    prompts = [tiny / "one.txt"] + [tiny / "two.txt"] * 2
    args = train.parse_args(
        flags("run", model=model, prompts=prompts, prompts_per_epoch=3, updates=3, clip=0.01, kl=3,
              seed=1, weight_decay=3, grad_clip=0.5, advantage_clip=1, alpha=2, eta=0.8, **changes))
    train.main(args)
    trained, rows = second_implementation(args)
    assert deviation(weights(args.out / "checkpoint-2"), trained, weights(model)) < 0.01
    for ours, row in zip(metrics(args.out), rows, strict=True):
        for name, theirs in row.items():
            assert ours[name] == pytest.approx(theirs, rel=1e-2, abs=1e-4), name

@pytest.mark.parametrize("noise", [0, 1e-3, 1])
def test_the_first_update_starts_at_ratio_one(noise, tiny, flags, monkeypatch, tmp_path, capsys):
    """Exactly, with dropout in the config, and if rollout and training differ by rounding; not by more."""
    def mean(*args, true=train.ddim_mean):
        return true(*args) * (1 if torch.is_grad_enabled() else 1 + noise)

    monkeypatch.setattr(train, "ddim_mean", mean)
    model = edited(tiny, tmp_path / "sd", "unet", dropout=0.1)
    args = train.parse_args(flags("run", model=model, updates=1, kl=1, clip=0.1, even_steps=True))
    with telling(capsys, "--clip 0.1", "--precision fp32") if noise == 1 else nullcontext():
        train.main(args)
    assert len(metrics(args.out)) == 2 - (noise == 1)
    for row in metrics(args.out):
        assert row["ratio"] == [1, 1, 1] and row["clip_low"] == row["clip_high"] == row["kl"] == 0
        assert (row["on_policy_noise"] > 0) == (noise > 0)

@pytest.mark.parametrize(
    "changes", [{}, dict(precision="bf16"), dict(precision="bf16", lora=2)], ids=str)
def test_kl_to_the_start_model_is_zero_at_first(changes, run):
    first, last = metrics(run("run", kl_to="ref", lr=3e-3, updates=1, clip=1, save_every=9, **changes))
    assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 1e-3

def test_bf16_trains_fp32_weights_by_an_fp32_reward(tiny, run, monkeypatch, tmp_path):
    """From a folder in half precision."""
    def fp32(embedder, images, *rest, true=reward.reward):
        assert images.dtype == embedder.clip.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return true(embedder, images, *rest)

    monkeypatch.setattr(reward, "reward", fp32)
    pipeline(tiny / "sd").to(torch.float16).save_pretrained(tmp_path / "half")
    out = run("run", model=tmp_path / "half", precision="bf16", epochs=1, clip=1)
    w = weights(out / "checkpoint-1")["conv_in.weight"]
    assert w.dtype == torch.float32 and (w != w.bfloat16()).any() and (w != w.half()).any()

def test_flags_are_used(run):
    """Each changes the weights, as do those that the second implementation knows."""
    plain = run("plain", epochs=1)
    for changes in (dict(steer="none"), dict(steer="always"), dict(guidance=1), dict(seed=1)):
        changed = run(str(changes), epochs=1, **changes)
        assert distance(changed / "checkpoint-1", plain / "checkpoint-1") > 1e-5, changes

def test_dead_groups_teach_nothing(tiny, run, monkeypatch):
    monkeypatch.setattr(reward, "reward", lambda e, images, *rest: images.new_ones(len(images)))
    out = run("run", epochs=1, kl=0, weight_decay=0)
    assert metrics(out)[0]["dead_groups"] == 2 and distance(out / "checkpoint-1", tiny / "sd") == 0

def test_training_raises_brightness(run, monkeypatch):
    """A reward of one's own, which needs no CLIP."""
    monkeypatch.setattr(reward, "reward", lambda e, images, *rest: images.mean((1, 2, 3)))
    rows = metrics(
        run("run", epochs=12, generations=16, batch=96, updates=1, guidance=1, lr=5e-3, kl=0,
            even_steps=True, save_every=99))
    first, *_, last = ((row["reward/one"] + row["reward/two"]) / 2 for row in rows)
    assert last - first > 1.5 * rows[0]["reward_std"]

# ------------------------------------------------------------ what a run says and leaves
def test_the_start_up_lines(tiny, run, tmp_path, capsys):
    """Batch arithmetic; the share with s(p) < 0 and the number of prompts whose end is cut, for each file."""
    calm, long = "a photo of " + ", ".join(["a red circle"] * 30), tmp_path / "long.csv"
    long.write_text(f'prompt\n"{calm}, on fire"\n"{calm}"\n""\na circle\n')
    run("run", prompts=[tiny / "one.txt", tiny / "two.txt", long], prompts_per_epoch=3, updates=3,
        epochs=1)
    arithmetic, *lines = capsys.readouterr().out.splitlines()
    count = sum(w.numel() for w in weights(tiny / "sd").values())
    parts = "3 prompts", "3 images", "3 steps", "3 update", "9 pairs", "4 per", f"{count:,} weights"
    assert all(part in arithmetic for part in parts), arithmetic
    embedder = reward.Embedder(str(tiny / "clip"))
    z = embedder.text(["a circle calm", "a square calm", "a circle on fire", "a square burning"])
    z = embedder.text(TEXTS["two.txt"].splitlines()) @ (z[0] + z[1] - z[2] - z[3])
    share = (z < 0).float().mean().item()
    assert 0.1 < share < 0.9 and "warning" in lines[1] and "warning" not in lines[0]
    assert f"two.txt: 3 prompts, s(p) < 0 for {share:.1%}, 0 cut" in lines[1]
    assert "long.csv: 3 prompts" in lines[2] and " 2 cut" in lines[2] and len(lines) == 3

def test_a_run_leaves_a_log_pictures_and_a_pipeline(tiny, run, monkeypatch, tmp_path):
    """The checkpoint, loaded by diffusers alone, draws the pictures of the weights in memory."""
    monkeypatch.setattr(train, "draw_grid", DRAW_GRID)
    out = run("run", prompts=[shutil.copy(tiny / "one.txt", tmp_path / "$one$.txt"), tiny / "two.txt"])
    files = "args.json checkpoint-1 checkpoint-2 grid-0.png grid-1.png grid-2.png metrics.jsonl"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    keys = "epoch reward/$one$ reward/two reward_std dead_groups unsafe_prompts ratio clip_low clip_high "
    keys += "on_policy_noise kl grad_norm seconds_rollout seconds_update"
    assert [" ".join(row) for row in metrics(out)] == [keys] * 2 and metrics(out)[1]["epoch"] == 2
    pipe, state = pipeline(out / "checkpoint-2"), torch.load(out / "checkpoint-2/train_state.pt")
    assert all(torch.equal(p, state["trained"][name]) for name, p in pipe.unet.named_parameters())
    picture, = pipe("a circle on fire", num_inference_steps=4, guidance_scale=2.0, eta=1.0,
                    generator=torch.Generator().manual_seed(0)).images
    theirs = np.asarray(picture.resize((256, 256), Image.BOX))[128:]  # below the label
    for n in (0, 2):
        grid = np.asarray(Image.open(out / f"grid-{n}.png")).astype(int)
        assert grid.shape == (512, 1024, 3) and (abs(grid[128:256, :256] - theirs).max() > 1) == (n == 0)

def test_lora_is_what_diffusers_loads_and_resumes(tiny, run):
    out, parts = run("run", lora=2, lr=0.05), run("parts", lora=2, lr=0.05, epochs=1)
    resume(parts, "--epochs", "2")
    assert same_run(out, parts)
    pipe, base = pipeline(tiny / "sd"), weights(tiny / "sd")
    pipe.load_lora_weights(out / "checkpoint-2")
    state = torch.load(out / "checkpoint-2/train_state.pt")["trained"]
    names = {
        name: name.replace(".base_layer", "").replace("default_0", "default")
        for name in pipe.unet.state_dict()
    }
    loaded = {names[name]: w for name, w in pipe.unet.state_dict().items()}
    assert loaded.keys() == base.keys() | state.keys()
    assert all(torch.equal(w, loaded[name]) for name, w in (base | state).items())

def test_a_picture_that_fails_is_a_warning(run, monkeypatch, capsys):
    monkeypatch.setattr(train, "draw_grid", DRAW_GRID)
    monkeypatch.setattr(train, "make_image_grid", Mock(side_effect=OSError("no space left")))
    out = run("run", epochs=1)
    assert "warning" in capsys.readouterr().out and weights(out / "checkpoint-1")

def test_a_bug_keeps_its_traceback_and_out_of_memory_is_told(flags, run, monkeypatch, capsys):
    monkeypatch.setattr(reward, "reward", Mock(side_effect=[ZeroDivisionError, torch.OutOfMemoryError]))
    with pytest.raises(ZeroDivisionError):
        run("bug")
    monkeypatch.setattr(sys, "argv", ["train.py", *flags("run")])
    with telling(capsys, "--batch", "--gradient-checkpointing", "--lora"):
        runpy.run_path(train.__file__, run_name="__main__")

@pytest.mark.parametrize("owner, name, call", [(reward, "reward", 2), (train, "surrogate", 3)])
def test_a_nan_is_told_before_the_weights_change(owner, name, call, run, monkeypatch, tmp_path, capsys):
    """In the second epoch, of its first prompt; the first epoch's checkpoint stays."""
    calls, true = itertools.count(1), getattr(owner, name)

    def first_is_nan(*args):
        values = true(*args)
        values[0] *= math.nan if next(calls) == call else 1
        return values

    monkeypatch.setattr(owner, name, first_is_nan)
    sources = [TEXTS[file].splitlines() for file in ("one.txt", "two.txt")]
    (_, prompt), _ = train.draw_prompts(sources, 2, 0, 1)
    with telling(capsys, "epoch 2", "reward" if owner is reward else "gradient", repr(prompt)):
        run("run", batch=64)
    assert len(metrics(tmp_path / "run")) == 1 and not (tmp_path / "run/checkpoint-2").exists()
    assert all(w.isfinite().all() for w in weights(tmp_path / "run/checkpoint-1").values())

# ------------------------------------------------------------ interrupted and resumed
SMALL = dict(generations=2, steps=3, epochs=3, save_every=2, kl_to="ref", kl=1)

@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An uninterrupted run of three epochs."""
    args = train.parse_args(command_line(tiny, tmp_path_factory.mktemp("whole") / "run", **SMALL))
    train.main(args)
    return args.out

def resume(out, *flags):
    train.main(train.parse_args(["--resume", str(out), *flags]))

def test_stopped_and_resumed_is_uninterrupted(whole, run):
    """The run's own flags hold, and the frozen start model is the start's; --batch is memory."""
    out = run("run", **SMALL | dict(epochs=1))
    resume(out, "--epochs", "3")
    assert same_run(whole, out)
    resume(out, "--epochs", "4", "--batch", "3")
    assert [row["epoch"] for row in metrics(out)] == [1, 2, 3, 4] and (out / "checkpoint-4").exists()

def test_ctrl_c_before_any_checkpoint_and_resumed(whole, run, monkeypatch, tmp_path):
    """Two epochs are logged, and half a line of the third; the run starts again."""
    stop = Mock(wraps=train.draw_prompts, side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "draw_prompts", stop)
        run("run", **SMALL | dict(save_every=9))
    log = tmp_path / "run/metrics.jsonl"
    assert len(log.read_text().splitlines()) == 2
    log.write_text(log.read_text() + '{"epoch": 3, "rew')
    resume(log.parent)
    assert same_run(whole, log.parent)

def start(argv, moment=0):
    """train.py in a child process, which kills itself before its write number `moment`: its process id."""
    child, count = os.fork(), itertools.count(1)
    if child:
        return child

    def kill(event, args):
        if event in ("os.rename",
                     "os.remove") or event == "os.mkdir" and "checkpoint/vae" in str(args[0]):
            if next(count) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(kill)
        train.main(train.parse_args(argv))
        os._exit(0)
    finally:
        os._exit(1)

def end_is_the_same(child, argv, out, whole):
    """Once it has ended all checkpoints there load, and the resumed run ends as the uninterrupted one."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for checkpoint in out.glob("checkpoint-*"):
        pipeline(checkpoint)
    train.main(train.parse_args(["--resume", str(out)] if (out / "args.json").exists() else argv))
    return code, same_run(whole, out)

def test_killed_before_each_write_and_resumed(whole, flags, tmp_path):
    """Of two files, half of two checkpoints, their names, the old state: the eighth does not come."""
    for n in range(1, 9):
        argv, out = flags(f"{n}", **SMALL), tmp_path / f"{n}"
        code, same = end_is_the_same(start(argv, n), argv, out, whole)
        assert same and code == (-signal.SIGKILL if n < 8 else 0), n

@pytest.mark.parametrize("kill", range(int(os.environ.get("KILLS", 2))))
def test_killed_at_a_random_moment_and_resumed(kill, whole, flags, tmp_path):
    """KILLS=10 for as many."""
    argv = flags("run", **SMALL)
    child = start(argv)
    time.sleep(random.uniform(0, 1.5))
    os.kill(child, signal.SIGKILL)
    assert end_is_the_same(child, argv, tmp_path / "run", whole)[1]

# ------------------------------------------------------------ bad input
@pytest.mark.parametrize("file, content", [("checkpoint-3/train_state.pt", "half"), ("args.json", "[1]"),
                                           ("checkpoint-3/train_state.pt", ""), ("args.json", "{")])
def test_damaged_runs_are_told(file, content, whole, tmp_path, capsys):
    """In one line, and they stay as they were."""
    out = shutil.copytree(whole, tmp_path / "run")
    size = (out / file).stat().st_size
    os.truncate(out / file, size // 2) if content == "half" else (out / file).write_text(content)
    content or (out / file).unlink()
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    with telling(capsys, f"--resume {out}"):
        resume(out)
    assert before == {path: path.read_bytes() for path in out.rglob("*.*")}

def test_flags_of_presets_and_runs(whole, tmp_path, capsys):
    """@FILE has comments, and later flags win; --resume takes the run's flags, and no others."""
    preset, stored = tmp_path / "a.args", json.loads((whole / "args.json").read_text())
    preset.write_text(
        f"# comment\n--lr 3e-4 --out {tmp_path}/run # more\n--epochs 7 --prompts a 'b c'\n")
    args = train.parse_args([f"@{preset}", "--epochs", "2"])
    assert (args.lr, args.epochs, args.prompts) == (3e-4, 2, ["a", "b c"])
    args = vars(train.parse_args(["--resume", str(whole), "--batch", "3"]))
    assert json.loads(json.dumps(args, default=str)) == stored | dict(batch=3, resume=str(whole))
    preset.write_text("--prompts 'a.txt\n")
    for flag in (f"@{preset}", "--lr 0.002", "--lora 2", "--prompts a.txt", "--kl-to old",
                 "--even-steps"):
        with telling(capsys, *flag.replace(str(preset), "FILE").split()):
            train.parse_args(["--resume", str(whole), *flag.split()])

@pytest.fixture(scope="module")
def bad(tiny, tmp_path_factory):
    """A folder of models that train.py cannot train."""
    folder, trailing = tmp_path_factory.mktemp("bad"), dict(timestep_spacing="trailing")
    for name, changes in dict(trailing=trailing, zero_snr=trailing | dict(rescale_betas_zero_snr=True),
                              sample=dict(prediction_type="sample"), key={}, nine={},
                              thresholding=dict(thresholding=True)).items():
        edited(tiny, folder / name, "scheduler", **changes)
    lacking = weights(tiny / "sd")
    del lacking["conv_in.bias"]
    save_file(lacking, folder / "key/unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = UNet2DConditionModel.load_config(folder / "nine/unet")
    UNet2DConditionModel.from_config(config, in_channels=9).save_pretrained(folder / "nine/unet")
    (folder / "blank.csv").write_text('prompt,x\n"",1\n')
    return folder

@pytest.mark.parametrize("flag", [
    "--alpha -0.1", "--lr nan", "--clip inf", "--kl -1", "--eta 0", "--epochs 0", "--guidance 0",
    "--seed -1", "--batch 0", "--steps 1.5", "--lr x", "--kl-to x", "--none 1", "--out tests",
    "--out LICENSE", "--updates 5", "--generations 1", "--steps 1", "--steps 1000", "--prompts no.txt",
    "--prompts LICENSE", "--prompts BAD/blank.csv", "--anchors no.txt", "--anchors LICENSE",
    "--model toy/sdd", "--reward toy/sd", "--model BAD/nine", "--model BAD/key", "--model BAD/zero_snr",
    "--model BAD/sample", "--steps 61 --updates 1 --model BAD/trailing",
    "--steps 5 --model BAD/thresholding"
])
def test_bad_flags_and_files_are_told(flag, bad, flags, tmp_path, monkeypatch, capsys):
    """In one line with flag and value, or the file's name; nothing is written."""
    monkeypatch.chdir(ROOT)
    flag = flag.replace("BAD", str(bad)).split()
    with telling(capsys, *flag[flag[0] == "--prompts":2]):
        train.main(train.parse_args(flags("run") + flag))
    assert not (tmp_path / "run").exists()

def test_a_script_tells_too(bad, flags, tmp_path):
    """As a user starts it: nothing that an import prints drowns the line."""
    told(script("train.py", *flags("run", model=bad / "key")), f"--model {bad / 'key'}", "conv_in.bias")
    assert not (tmp_path / "run").exists()
