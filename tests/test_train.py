"""train.py: GRPO's pieces against hand-worked numbers and torch, and whole runs of a few seconds on a tiny pipeline."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import load, metrics, refused, torchrun, train_args, weights
from train import draw_prompts, group_advantages, kl_gaussian, kl_k3, pairs_of_updates, surrogate


# ----------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    """(1, 3): mean 2, std 1. (0, 0, 0, 4): mean 1, std sqrt 3. The std is the population's."""
    advantages, live = group_advantages(torch.tensor([[1.0, 3], [10, 10.5]]), 5.0)
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 1], [-1, 1]]))
    assert live.tolist() == [True, True]
    advantages, _ = group_advantages(torch.tensor([[0.0, 0, 0, 4]]), 5.0)
    torch.testing.assert_close(advantages, torch.tensor([[-1, -1, -1, 3]]) / math.sqrt(3))


def test_advantages_are_clipped_on_both_sides():
    advantages, _ = group_advantages(torch.tensor([[0.0] * 15 + [1], [1.0] * 15 + [0]]), 2.5)  # sqrt 15 = 3.87 unclipped
    assert advantages[0, -1] == 2.5 and advantages[1, -1] == -2.5
    torch.testing.assert_close(advantages[0, 0].item(), -1 / math.sqrt(15))


def test_groups_without_spread_are_dead():
    """Equal rewards, and rewards equal but for rounding, give 0 and are told apart from a small true spread."""
    advantages, live = group_advantages(torch.tensor([[0.3, 0.3, 0.3], [0.3, 0.3 + 3e-8, 0.3], [0.3, 0.3, 0.3003]]), 2.5)
    assert live.tolist() == [False, False, True] and not advantages[:2].any() and advantages[2].abs().min() > 0.5


# ----------------------------------------------------------------------------- objective and KL


def ppo(log_ratio, advantage, clip):
    """(objective, its derivative by log rho) of one sample, case by case."""
    ratio = math.exp(log_ratio)
    if advantage >= 0 and ratio > 1 + clip:
        return (1 + clip) * advantage, 0.0
    if advantage < 0 and ratio < 1 - clip:
        return (1 - clip) * advantage, 0.0
    return ratio * advantage, ratio * advantage


@pytest.mark.parametrize("clip", [0.2, 1e-4])
@pytest.mark.parametrize("log_ratios", [(0.5, -0.5, 0.00005), (-0.5, 0.5, -0.00005), (0.5, 0.5, 0.0), (-0.5, -0.5, 0.5)])
@pytest.mark.parametrize("advantages", [(2.0, -1.0, 0.5), (-2.0, 1.0, -0.5)])
def test_surrogate_and_gradient_are_ppos(log_ratios, advantages, clip):
    """Three samples: good and bad ones, beyond either bound and inside."""
    log_ratio = torch.tensor(log_ratios, dtype=torch.float64, requires_grad=True)
    value = surrogate(log_ratio, torch.tensor(advantages, dtype=torch.float64), clip)
    value.sum().backward()
    expected = [ppo(l, a, clip) for l, a in zip(log_ratios, advantages)]
    torch.testing.assert_close(value.detach(), torch.tensor([v for v, _ in expected], dtype=torch.float64))
    torch.testing.assert_close(log_ratio.grad, torch.tensor([g for _, g in expected], dtype=torch.float64))


def test_kl_k3_estimates_the_divergence():
    """Its mean over samples of the old policy is KL(old || new), by Monte Carlo; never negative; 0 with zero slope at ratio 1."""
    old, new = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.4, 1.0)
    x = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k3 = kl_k3(new.log_prob(x) - old.log_prob(x))
    assert k3.min() >= 0 and k3.mean().item() == pytest.approx(torch.distributions.kl_divergence(old, new).item(), rel=0.02)
    at_one = torch.zeros(1, requires_grad=True)
    kl_k3(at_one).backward()
    assert kl_k3(at_one) == 0 and at_one.grad == 0


def test_kl_gaussian_is_torchs():
    g = torch.Generator().manual_seed(0)
    a, b, sigma = torch.randn(4, 2, 3, 3, generator=g), torch.randn(4, 2, 3, 3, generator=g), torch.tensor([0.05, 0.3, 1.0, 2.0])
    normals = [torch.distributions.Normal(m, sigma.view(-1, 1, 1, 1)) for m in (a, b)]
    torch.testing.assert_close(kl_gaussian(a, b, sigma), torch.distributions.kl_divergence(*normals).mean((1, 2, 3)))


# ----------------------------------------------------------------------------- which prompts, which pairs


@pytest.mark.parametrize("samples, timesteps, updates", [(8, 9, 1), (8, 9, 6), (8, 9, 72), (6, 4, 3), (4, 49, 14)])
def test_pairs_are_a_partition_the_same_for_any_ranks(samples, timesteps, updates):
    whole = pairs_of_updates(range(samples), timesteps, updates, 0, 5)
    assert whole.shape == (updates, samples * timesteps // updates, 2)
    assert sorted(map(tuple, whole.flatten(0, 1).tolist())) == [(n, t) for n in range(samples) for t in range(timesteps)]
    for ranks in (2, samples // 2):
        part = samples // ranks
        if part * timesteps % updates:
            continue  # refused at start
        split = [pairs_of_updates(range(r * part, (r + 1) * part), timesteps, updates, 0, 5) for r in range(ranks)]
        for k in range(updates):
            together = {(n + r * part, t) for r in range(ranks) for n, t in split[r][k].tolist()}
            assert together == set(map(tuple, whole[k].tolist()))


def test_updates_see_all_samples_and_noise_levels():
    """Every update gets an equal share of each sample, another order each epoch."""
    pairs = pairs_of_updates(range(16), 48, 4, 0, 0)
    for update in pairs:
        assert torch.equal(update[:, 0].bincount(minlength=16), torch.full((16,), 12))
        assert update[:, 1].unique().numel() > 40
    assert not torch.equal(pairs, pairs_of_updates(range(16), 48, 4, 0, 1)) and not torch.equal(
        pairs, pairs_of_updates(range(16), 48, 4, 1, 0)
    )


def test_prompts_keep_their_shares_without_repeats():
    drawn = [draw_prompts([50, 30], [0.5, 0.5], 16, 3, epoch) for epoch in range(50)]
    for chosen in drawn:
        assert len(set(chosen)) == 16 and [s for s, _ in chosen].count(0) == 8
        assert all(0 <= row < (50, 30)[s] for s, row in chosen)
    assert drawn[7] == draw_prompts([50, 30], [0.5, 0.5], 16, 3, 7) != draw_prompts([50, 30], [0.5, 0.5], 16, 4, 7)
    assert {row for chosen in drawn for s, row in chosen if s == 1} == set(range(30))


def test_prompts_of_uneven_weights_and_short_sources():
    """Shares hold on average where they cannot hold in each epoch; a source of 2 prompts is repeated rather than refused."""
    counts = np.zeros(3)
    for epoch in range(300):
        for s, row in draw_prompts([2, 40, 9], [0.65, 0.35, 0.0], 5, 0, epoch):
            counts[s] += 1
            assert row < (2, 40, 9)[s]
    assert counts[2] == 0 and counts[0] / counts.sum() == pytest.approx(0.65, abs=0.01)


# ----------------------------------------------------------------------------- whole runs


def close(a, b, tolerance):
    """The largest difference of two checkpoints' UNets is below the tolerance."""
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < tolerance


def far(a, b):
    return not close(a, b, 1e-5)


SAVE_GRADIENTS = """
import os, torch
clip = torch.nn.utils.clip_grad_norm_
def keep(parameters, *a, **k):
    torch.save([p.grad.clone() for p in parameters], os.environ["GRADIENTS"])
    return clip(parameters, *a, **k)
torch.nn.utils.clip_grad_norm_ = keep
"""


@pytest.mark.parametrize(
    "changes",
    [
        dict(kl=0),
        dict(kl=0, even_steps=True, eta=0.7),
        dict(kl=0, guidance=1, alpha=1.0, batch=3),
        dict(kl=0, steer="none", shared_noise=True),
    ],
    ids=["plain", "even steps", "no guidance", "shared noise"],
)
def test_an_epochs_gradient_by_a_slow_second_implementation(changes, tiny, tmp_path, train):
    """One pair at a time, with diffusers' scheduler and torch's Normal, from the run's flags alone: prompts and noise are drawn as
    documented, the loss is -mean over the pairs of A log rho (at rho = 1 that is the objective's gradient)."""
    from diffusers import DDIMScheduler
    from reward import Embedder, read_anchors
    from sample import noise_for

    flags = dict(guidance=2, eta=1.0, alpha=0.5, steps=4, generations=3) | changes
    out = train(
        "run",
        epochs=1,
        **(changes | dict(steps=4, generations=3)),
        code=SAVE_GRADIENTS,
        environment={"GRADIENTS": str(tmp_path / "g.pt")},
    )
    pipe, embedder, G, T = load(tiny / "sd"), Embedder(str(tiny / "clip")), 3, 3
    sources = [(tiny / f"{name}.txt").read_text().splitlines() for name in ("one", "two")]
    prompts = [sources[s][i] for s, i in draw_prompts([4, 3], [0.5, 0.5], 2, 0, 0)]
    safe, unsafe = (embedder.text(a).mean(0) for a in read_anchors(tiny / "anchors.txt"))
    v = (safe - unsafe) / (safe - unsafe).norm()
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)

    def encode(prompt):
        return pipe.text_encoder(
            pipe.tokenizer([prompt], padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        )[0]

    def step(x, t, text, noise):  # (mean, next latent) of DDIM, by differences of diffusers' step
        out = pipe.unet(x, t, encoder_hidden_states=text).sample
        if flags["guidance"] > 1:
            empty = pipe.unet(x, t, encoder_hidden_states=encode("")).sample
            out = empty + flags["guidance"] * (out - empty)
        mean = scheduler.step(out, t, x, eta=flags["eta"], variance_noise=torch.zeros_like(x)).prev_sample
        return mean, scheduler.step(out, t, x, eta=flags["eta"], variance_noise=noise).prev_sample, out

    rewards, paths = [], []
    for n in range(2 * G):
        noise, text = noise_for(0, 0, [n], 4, (4, 4, 4))[0], encode(prompts[n // G])
        if flags.get("shared_noise"):
            noise[0] = noise_for(0, 0, [n - n % G], 4, (4, 4, 4))[0, 0]
        x, path = noise[None, 0], []
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps):
                mean, following, _ = step(x, t, text, noise[None, i + 1] if i < 3 else torch.zeros_like(x))
                path.append((x, t, text, following))
                x = following
            image = (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        target = embedder.text([prompts[n // G]])[0]
        if flags.get("steer") != "none" and target @ v < 0:
            target = (target + flags["alpha"] * v) / (target + flags["alpha"] * v).norm()
        rewards.append((embedder.image(image)[0] @ target).item())
        paths.append(path)
    rewards = np.array(rewards).reshape(2, G)
    advantages = ((rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)).clip(-2.5, 2.5).flatten()
    row = metrics(out)[0]
    np.testing.assert_allclose([row["reward"]["one"], row["reward"]["two"]], rewards.mean(1), atol=1e-5)

    pipe.unet.requires_grad_(True)
    gains, terms = [], []
    for i, t in enumerate(scheduler.timesteps[:T]):  # |d mu / d eps| / sigma, by moving eps
        zero, one = torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4)
        mu0, mu1, noisy = (
            scheduler.step(e, t, zero, eta=flags["eta"], variance_noise=z).prev_sample.mean().item()
            for e, z in ((zero, zero), (one, zero), (zero, one))
        )
        gains.append((abs(mu1 - mu0) / noisy, noisy))
    relative = [g / np.mean([g for g, _ in gains]) if flags.get("even_steps") else 1.0 for g, _ in gains]
    for n, path in enumerate(paths):
        for i, (x, t, text, following) in enumerate(path[:T]):
            mean, _, _ = step(x, t, text, torch.zeros_like(x))
            terms.append(advantages[n] * torch.distributions.Normal(mean, gains[i][1]).log_prob(following).mean() / relative[i])
    (-torch.stack(terms).mean()).backward()
    theirs, ours = [p.grad for p in pipe.unet.parameters()], torch.load(tmp_path / "g.pt")
    a, b = (torch.cat([g.flatten() for g in grads]).double() for grads in (ours, theirs))
    assert row["dead_groups"] == 0 and row["grad_norm"] == pytest.approx(b.norm().item(), rel=2e-3)
    assert (a / a.norm() - b / b.norm()).norm() < 2e-3  # only clipping of the norm may lie between


@pytest.mark.parametrize("batch", [4, 2])
def test_ratio_is_one_before_an_update(batch, train):
    """One update per rollout: exactly 1 in every epoch. Rollout and training of the same batch size agree to the last bit."""
    for row in metrics(train("run", batch=batch)):
        assert row["ratio_min"] == row["ratio_mean"] == row["ratio_max"] == 1
        assert row["clip_low"] == row["clip_high"] == row["kl"] == 0
        assert row["on_policy_noise"] == 0


def test_ratio_leaves_one_after_an_update(train):
    """Two updates: half of the pairs are taken at ratio 1, the others not; the clip fractions and the KL say so."""
    for row in metrics(train("run", updates=2, batch=4, clip=1e-5)):
        assert row["ratio_min"] < 1 - 1e-5 or row["ratio_max"] > 1 + 1e-5
        assert 0 < row["clip_low"] + row["clip_high"] <= 0.5 and row["kl"] > 0
        assert row["ratio_min"] <= row["ratio_mean"] <= row["ratio_max"]


def test_metrics_of_a_run(train):
    """One line per epoch, rewards under their sources' names, phases and the run's own arguments."""
    out = train("run", epochs=3, save_every=2)
    rows = metrics(out)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row["reward"]) == {"one", "two"} and all(-1 <= r <= 1 for r in row["reward"].values())
        assert row["reward_std"] > 0 and row["grad_norm"] > 0 and set(row["seconds"]) == {"rollout", "reward", "update"}
        assert row["images_per_second"] == pytest.approx(4 / sum(row["seconds"].values()), rel=0.1) and row["dead_groups"] == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "args.json",
        "checkpoint-2",
        "checkpoint-3",
        "curve.png",
        "grid-0.png",
        "grid-2.png",
        "grid-3.png",
        "metrics.jsonl",
    ]
    assert json.loads((out / "args.json").read_text())["generations"] == 2
    sizes = [Image.open(out / f"grid-{n}.png").size for n in (0, 2, 3)]
    assert sizes == [(1024, 128), (1024, 256), (1024, 256)]  # 8 prompts of 8 pixels, enlarged; later ones below the start model's
    assert [(p / "train_state.pt").is_file() for p in (out / "checkpoint-2", out / "checkpoint-3")] == [False, True]


def test_sources_of_the_same_name_stay_apart(tiny, tmp_path, train):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/one.txt").write_text("three pink circles\n")
    for row in metrics(train("run", prompts=[str(tiny / "one.txt"), str(tmp_path / "other/one.txt")])):
        assert len(row["reward"]) == 2


def test_checkpoint_loads_and_draws_the_live_models_image(tmp_path, train):
    """The grid's last row was drawn by the weights in memory; the checkpoint, loaded by diffusers alone, draws it again."""
    from sample import ddim_schedule, noise_for, rollout

    out = train("run", lr=3e-3)
    pipe, args = load(out / "checkpoint-2"), json.loads((out / "args.json").read_text())
    sources = [open(entry.rpartition(":")[0]).read().splitlines() for entry in args["prompts"]]
    prompts = [sources[s][i] for s, i in draw_prompts([4, 3], [0.5, 0.5], 8, 0, 2**31)]
    ids = pipe.tokenizer(prompts + [""], padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipe.text_encoder(ids)[0]
        x, _ = rollout(
            pipe.unet, ddim_schedule(pipe.scheduler, 3, 1.0), text[:8], text[8:], noise_for(0, 2**31, range(8), 3, (4, 4, 4)), 2.0
        )
        images = (pipe.vae.decode(x[:, -1] / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    row = (torch.cat(list(images), 2).permute(1, 2, 0) * 255).round().byte().numpy().astype(int)
    grid = np.asarray(Image.open(out / "grid-2.png")).astype(int)[::16, ::16]  # 8 pixels are shown as 128
    assert np.abs(row - grid[8:]).max() <= 1 and np.abs(grid[:8] - grid[8:]).max() > 1


def test_two_ranks_train_as_one(tiny, tmp_path, train):
    """Two processes and gloo against one, at the same global batch, with two updates per rollout: the same weights and metrics."""
    changes = dict(updates=2, batch=2, lr=1e-4)
    one = train("one", **changes)
    result = torchrun(*train_args(tiny, tmp_path / "two", **changes))
    assert result.returncode == 0, result.stderr
    assert close(one / "checkpoint-2", tmp_path / "two/checkpoint-2", 1e-6) and far(one / "checkpoint-2", tiny / "sd")
    for a, b in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        for name in (
            "reward_std",
            "grad_norm",
            "ratio_min",
            "ratio_mean",
            "ratio_max",
            "kl",
            "clip_low",
            "clip_high",
            "dead_groups",
        ):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=2e-6), name
        assert b["reward"] == pytest.approx(a["reward"], abs=1e-6)


def test_the_micro_batch_is_memory_not_maths(train):
    """Batches of 3 (across groups, with a rest) and of everything: the same weights."""
    assert close(
        train("three", batch=3, updates=2, lr=1e-4) / "checkpoint-2",
        train("all", batch=64, updates=2, lr=1e-4) / "checkpoint-2",
        1e-5,
    )


BRIGHTNESS = """
import reward
reward.reward = lambda embedder, images, targets: images.mean((1, 2, 3))
"""


def test_training_raises_brightness(train):
    """A reward that needs no CLIP: 15 epochs raise the images' mean brightness by far more than its noise of 0.01 (reached here: 0.16)."""
    rows = metrics(
        train(
            "run",
            epochs=15,
            generations=16,
            batch=64,
            steps=4,
            guidance=1,
            lr=5e-3,
            kl=0,
            even_steps=True,
            save_every=100,
            code=BRIGHTNESS,
        )
    )
    brightness = [np.mean(list(row["reward"].values())) for row in rows]
    assert np.mean(brightness[-3:]) > brightness[0] + 0.08


def test_lora_is_what_diffusers_loads(tiny, tmp_path, train, run):
    """pipe.load_lora_weights takes the folder, its image is another one, sample.py --lora draws it; the base stays as it was."""
    out = train("run", lora=2, lr=0.05)
    pipe = load(tiny / "sd")
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}

    def draw():
        return np.asarray(
            pipe("a circle", num_inference_steps=3, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images[0]
        ).astype(int)

    plain = draw()
    pipe.load_lora_weights(out / "checkpoint-2")
    tuned = draw()
    assert np.abs(tuned - plain).max() > 0
    loaded = {k.replace(".base_layer", ""): v for k, v in pipe.unet.state_dict().items() if "lora" not in k}
    assert loaded.keys() == before.keys() and all(torch.equal(loaded[k], before[k]) for k in before)
    trained = sum(p.numel() for name, p in pipe.unet.named_parameters() if "lora" in name)
    assert f"{trained / 1e6:.2f} M weights" in (tmp_path / "log/script.out").read_text()
    (tmp_path / "p.txt").write_text("a circle\n")
    result = run(
        "sample.py",
        "--model",
        tiny / "sd",
        "--lora",
        out / "checkpoint-2",
        "--prompts",
        tmp_path / "p.txt",
        "--out",
        tmp_path / "images",
        "--steps",
        3,
        "--guidance",
        2,
    )
    assert result.code == 0, result.err
    assert np.abs(np.asarray(Image.open(tmp_path / "images/0_0.png")).astype(int) - tuned).max() <= 1


def test_lora_resumes_bit_for_bit(train):
    whole, parts = train("whole", lora=2, epochs=3), train("parts", lora=2, epochs=1)
    train("parts", lora=2, epochs=3, resume=True)
    a, b = (weights(out / "checkpoint-3", "pytorch_lora_weights.safetensors") for out in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_gradient_checkpointing_changes_no_weight(train):
    assert close(
        train("with", gradient_checkpointing=True, lr=1e-4) / "checkpoint-2", train("without", lr=1e-4) / "checkpoint-2", 1e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(steer="none"),
        dict(alpha=2.0),
        dict(shared_noise=True),
        dict(kl_to="ref", kl=5.0, updates=2),
        dict(kl_to="old", kl=5.0, updates=2),
        dict(grad_clip=1e-9),
        dict(weight_decay=0.5),
        dict(seed=1),
        dict(advantage_clip=0.3),
    ],
    ids=lambda c: " ".join(f"{k} {v}" for k, v in c.items()),
)
def test_flags_are_used(changes, train):
    """Each leaves other weights than a run without it."""
    plain = {k: v for k, v in dict(updates=2).items() if k in changes}
    assert far(
        train("with", epochs=1, generations=4, **changes) / "checkpoint-1",
        train("without", epochs=1, generations=4, **plain) / "checkpoint-1",
    )


def test_steering_moves_the_prompts_of_its_mode(tiny, train):
    """With the anchors' signs and without them reversed a prompt is unsafe in just one case; `always` moves it in both."""
    for anchors in ("anchors.txt", "reversed.txt"):
        runs = {
            steer: train(f"{anchors} {steer}", anchors=tiny / anchors, steer=steer, epochs=1, batch=4)
            for steer in ("unsafe", "always", "none")
        }
        share = metrics(runs["unsafe"])[0]["unsafe_prompts"]
        rewards = {steer: metrics(out)[0]["reward"] for steer, out in runs.items()}
        assert (rewards["unsafe"] == rewards["none"]) == (share == 0) and (rewards["unsafe"] == rewards["always"]) == (share == 1)
        assert rewards["always"] != rewards["none"]


@pytest.mark.parametrize("changes", [{}, dict(precision="bf16"), dict(precision="bf16", lora=2)], ids=str)
def test_kl_to_the_reference_is_zero_at_the_start_and_grows(changes, train):
    """The reference computes in the policy's own dtypes: rounding alone makes no KL."""
    rows = metrics(train("run", kl_to="ref", kl=0.01, lr=3e-3, epochs=3, batch=4, **changes))
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[2]["kl"] > 1e-3


def test_dead_groups_are_counted_and_teach_nothing(tiny, train):
    """A reward without spread: both groups dead, and without weight decay the start model's weights remain to the last bit."""
    out = train(
        "run",
        epochs=1,
        kl=0,
        weight_decay=0,
        code="import reward\nreward.reward = lambda e, images, t: images.new_ones(len(images))",
    )
    assert metrics(out)[0]["dead_groups"] == 2 and metrics(out)[0]["grad_norm"] == 0
    assert close(out / "checkpoint-1", tiny / "sd", 1e-12)


def test_bf16_runs_on_the_cpu_and_reports_its_noise(train, tmp_path):
    """Weights stay fp32; the ratio is exactly 1 with one update; the start-up line names every trained timestep."""
    out = train("run", precision="bf16", batch=4)
    assert all(w.dtype == torch.float32 for w in weights(out / "checkpoint-2").values())
    for row in metrics(out):
        assert row["ratio_min"] == row["ratio_max"] == 1 and 0 <= row["on_policy_noise"] < 0.1
    line = next(
        line
        for line in (tmp_path / "log/script.out").read_text().splitlines()
        + (tmp_path / "log/script.err").read_text().splitlines()
        if "on-policy" in line
    )
    assert "667:" in line and "334:" in line and "1:" not in line.split("): ")[1].split()[-1][:2]


def test_a_half_precision_model_is_trained_in_fp32(tiny, tmp_path, train):
    """A pipeline folder saved in fp16 gets fp32 master weights."""
    load(tiny / "sd").to(torch.float16).save_pretrained(tmp_path / "half")
    out = train("run", model=tmp_path / "half", epochs=1)
    assert all(w.dtype == torch.float32 for w in weights(out / "checkpoint-1").values())


def test_evaluation_runs_before_and_after(tmp_path, train):
    """--eval gets the start model and the last checkpoint."""
    out = train("run", eval=f"echo {{model}} >> {tmp_path / 'log.txt'}")
    assert [line.split("/")[-1] for line in (tmp_path / "log.txt").read_text().split()] == ["sd", "checkpoint-2"] and out.exists()


def test_evaluation_of_lora_gets_model_and_adapters(tiny, tmp_path, train):
    """{model} becomes arguments that sample.py understands; "python" is the interpreter that trains, whatever PATH says."""
    command = f"python sample.py --prompts {tiny / 'one.txt'} --steps 2 --out {tmp_path}/$(echo {{model}} | wc -w) --model {{model}}"
    train("run", eval=command, lora=2, lr=0.05, epochs=1, environment={"PATH": "/usr/bin:/bin"})
    before, after = ((tmp_path / name / "0_0.png").read_bytes() for name in ("1", "3"))  # MODEL; MODEL --lora CHECKPOINT
    assert before != after


def test_a_failing_evaluation_ends_the_run(tiny, tmp_path, run):
    """Before training it costs no training; after it, the checkpoint stays and the exit code tells."""
    result = run(*train_args(tiny, tmp_path / "first", eval="exit 3"))
    assert result.code == 1 and "exit code 3" in result.err and not (tmp_path / "first/metrics.jsonl").read_text()
    result = run(*train_args(tiny, tmp_path / "last", eval="case {model} in *checkpoint*) exit 4;; esac"))
    assert result.code == 1 and "exit code 4" in result.err and load(tmp_path / "last/checkpoint-2")


def test_arguments_from_a_file_and_a_subfolder(tiny, tmp_path, run):
    """@file holds flags, several on a line, with comments; later flags win; --subfolder finds the pipeline."""
    argv = [f'"{a}"' for a in train_args(tiny, tmp_path / "run", model=tiny)[1:]]
    (tmp_path / "preset.args").write_text("# a comment\n" + " ".join(argv) + "  # another\n--epochs 7\n")
    result = run("train.py", f"@{tmp_path / 'preset.args'}", "--subfolder", "sd", "--epochs", 1)
    assert result.code == 0, result.err
    assert (tmp_path / "run/checkpoint-1/model_index.json").is_file()
    refused(run("train.py", f"@{tmp_path / 'preset.args'}", "--subfolder", "nothing", "--out", tmp_path / "other"), "--model")
