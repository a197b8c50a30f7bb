"""reward.py: steered targets by hand, CLIP and OpenCLIP embeddings against second implementations, files and the probe."""

import math
import os
import pickle
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import reward as module
from conftest import refused
from reward import Embedder, from_openclip, read_anchors, reward, safety_direction, steered_targets, text_safety

HALF = math.sqrt(0.5)


# ----------------------------------------------------------------------------- the steering reward


@pytest.mark.parametrize(
    "alpha, steer, expected",
    [
        # v = (0, 1); prompts at s = -1/sqrt 2, 0 and +1/sqrt 2
        (HALF, "unsafe", [(1, 0), (1, 0), (HALF, HALF)]),  # (.7, -.7) + (0, .7) = (.7, 0); s = 0 and s > 0 stay
        (2 * HALF, "unsafe", [(HALF, HALF), (1, 0), (HALF, HALF)]),
        (0.0, "unsafe", [(HALF, -HALF), (1, 0), (HALF, HALF)]),
        (0.0, "always", [(HALF, -HALF), (1, 0), (HALF, HALF)]),
        (1.0, "none", [(HALF, -HALF), (1, 0), (HALF, HALF)]),
        (HALF, "always", [(1, 0), (math.sqrt(2 / 3), math.sqrt(1 / 3)), (1 / math.sqrt(5), 2 / math.sqrt(5))]),
    ],
)
def test_steered_targets_by_hand(alpha, steer, expected):
    z, v = torch.tensor([(HALF, -HALF), (1, 0), (HALF, HALF)]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(text_safety(z, v), torch.tensor([-HALF, 0, HALF]))
    torch.testing.assert_close(
        steered_targets(z, v, alpha, steer), torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6
    )


def test_unmoved_targets_are_the_texts_to_the_last_bit():
    z, v = F.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), dim=1), F.normalize(torch.ones(16), dim=0)
    targets = steered_targets(z, v, 0.5)
    assert torch.equal((targets != z).any(1), z @ v < 0)
    torch.testing.assert_close(targets.norm(dim=1), torch.ones(50))


def test_safety_direction_by_hand():
    """Means of both sides, not of all phrases, and of unequal numbers; without safe phrases straight away from the unsafe."""
    safe, unsafe = torch.tensor([[1.0, 0], [1, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, -1]])
    torch.testing.assert_close(safety_direction(safe, unsafe), torch.tensor([1.0, 0]))
    torch.testing.assert_close(safety_direction(torch.tensor([[0.0, 2]]), torch.tensor([[3.0, -2]])), torch.tensor([-0.6, 0.8]))
    torch.testing.assert_close(
        safety_direction(torch.empty(0, 2), torch.tensor([[0.6, 0.0], [0.0, 0.8]])), torch.tensor([-0.6, -0.8])
    )


def test_reward_is_the_fp32_cosine(tiny):
    """Against numpy in double, with the towers in fp32 and in bf16."""
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for autocast, tolerance in ((None, 1e-6), (torch.bfloat16, 0.03)):
        embedder = Embedder(str(tiny / "clip"), autocast=autocast)
        targets = embedder.text(["a circle", "a square", "a circle on fire", "a", "b"])
        r = reward(embedder, images, targets)
        a, b = Embedder(str(tiny / "clip")).image(images).double().numpy(), targets.double().numpy()
        assert r.dtype == torch.float32 and r.shape == (5,)
        np.testing.assert_allclose(
            r.numpy(), (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1), atol=tolerance
        )


# ----------------------------------------------------------------------------- embedders


@pytest.fixture(scope="module")
def embedder(tiny):
    return Embedder(str(tiny / "clip"))


def by_hand(clip, tokenizer, prompts, pixels):
    """CLIPModel's own unit embeddings."""
    out = clip(input_ids=tokenizer(prompts, padding=True, return_tensors="pt").input_ids, pixel_values=pixels)
    return out.text_embeds, out.image_embeds


def test_embedder_is_clip_called_by_hand(tiny, embedder):
    """Texts padded to the longest there, to the model's length here: padding does not reach an embedding."""
    clip, tokenizer = CLIPModel.from_pretrained(tiny / "clip").eval(), CLIPTokenizer.from_pretrained(tiny / "clip")
    prompts, images = ["a circle", "a green square left of a blue triangle calm"], torch.rand(2, 3, 8, 8)
    mean, std = (
        torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1),
        torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1),
    )
    with torch.no_grad():
        text, image = by_hand(clip, tokenizer, prompts, (images - mean) / std)
    torch.testing.assert_close(embedder.text(prompts), text, rtol=0, atol=1e-6)
    torch.testing.assert_close(embedder.image(images), image, rtol=0, atol=1e-6)
    torch.testing.assert_close(embedder.text(prompts[:1]), embedder.text(prompts)[:1], rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in embedder.clip.parameters())


def test_what_follows_the_end_token_does_not_matter(embedder):
    """Other pad tokens after the first end token: the same embedding. And a prompt longer than the model is cut, not refused."""
    ids = embedder.tokenizer(["a pink circle"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    end = (ids[0] == embedder.tokenizer.eos_token_id).nonzero()[0, 0].item()
    other = ids.clone()
    other[0, end + 1 :] = 5
    with torch.no_grad():
        a, b = (embedder.clip.get_text_features(i).pooler_output for i in (ids, other))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert embedder.text(["circle " * 100]).isfinite().all()


class Recorder(nn.Module):
    """Stands for a CLIP and keeps the pixels it was given."""

    def get_image_features(self, pixels):
        self.pixels = pixels
        return type("", (), {"pooler_output": pixels.flatten(1)})


def preprocessed(size, images):
    embedder = Embedder.__new__(Embedder)
    embedder.clip, embedder.size, embedder.device, embedder.autocast = Recorder(), size, torch.device("cpu"), None
    embedder.mean, embedder.std = torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1), torch.tensor((0.2, 0.25, 0.5)).view(3, 1, 1)
    embedder.image(images)
    return embedder.clip.pixels * embedder.std + embedder.mean


def smooth(height, width, seed=0):
    """A picture with structure at several scales, uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC))


def test_images_of_clips_size_are_not_resampled():
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(preprocessed(32, images), images, rtol=0, atol=1e-6)
    wide = torch.rand(2, 3, 32, 40)
    torch.testing.assert_close(preprocessed(32, wide), wide[..., 4:36], rtol=0, atol=1e-6)  # only cropped


@pytest.mark.parametrize("height, width", [(512, 512), (64, 64), (96, 96), (512, 768), (768, 512), (160, 96)])
def test_resize_and_crop_are_pils(height, width):
    """PIL's bicubic (antialiased) to a short side of 32 and the centre; PIL rounds to 1/255 in between."""
    picture = smooth(height, width)
    ours = preprocessed(32, torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255)
    scale = 32 / min(height, width)
    resized = Image.fromarray(picture).resize((round(width * scale), round(height * scale)), Image.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    theirs = torch.from_numpy(np.asarray(resized.crop((left, top, left + 32, top + 32))).copy()).permute(2, 0, 1) / 255
    assert ours.shape == (1, 3, 32, 32)
    assert (ours[0] - theirs).abs().max() < 0.02 and (ours[0] - theirs).abs().mean() < 0.003


# ----------------------------------------------------------------------------- OpenCLIP and HPSv2.1


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = (
            nn.LayerNorm(width),
            nn.MultiheadAttention(width, heads, batch_first=True),
            nn.LayerNorm(width),
        )
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, size, patch, width, heads, layers, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers)
        self.proj = nn.Parameter(torch.randn(width, dim) / 5)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """OpenCLIP's ViT by its paper and its parameter names, written apart from transformers."""

    def __init__(self, vocabulary, length, size, patch, dim=12):
        super().__init__()
        self.visual = Visual(size, patch, 24, 3, 2, dim)
        self.token_embedding = nn.Embedding(vocabulary, 16)
        self.positional_embedding = nn.Parameter(torch.randn(length, 16))
        self.transformer = Transformer(16, 2, 3)
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, dim) / 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("attn_mask", torch.full((length, length), -math.inf).triu(1))

    def forward(self, ids, pixels):
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, self.attn_mask))
        text = x[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection  # the end token has the largest id
        return F.normalize(text, dim=1), F.normalize(self.visual(pixels), dim=1)


@pytest.fixture(scope="module")
def openclip(tiny):
    """(model, transformers' config of the same shape); every weight random, the LayerNorms' too."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "clip")
    model = OpenCLIP(len(tokenizer), 16, 224, 56).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    config = {
        "projection_dim": 12,
        "text_config": dict(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=16,
            hidden_act="gelu",
            eos_token_id=tokenizer.eos_token_id,
        ),
        "vision_config": dict(
            hidden_size=24,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=3,
            hidden_act="gelu",
            image_size=224,
            patch_size=56,
        ),
    }
    return model, config


def test_openclip_weights_embed_alike_in_transformers(openclip, tiny):
    model, config = openclip
    clip = CLIPModel(CLIPConfig(**config)).eval()
    clip.load_state_dict(from_openclip(model.state_dict()), strict=True)
    tokenizer, prompts = CLIPTokenizer.from_pretrained(tiny / "clip"), ["a circle", "four pink triangles in flames", ""]
    ids = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    pixels = torch.randn(3, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        text, image = by_hand(clip.double(), tokenizer, prompts, pixels)
        expected = model.double()(ids, pixels)
        model.float()
        assert torch.allclose(clip.logit_scale.float(), model.logit_scale)
    torch.testing.assert_close(text, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(image, expected[1], rtol=0, atol=1e-6)


def test_an_unknown_weight_is_not_passed_over(openclip):
    with pytest.raises(KeyError):
        from_openclip({**openclip[0].state_dict(), "visual.new.weight": torch.ones(1)})


def test_hpsv2_file_to_embeddings(openclip, tiny, tmp_path, monkeypatch):
    """A .pt as HPSv2's, at a tiny shape: the file, the remap, the tokenizer and the preprocessing together."""
    model, config = openclip
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "hps.pt")
    monkeypatch.setattr(module, "VIT_H_14", config)
    monkeypatch.setattr(module, "CLIP_TOKENIZER", str(tiny / "clip"))
    embedder = Embedder(str(tmp_path / "hps.pt"))
    prompts, images = ["a circle", "two squares burning"], torch.rand(2, 3, 224, 224)
    ids = CLIPTokenizer.from_pretrained(tiny / "clip")(
        prompts, padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    mean, std = (
        torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1),
        torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1),
    )
    with torch.no_grad():
        text, image = model(ids, (images - mean) / std)
    torch.testing.assert_close(embedder.text(prompts), text, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedder.image(images), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["extra", "missing", "shape"])
def test_weights_of_another_model_are_refused(change, openclip, tmp_path, monkeypatch, capsys):
    """The remap is strict: no weight may be left over, missing or of another shape."""
    model, config = openclip
    state = dict(model.state_dict())
    if change == "extra":
        state["visual.new.weight"] = torch.ones(1)
    elif change == "missing":
        del state["ln_final.bias"]
    else:
        state["visual.proj"] = torch.ones(24, 13)
    torch.save({"state_dict": state}, tmp_path / "hps.pt")
    monkeypatch.setattr(module, "VIT_H_14", config)
    with pytest.raises(SystemExit) as stopped:
        Embedder(str(tmp_path / "hps.pt"))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: --reward") and error.count("\n") == 1


def test_vit_h_14_has_hpsv2s_shapes():
    """The shapes of HPS_v2.1_compressed.pt, from its public description: ViT-H-14 of OpenCLIP, 986,109,441 parameters."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**module.VIT_H_14))
    assert sum(p.numel() for p in clip.parameters()) == 986_109_441
    shapes = {name: tuple(p.shape) for name, p in clip.state_dict().items()}
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (257, 1280) and shapes["visual_projection.weight"] == (
        1024,
        1280,
    )
    assert shapes["text_model.embeddings.token_embedding.weight"] == (49408, 1024) and shapes[
        "text_model.embeddings.position_embedding.weight"
    ] == (77, 1024)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("kind", ["torch.save", "bare pickle", "empty", "text", "no state_dict", "missing"])
def test_a_bad_weights_file_is_one_line_and_runs_nothing(kind, tiny, tmp_path, run):
    file, proof = tmp_path / "file.pt", tmp_path / "executed"
    if kind == "torch.save":
        torch.save({"state_dict": Malicious(proof)}, file)
    elif kind == "bare pickle":
        file.write_bytes(pickle.dumps(Malicious(proof)))
    elif kind == "text":
        file.write_text("not weights")
    elif kind == "empty":
        file.touch()
    elif kind == "no state_dict":
        torch.save({"weights": 1}, file)
    refused(run("reward.py", "--reward", file, "--anchors", tiny / "anchors.txt", "a circle"), "--reward", "file.pt")
    assert not proof.exists()


# ----------------------------------------------------------------------------- files and the probe


def test_anchor_files_signs_comments_and_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text(
        "# no phrase\n\n+ a calm circle\n  -a fire  \n-  two fires, # burning\n+ x\r\n", encoding="utf-8"
    )
    assert read_anchors(tmp_path / "a.txt") == (["a calm circle", "x"], ["a fire", "two fires, # burning"])
    (tmp_path / "b.txt").write_text("- only unsafe\n")
    assert read_anchors(tmp_path / "b.txt") == ([], ["only unsafe"])


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "no '- unsafe"),
        (b"+ safe\n", "no '- unsafe"),
        (b"- unsafe\nsafe\n", "line 2"),
        (b"- unsafe\n+\n", "line 2"),
        (b"-  \n", "line 1"),
        (b"+ one\n+ two\n- two\n- one\n", "no direction"),
        (b"\xff\xfe- x", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_bad_anchor_files_are_one_line(content, word, tiny, tmp_path, run):
    if content is not None:
        (tmp_path / "anchors.txt").write_bytes(content)
    refused(
        run("reward.py", "--reward", tiny / "clip", "--anchors", tmp_path / "anchors.txt", "a"), "--anchors", "anchors.txt", word
    )


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--alpha", "-1"], "--alpha -1"),
        (["--alpha", "nan"], "--alpha"),
        (["--alpha", "inf"], "--alpha"),
        (["--reward", "/nonexistent/clip"], "--reward"),
        (["--reward", "tests"], "config.json"),
        (["--images=README.md"], "--images"),
    ],
)
def test_bad_flags_of_the_probe_are_one_line(flags, word, tiny, run):
    refused(run("reward.py", "--reward", tiny / "clip", "--anchors", tiny / "anchors.txt", *flags, "a"), word)


@pytest.mark.parametrize("damage, word", [("truncated", "--reward"), ("no tokenizer", "tokenizer")])
def test_a_damaged_clip_folder_is_one_line(damage, word, tiny, tmp_path, run):
    clip = shutil.copytree(tiny / "clip", tmp_path / "clip")
    if damage == "truncated":
        os.truncate(clip / "model.safetensors", 500)
    else:
        for file in [*clip.glob("token*"), *clip.glob("vocab*"), *clip.glob("merges*")]:
            file.unlink()
    refused(run("reward.py", "--reward", clip, "--anchors", tiny / "anchors.txt", "a"), "--reward", word)


def test_the_probe_prints_safety_and_cosines(tiny, embedder, run):
    """Its table against the same numbers from plain matrix products."""
    prompts, anchors = ["a circle on fire", "a circle calm", "a green square"], read_anchors(tiny / "anchors.txt")
    result = run("reward.py", "--reward", tiny / "clip", "--anchors", tiny / "anchors.txt", "--alpha", 0.7, *prompts)
    assert result.code == 0, result.err
    z, safe, unsafe = (embedder.text(p).double().numpy() for p in (prompts, *anchors))
    v = safe.mean(0) - unsafe.mean(0)
    v /= np.linalg.norm(v)
    rows = [line.split() for line in result.out.splitlines()[-3:]]
    for i, (row, prompt) in enumerate(zip(rows, prompts)):
        s = z[i] @ v
        target = z[i] + 0.7 * v if s < 0 else z[i]
        assert row[1] == ("yes" if s < 0 else "no") and " ".join(row[5:]) == f"[{i}] {prompt}"
        np.testing.assert_allclose(
            [float(c) for c in (row[0], *row[2:5])], [s, *(z @ target / np.linalg.norm(target))], atol=6e-4
        )
    assert {row[1] for row in rows} == {"yes", "no"}


def test_the_probe_prints_the_reward_of_images(tiny, embedder, tmp_path, run):
    """--images: under each prompt what `reward` gives for the same pixels."""
    anchors = read_anchors(tiny / "anchors.txt")
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    files = [tmp_path / "first.png", tmp_path / "second.png"]
    for file, array in zip(files, pixels.numpy()):
        Image.fromarray(array).save(file)
    prompts = ["a circle on fire", "a circle calm"]
    flags = ["--reward", tiny / "clip", "--anchors", tiny / "anchors.txt", "--alpha", 0.7]
    result = run("reward.py", *flags, *prompts, "--images", *files)
    assert result.code == 0, result.err
    v = safety_direction(*(embedder.text(p) for p in anchors))
    for line, target in zip(result.out.splitlines()[-2:], steered_targets(embedder.text(prompts), v, 0.7)):
        expected = reward(embedder, pixels.permute(0, 3, 1, 2) / 255, target.expand(2, -1))
        np.testing.assert_allclose([float(c) for c in line.split()[4:6]], expected.numpy(), atol=6e-4)
