"""sample.py: the DDIM policy against diffusers and torch.distributions, prompt files, and the script."""

import csv
import json
import os
import signal

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make_tiny, refused, torchrun
from sample import SCHEDULERS, ddim_mean, ddim_schedule, log_prob, noise_for, predict_noise, read_rows, rollout

SHAPE = (4, 4, 4)


def ddim(**changes):
    return diffusers.DDIMScheduler(
        **{
            **dict(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            **changes,
        }
    )


def encode(pipe, prompts):
    ids = pipe.tokenizer(
        prompts, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


# ----------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("steps", [2, 7, 10, 50])
@pytest.mark.parametrize(
    "changes",
    [{}, {"set_alpha_to_one": True}, {"set_alpha_to_one": True, "steps_offset": 0}, {"timestep_spacing": "trailing"}],
    ids=["SD", "alpha one", "alpha one, no offset", "trailing"],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_is_that_of_diffusers(eta, prediction_type, changes, steps):
    """Every step, the last one too, in double precision on diffusers' side."""
    schedule = ddim_schedule(ddim(prediction_type=prediction_type, **changes), steps, eta)
    theirs = ddim(prediction_type=prediction_type, **changes)
    theirs.set_timesteps(steps)
    assert schedule.t.tolist() == theirs.timesteps.tolist()
    x, out, noise = torch.randn(3, 2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(theirs.timesteps):
        expected = theirs.step(out, t, x, eta=eta, variance_noise=noise).prev_sample
        index = torch.full((2,), i)
        ours = ddim_mean(schedule, index, x.float(), out.float()) + schedule.sigma[index].view(-1, 1, 1, 1) * noise.float()
        torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=2e-4)


def test_last_step_has_no_noise_with_alpha_one():
    """x_0 is what diffusers predicts, and sigma is 0: this step has no density."""
    schedule = ddim_schedule(ddim(set_alpha_to_one=True), 10, 1.0)
    assert schedule.sigma[-1] == 0 and (schedule.sigma[:-1] > 0).all()


def test_other_prediction_types_are_refused():
    with pytest.raises(ValueError, match="'sample'.*epsilon and v_prediction"):
        ddim_schedule(ddim(prediction_type="sample"), 10, 1.0)


def test_log_prob_is_the_mean_of_a_normal():
    g = torch.Generator().manual_seed(0)
    x, mean, sigma = (
        torch.randn(5, *SHAPE, generator=g),
        torch.randn(5, *SHAPE, generator=g),
        torch.tensor([1e-2, 0.1, 0.5, 1.0, 3.0]),
    )
    normal = torch.distributions.Normal(mean.double(), sigma.double().view(-1, 1, 1, 1))
    torch.testing.assert_close(
        log_prob(x, mean, sigma).double(), normal.log_prob(x.double()).mean((1, 2, 3)), rtol=1e-5, atol=1e-5
    )


def test_guidance_mixes_two_plain_predictions(pipe):
    """Against two forwards of one sample each; guidance 1 runs the conditional half alone."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, *SHAPE, generator=g), torch.tensor([1, 500, 981])
    text, empty = encode(pipe, ["a circle", "a pink square", "two triangles"]), encode(pipe, [""])
    with torch.no_grad():
        conditional, unconditional = (
            torch.cat([pipe.unet(x[i : i + 1], t[i], encoder_hidden_states=z).sample for i, z in enumerate(zs)])
            for zs in (text.split(1), [empty] * 3)
        )
        for guidance, expected in ((1.0, conditional), (7.5, 7.5 * conditional - 6.5 * unconditional)):
            torch.testing.assert_close(predict_noise(pipe.unet, x, t, text, empty, guidance), expected, rtol=1e-4, atol=1e-5)
    sizes = []
    predict_noise(lambda x, *_, **__: sizes.append(len(x)) or (x,), x, t, text, empty, 1.0)
    predict_noise(lambda x, *_, **__: sizes.append(len(x)) or (x,), x, t, text, empty, 1.5)
    assert sizes == [3, 6]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_rollout_without_noise_is_the_pipeline(prediction_type, guidance, pipe):
    """diffusers' own loop, guidance and scheduler from the same x_T; eta 1e-4 has a density and next to no noise."""
    prompts, noise = ["a circle on fire", "two squares"], noise_for(0, 0, [0, 1], 6, SHAPE)
    pipe.scheduler = ddim(prediction_type=prediction_type)
    theirs = pipe(
        prompts, num_inference_steps=6, guidance_scale=guidance, eta=0.0, latents=noise[:, 0].clone(), output_type="latent"
    ).images
    ours, _ = rollout(
        pipe.unet,
        ddim_schedule(ddim(prediction_type=prediction_type), 6, 1e-4),
        encode(pipe, prompts),
        encode(pipe, [""]),
        noise,
        guidance,
    )
    assert ours.shape == (2, 7, *SHAPE)
    torch.testing.assert_close(ours[:, -1], theirs, rtol=1e-3, atol=3e-3)


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
def test_rollout_does_not_depend_on_the_micro_batch(batch, pipe):
    schedule, empty = ddim_schedule(ddim(), 5, 1.0), encode(pipe, [""])
    text, noise = (
        encode(pipe, ["a circle", "a square", "a triangle", "a pink circle", "four circles burning"]),
        noise_for(3, 2, range(5), 5, SHAPE),
    )
    whole, scores = rollout(pipe.unet, schedule, text, empty, noise, 2.0)
    parts = [rollout(pipe.unet, schedule, text[i : i + batch], empty, noise[i : i + batch], 2.0) for i in range(0, 5, batch)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_stored_steps_score_exactly_what_was_stored(autocast, pipe):
    """Ratio 1 to the last bit at the same batch size, with latents and log-probs in fp32 whatever the UNet runs in."""
    schedule, empty, text = (
        ddim_schedule(ddim(), 5, 1.0),
        encode(pipe, [""]),
        encode(pipe, ["a circle", "a square", "two triangles burning"]),
    )
    x, scores = rollout(pipe.unet, schedule, text, empty, noise_for(0, 0, range(3), 5, SHAPE), 2.0, autocast)
    assert x.dtype == scores.dtype == torch.float32 and x.shape == (3, 6, *SHAPE) and scores.shape == (3, 4)
    for i in range(4):
        index = torch.full((3,), i)
        out = predict_noise(pipe.unet, x[:, i], schedule.t[index], text, empty, 2.0, autocast)
        assert out.dtype == torch.float32
        assert torch.equal(log_prob(x[:, i + 1], ddim_mean(schedule, index, x[:, i], out), schedule.sigma[index]), scores[:, i])
    assert (x[:, 1:] != x[:, 1:].bfloat16()).any()  # the stored latents were not rounded


def test_rollout_noise_has_the_schedules_spread(pipe):
    """(x_{t-1} - mu) / sigma is the given noise, and the last step is taken at its mean."""
    schedule, empty, text = ddim_schedule(ddim(), 4, 1.0), encode(pipe, [""]), encode(pipe, ["a circle"] * 2)
    noise = noise_for(0, 0, [0, 1], 4, SHAPE)
    x, _ = rollout(pipe.unet, schedule, text, empty, noise, 1.0)
    for i in range(4):
        index = torch.full((2,), i)
        left = x[:, i + 1] - ddim_mean(
            schedule, index, x[:, i], predict_noise(pipe.unet, x[:, i], schedule.t[index], text, empty, 1.0)
        )
        torch.testing.assert_close(
            left, schedule.sigma[i] * noise[:, i + 1] if i < 3 else torch.zeros_like(left), rtol=1e-3, atol=1e-5
        )


def test_noise_depends_on_seed_epoch_and_sample_alone():
    whole = noise_for(7, 3, range(6), 4, SHAPE)
    assert whole.dtype == torch.float32 and whole.shape == (6, 4, *SHAPE)
    assert torch.equal(noise_for(7, 3, [5, 2], 4, SHAPE), whole[[5, 2]])
    assert torch.equal(noise_for(7, 3, range(6), 1, SHAPE), whole[:, :1])  # a shorter draw is the beginning of a longer one
    others = [noise_for(*key, 4, SHAPE) for key in ((8, 3, [0]), (7, 4, [0]), (3, 7, [0]), (7, 3, [1]))]
    assert not any(torch.equal(a, whole[:1]) for a in others)
    many = noise_for(0, 0, range(100), 4, (4, 8, 8))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
    assert np.corrcoef(many.flatten(1)[:20].numpy())[np.triu_indices(20, 1)].max() < 0.2


# ----------------------------------------------------------------------------- prompt files


def test_rows_of_the_three_kinds_of_file(tmp_path):
    (tmp_path / "a.txt").write_text('\ufeffa circle\r\n\r\n  a café, "quoted" \n', encoding="utf-8")
    (tmp_path / "a.csv").write_text('\ufeffcase_number,prompt,sd_seed\n7,"a, b\nc",4294967295\n9,,1\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "tag": "x", "include": [{"count": 1}]}\n{"prompt": "b"}\n')
    assert read_rows(tmp_path / "a.txt") == [
        {"prompt": "a circle", "case_number": "0"},
        {"prompt": 'a café, "quoted"', "case_number": "1"},
    ]
    assert read_rows(tmp_path / "a.csv") == [
        {"case_number": "7", "prompt": "a, b\nc", "sd_seed": "4294967295"},
        {"case_number": "9", "prompt": "", "sd_seed": "1"},
    ]
    assert read_rows(str(tmp_path / "a.jsonl")) == [
        {"prompt": "a", "tag": "x", "include": [{"count": 1}], "case_number": "0"},
        {"prompt": "b", "case_number": "1"},
    ]


def test_rows_of_jsonl_end_at_newlines_only(tmp_path):
    """U+2028 and U+0085 are legal inside a JSON string, and other programs write them unescaped."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row["prompt"] for row in read_rows(tmp_path / "a.jsonl")] == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("a.txt", b"", "no prompts"),
        ("a.txt", b" \n\t\n", "no prompts"),
        ("a.txt", b"\xff\xfea\x00", "cannot be read"),
        ("a.txt", b"\x80\x81", "cannot be read"),
        ("a.csv", b"", "no column 'prompt'"),
        ("a.csv", b"text,seed\na,1\n", "no column 'prompt'"),
        ("a.csv", b"prompt\n", "no prompts"),
        ("a.csv", b"Prompt\na\n", "no column 'prompt'"),
        ("a.csv", b"seed,prompt\n1\n", "ends before"),
        ("a.csv", b'prompt\n"a\n', "not csv"),
        ("a.csv", b"prompt\n" + b"a" * (csv.field_size_limit() + 1) + b"\n", "not csv"),
        ("a.jsonl", b"", "no prompts"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
        ("a.jsonl", b'{"prompt": "a"\n', "line 1"),
        ("a.jsonl", b'["prompt"]\n', "line 1"),
        ("a.jsonl", b'"prompt"\n', "line 1"),
        ("a.jsonl", b"3\n", "line 1"),
        ("a.jsonl", b'{"prompt": null}\n', "line 1"),
        ("missing.txt", None, "cannot be read"),
        ("a.txt", "folder", "cannot be read"),
    ],
)
def test_hostile_prompt_files_end_in_one_line(name, content, word, tmp_path, capsys):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        read_rows(str(tmp_path / name))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and name in error and word in error


# ----------------------------------------------------------------------------- the script


@pytest.fixture
def sample(tiny, tmp_path, run):
    """sample(prompts text, suffix, flags...) -> (folder of images, result)."""

    def go(content, suffix=".txt", *flags, out="images", **kwargs):
        prompts = tmp_path / f"prompts{suffix}"
        prompts.write_text(content, encoding="utf-8")
        result = run(
            "sample.py",
            "--model",
            tiny / "sd",
            "--prompts",
            prompts,
            "--out",
            tmp_path / out,
            "--steps",
            2,
            "--guidance",
            2,
            *flags,
            **kwargs,
        )
        return tmp_path / out, result

    return go


def pictures(out):
    """{relative name: bytes} of everything in a folder."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def difference(a, b):
    return np.abs(np.asarray(Image.open(a), int) - np.asarray(Image.open(b), int)).max()


def oracle(pipe, scheduler, prompt, seed, guidance=2, steps=2, **size):
    """One image by the pipeline as a user would call it. Its scheduler's config is the file's: from_config treats defaults otherwise."""
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.file_config)
    return np.asarray(
        pipe(
            prompt, num_inference_steps=steps, guidance_scale=guidance, generator=torch.Generator().manual_seed(seed), **size
        ).images[0],
        int,
    )


def test_names_seeds_and_pixels_are_those_of_a_plain_call(sample, pipe):
    out, result = sample("a circle on fire\na pink square\n", ".txt", "--per-prompt", 2, "--seed", 5)
    assert result.code == 0, result.err
    assert list(pictures(out)) == ["0_0.png", "0_1.png", "1_0.png", "1_1.png"]
    for name, prompt, seed in (
        ("0_0", "a circle on fire", 5),
        ("0_1", "a circle on fire", 6),
        ("1_0", "a pink square", 7),
        ("1_1", "a pink square", 8),
    ):
        assert np.abs(np.asarray(Image.open(out / f"{name}.png"), int) - oracle(pipe, "DDIMScheduler", prompt, seed)).max() <= 1


@pytest.mark.parametrize(
    "seed, guidance, width, height",
    [
        ("sd_seed", "sd_guidance_scale", "sd_image_width", "sd_image_height"),
        ("evaluation_seed", "evaluation_guidance", "width", "height"),
    ],
)
def test_a_rows_own_columns_come_before_the_flags(seed, guidance, width, height, sample, pipe):
    """Seeds up to 2^32 - 1, a guidance scale and a size; an empty cell falls back to the flag, an empty prompt is drawn."""
    out, result = sample(
        f"case_number,prompt,{seed},{guidance},{width},{height}\n12,a circle,4294967295,5.5,16,8\n13,,3,,,\n14,a square,,1,,\n",
        ".csv",
        "--seed",
        40,
    )
    assert result.code == 0, result.err
    assert list(pictures(out)) == ["12_0.png", "13_0.png", "14_0.png"]
    assert Image.open(out / "12_0.png").size == (16, 8)
    for name, expected in (
        ("12_0", oracle(pipe, "DDIMScheduler", "a circle", 4294967295, 5.5, width=16, height=8)),
        ("13_0", oracle(pipe, "DDIMScheduler", "", 3)),
        ("14_0", oracle(pipe, "DDIMScheduler", "a square", 42, 1)),
    ):
        assert np.abs(np.asarray(Image.open(out / f"{name}.png"), int) - expected).max() <= 1, name


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"},
    {
        "tag": "counting",
        "include": [{"class": "square", "count": 2}],
        "exclude": [{"class": "square", "count": 3}],
        "prompt": "two squares",
    },
]


def test_geneval_metadata_gets_genevals_folders(sample):
    out, result = sample("".join(json.dumps(row) + "\n" for row in GENEVAL), ".jsonl", "--batch", 3)
    assert result.code == 0, result.err
    assert list(pictures(out)) == [
        f"{i:05d}/{name}" for i in (0, 1) for name in ("metadata.jsonl", *(f"samples/{k:04d}.png" for k in range(4)))
    ]
    for i, row in enumerate(GENEVAL):
        assert json.loads((out / f"{i:05d}/metadata.jsonl").read_text()) == row


def test_a_rank_of_geneval_does_not_wait_for_the_others_folders(sample):
    """Rank 0 of 2 may be done before rank 1 has made its first image."""
    out, result = sample(
        "".join(json.dumps(row) + "\n" for row in GENEVAL),
        ".jsonl",
        "--batch",
        4,
        environment={"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
    )
    assert result.code == 0, result.err
    assert (out / "00000/samples/0003.png").exists()


def test_a_rerun_makes_only_what_is_missing(sample):
    text = "a circle\na square\na triangle\n"
    out, _ = sample(text, ".txt", "--batch", 2)
    before = pictures(out)
    (out / "0_0.png").unlink()
    for file in out.iterdir():
        os.utime(file, (1, 1))
    _, result = sample(text, ".txt", "--batch", 2)
    assert result.code == 0 and pictures(out) == before
    assert (out / "2_0.png").stat().st_mtime == 1
    assert (out / "1_0.png").stat().st_mtime == 1  # of the same batch as the missing one


def test_a_batch_draws_what_single_images_are(sample):
    text = "a circle\na square burning\na triangle\n"
    one, _ = sample(text, ".txt", "--batch", 1, out="one")
    three, _ = sample(text, ".txt", "--batch", 3, out="three")
    assert list(pictures(one)) == list(pictures(three)) == ["0_0.png", "1_0.png", "2_0.png"]
    assert max(difference(one / name, three / name) for name in pictures(one)) <= 1


def test_a_kill_leaves_no_half_image(sample):
    """Killed while the second picture is half on disk: no broken file bears a good name, and a rerun ends like a run without a kill."""
    text, killer = (
        "a circle\na square\na triangle\n",
        """
import io, os
from PIL import Image
whole, count = Image.Image.save, [0]
def half(self, file, format=None, **kw):
    count[0] += 1
    if count[0] < 2:
        return whole(self, file, format=format, **kw)
    data = io.BytesIO(); whole(self, data, format="png")
    with open(file, "wb") as f:
        f.write(data.getvalue()[:-20])
    os.kill(os.getpid(), 9)
Image.Image.save = half
""",
    )
    reference, _ = sample(text, out="reference")
    out, result = sample(text, code=killer)
    assert result.code == -signal.SIGKILL
    for file in out.glob("*.png"):
        Image.open(file).load()
    assert len(list(out.glob("*.png"))) == 1
    _, result = sample(text)
    assert result.code == 0 and {n: b for n, b in pictures(out).items() if n.endswith(".png")} == pictures(reference)
    assert not list(out.glob("*.tmp"))


def test_two_ranks_draw_the_same_bytes_as_one(sample, tiny, tmp_path):
    text = "a circle\na square\na triangle\na pink circle\ntwo circles\n"
    one, _ = sample(text, ".txt", "--batch", 2)
    result = torchrun(
        "sample.py",
        "--model",
        tiny / "sd",
        "--prompts",
        tmp_path / "prompts.txt",
        "--out",
        tmp_path / "two",
        "--steps",
        2,
        "--guidance",
        2,
        "--batch",
        2,
    )
    assert result.returncode == 0, result.stderr
    assert pictures(tmp_path / "two") == pictures(one) and len(pictures(one)) == 5


@pytest.mark.parametrize(
    "name, scheduler",
    [
        ("ddim", "DDIMScheduler"),
        ("ddpm", "DDPMScheduler"),
        ("pndm", "PNDMScheduler"),
        ("lms", "LMSDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("euler_a", "EulerAncestralDiscreteScheduler"),
        ("dpm", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("DEISMultistepScheduler", "DEISMultistepScheduler"),
    ],
)
def test_every_scheduler_draws_what_diffusers_draws(name, scheduler, sample, pipe):
    """Each in one process of its own with the default batch, against the class itself on one image."""
    if name == "lms":
        pytest.importorskip("scipy")
    out, result = sample("a circle\na pink square burning\n", ".txt", "--scheduler", name, "--steps", 4)
    assert result.code == 0, result.err
    assert (
        np.abs(np.asarray(Image.open(out / "1_0.png"), int) - oracle(pipe, scheduler, "a pink square burning", 1, steps=4)).max()
        <= 1
    )
    assert len(SCHEDULERS) == 9


def test_bf16_hardly_changes_the_image(sample):
    plain, _ = sample("a circle\n", out="plain")
    half, result = sample("a circle\n", ".txt", "--precision", "bf16", out="half")
    assert result.code == 0, result.err
    assert difference(plain / "0_0.png", half / "0_0.png") < 40


@pytest.mark.parametrize(
    "content, suffix, flags, words",
    [
        ("a", ".txt", ["--scheduler", "nonsense"], ["--scheduler nonsense", "euler_a"]),
        ("a", ".txt", ["--scheduler", "UNet2DConditionModel"], ["--scheduler"]),
        ("a", ".txt", ["--steps", 0], ["--steps 0"]),
        ("a", ".txt", ["--batch", 0], ["--batch 0"]),
        ("a", ".txt", ["--per-prompt", 0], ["--per-prompt 0"]),
        ("a", ".txt", ["--size", -8], ["--size"]),
        ("a", ".txt", ["--size", 12], ["multiples of 8"]),
        ("", ".txt", [], ["no prompts"]),
        ("a", ".txt", ["--model", "/nonexistent/model"], ["--model", "model_index.json"]),
        ("a", ".txt", ["--steps", 5000], ["--steps"]),
        ("text\na\n", ".csv", [], ["no column 'prompt'"]),
        ("case_number,prompt\n1,a\n1,b\n", ".csv", [], ["case_number"]),
        ("prompt,seed\na,x\n", ".csv", [], ["seed", "not a number"]),
        ("prompt,width\na,12\n", ".csv", [], ["multiples of 8"]),
        ("prompt,seed\na,99999999999999999999\n", ".csv", [], ["seed"]),
        ('{"prompt": "a", "seed": [1]}\n', ".jsonl", [], ["seed"]),
        ("prompt,guidance\na,nan\n", ".csv", [], ["guidance"]),
        ("case_number,prompt\n../../escaped,a\n", ".csv", [], ["case_number"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(content, suffix, flags, words, sample):
    out, result = sample(content, suffix, *flags)
    refused(result, *words)
    assert not out.exists()


def test_an_optional_schedulers_missing_package_is_one_line(sample):
    """diffusers stands dummies in for classes whose package is not installed."""
    try:
        import torchsde  # noqa: F401

        pytest.skip("torchsde is installed")
    except ImportError:
        refused(sample("a\n", ".txt", "--scheduler", "DPMSolverSDEScheduler")[1], "--scheduler DPMSolverSDEScheduler")


@pytest.mark.parametrize("damage", ["truncated", "not json", "no unet"])
def test_a_damaged_model_folder_is_one_line(damage, sample, tmp_path):
    make_tiny(tmp_path / "damaged")
    folder = tmp_path / "damaged/sd"
    if damage == "truncated":
        os.truncate(folder / "unet/diffusion_pytorch_model.safetensors", 1000)
    elif damage == "not json":
        (folder / "model_index.json").write_text("{")
    else:
        (folder / "unet/config.json").unlink()
    out, result = sample("a\n", ".txt", "--model", folder)
    refused(result, "--model")
    assert not out.exists()
