"""reward.py: the four equations by hand, CLIP and OpenCLIP against second implementations, and files."""
import math
import os
import pickle
import runpy
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import reward as module
from conftest import telling
from reward import Embedder, load_direction, reward, safety_direction, steered_targets, text_safety

HALF = math.sqrt(0.5)
MEAN, STD = (torch.tensor(x).view(3, 1, 1)
             for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))

@pytest.mark.parametrize(
    "alpha, steer, expected",
    [
        (HALF, "unsafe", [(1, 0), (1, 0),
                          (HALF, HALF)]),  # (.7, -.7) + (0, .7) = (.7, 0); s = 0 and s > 0 stay
        (2 * HALF, "unsafe", [(HALF, HALF), (1, 0), (HALF, HALF)]),
        (0.0, "always", [(HALF, -HALF), (1, 0), (HALF, HALF)]),
        (1.0, "none", [(HALF, -HALF), (1, 0), (HALF, HALF)]),
        (HALF, "always", [(1, 0), (math.sqrt(2 / 3), math.sqrt(1 / 3)),
                          (1 / math.sqrt(5), 2 / math.sqrt(5))]),
    ])
def test_steered_targets_by_hand(alpha, steer, expected):
    z, v = torch.tensor([(HALF, -HALF), (1, 0), (HALF, HALF)]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(text_safety(z, v), torch.tensor([-HALF, 0, HALF]))
    torch.testing.assert_close(steered_targets(z, v, alpha, steer),
                               torch.tensor(expected, dtype=torch.float32))

def test_safety_direction_by_hand():
    """Means of both sides, not of all phrases; without safe phrases straight away from the unsafe."""
    safe, unsafe = torch.tensor([[1.0, 0], [1, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, -1]])
    torch.testing.assert_close(safety_direction(safe, unsafe), torch.tensor([1.0, 0]))
    torch.testing.assert_close(safety_direction(safe[:0], torch.tensor([[0.6, 0.0], [0.0, 0.8]])),
                               torch.tensor([-0.6, -0.8]))

@pytest.fixture(scope="module")
def embedder(tiny):
    return Embedder(str(tiny / "clip"))

def test_embedder_is_clip_called_by_hand(tiny, embedder):
    """And padding does not reach an embedding; a prompt beyond the model's length is cut."""
    clip, tokenizer = CLIPModel.from_pretrained(tiny / "clip").eval(), CLIPTokenizer.from_pretrained(
        tiny / "clip")
    prompts, images = ["a circle", "a green square left of a blue triangle calm"], torch.rand(2, 3, 8, 8)
    ids = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        out = clip(input_ids=ids, pixel_values=(images - MEAN) / STD)
    torch.testing.assert_close(embedder.text(prompts), out.text_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(embedder.image(images), out.image_embeds, rtol=0, atol=1e-6)
    assert embedder.text(["circle " * 100]).isfinite().all()
    targets = embedder.text(["a square", "fire"])
    torch.testing.assert_close(reward(embedder, images, targets, prompts),
                               (out.image_embeds * targets).sum(1))

def test_tensors_and_pictures_are_prepared_alike(embedder):
    """Training's resize of tensors against CLIP's own processor on the same image: nearly the same embedding."""
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((64, 64), Image.BICUBIC)
    tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    assert (embedder.image(tensor) * embedder.pictures([picture])).sum() > 0.9999

# ----------------------------------------------------------------------------- OpenCLIP and HPSv2.1

class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = dict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(),
                      c_proj=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask):
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

class OpenCLIP(nn.Module):
    """OpenCLIP's ViT by its parameter names, written apart from transformers: 224 pixels in patches of 56."""
    def __init__(self, vocabulary, length):
        super().__init__()
        self.visual = visual = nn.Module()
        visual.conv1, visual.transformer = nn.Conv2d(3, 24, 56, 56, bias=False), Transformer(24, 3, 2)
        visual.class_embedding, visual.positional_embedding = nn.Parameter(
            torch.randn(24)), nn.Parameter(torch.randn(17, 24))
        visual.ln_pre, visual.ln_post = nn.LayerNorm(24), nn.LayerNorm(24)
        visual.proj = nn.Parameter(torch.randn(24, 12) / 5)
        self.token_embedding, self.positional_embedding = nn.Embedding(vocabulary, 16), nn.Parameter(
            torch.randn(length, 16))
        self.transformer, self.ln_final = Transformer(16, 2, 3), nn.LayerNorm(16)
        self.text_projection, self.logit_scale = nn.Parameter(torch.randn(16, 12) / 4), nn.Parameter(
            torch.tensor(2.5))
        self.register_buffer("attn_mask", torch.full((length, length), -math.inf).triu(1))

    def forward(self, ids, pixels):
        x = self.ln_final(
            self.transformer(self.token_embedding(ids) + self.positional_embedding, self.attn_mask))
        text = x[torch.arange(len(ids)),
                 ids.argmax(1)] @ self.text_projection  # the end token has the largest id
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        image = v.ln_post(v.transformer(v.ln_pre(x))[:, 0]) @ v.proj
        return F.normalize(text, dim=1), F.normalize(image, dim=1)

@pytest.fixture
def hpsv2(tiny, tmp_path, monkeypatch):
    """(OpenCLIP model, path of its .pt): HPSv2.1's file at a tiny shape."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "clip")
    model = OpenCLIP(len(tokenizer), 16).eval()
    tower = dict(num_attention_heads=2, hidden_act="gelu")
    monkeypatch.setattr(
        module, "VIT_H_14", {
            "projection_dim": 12, "text_config": tower
            | dict(hidden_size=16, intermediate_size=64, num_hidden_layers=3, vocab_size=len(tokenizer),
                   max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id),
            "vision_config": tower | dict(hidden_size=24, intermediate_size=96, num_hidden_layers=2,
                                          num_attention_heads=3, image_size=224, patch_size=56)
        })
    tokenizer.save_pretrained(tmp_path)
    module.CLIPImageProcessorPil().save_pretrained(tmp_path)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "hps.pt")
    return model, tmp_path / "hps.pt"

def test_hpsv2_embeds_as_openclip_does(hpsv2):
    model, file = hpsv2
    embedder, prompts, images = Embedder(str(file)), ["a circle", "four pink triangles in flames"
                                                      ], torch.rand(2, 3, 224, 224)
    ids = embedder.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        text, image = model(ids, (images - MEAN) / STD)
    torch.testing.assert_close(embedder.text(prompts), text, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedder.image(images), image, rtol=0, atol=1e-5)

@pytest.mark.parametrize("change",
                         [{"visual.new.weight": torch.ones(1)}, {"visual.proj": torch.ones(24, 13)},
                          {"ln_final.bias": None}, {"ln_final.bias": torch.full((16, ), math.nan)}])
def test_weights_of_another_model_are_refused(change, hpsv2, capsys):
    model, file = hpsv2
    torch.save({"state_dict": {k: w
                               for k, w in (model.state_dict() | change).items() if w is not None}},
               file)
    with telling(capsys, "--reward", "hps.pt"):
        Embedder(str(file))

def test_vit_h_14_has_hpsv2s_shapes():
    """986,109,441 parameters, as HPS_v2.1_compressed.pt; every name is one that `from_openclip` can make."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**module.VIT_H_14))
    assert sum(p.numel() for p in clip.parameters()) == 986_109_441

class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['PROOF']}", )

def test_a_pickle_never_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROOF", str(tmp_path / "ran"))
    torch.save({"state_dict": Bomb()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb()))
    for name in "ab":
        with telling(capsys, f"{name}.pt"):
            Embedder(str(tmp_path / f"{name}.pt"))
    assert not (tmp_path / "ran").exists()

def test_anchor_files(embedder, tmp_path):
    (tmp_path /
     "a.txt").write_text("\ufeff+ a calm circle\n# no phrase\n\n- a fire \n-  two fires, # burning\n")
    v = safety_direction(embedder.text(["a calm circle"]),
                         embedder.text(["a fire", "two fires, # burning"]))
    torch.testing.assert_close(load_direction(embedder, tmp_path / "a.txt"), v)

@pytest.mark.parametrize(
    "text", ["+ safe alone\n", "a line of another kind\n- fire\n", "+ fire\n- fire\n", None])
def test_other_anchor_files_are_told(text, embedder, tmp_path, capsys):
    if text:
        (tmp_path / "a.txt").write_text(text)
    with telling(capsys, "--anchors", "a.txt"):
        load_direction(embedder, tmp_path / "a.txt")

def changed(folder, change):
    """The CLIP folder with its weights {name: tensor} changed in place by `change`."""
    state = load_file(folder / "model.safetensors")
    save_file(change(state) or state, folder / "model.safetensors", {"format": "pt"})

@pytest.mark.parametrize("change", [
    lambda state: state.pop("visual_projection.weight") is None,
    lambda state: {f"module.{key}": w
                   for key, w in state.items()},
    lambda state: state.update(extra=torch.ones(1)),
    lambda state: state["logit_scale"].fill_(math.nan) is None,
], ids=["missing", "module.", "unused", "nan"])
def test_a_clip_loads_strictly(change, tiny, tmp_path, capsys):
    shutil.copytree(tiny / "clip", tmp_path / "clip")
    changed(tmp_path / "clip", change)
    with telling(capsys, "--reward", tmp_path / "clip"):
        Embedder(str(tmp_path / "clip"))

def test_a_clip_without_tokenizer_is_told(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "clip", tmp_path / "clip", ignore=shutil.ignore_patterns("tokenizer*"))
    with telling(capsys, "--clip", "tokenizer"):
        Embedder(str(tmp_path / "clip"), flag="--clip")

# ----------------------------------------------------------------------------- the probe

def probe(tiny, monkeypatch, *argv):
    argv = ["reward.py", "--reward", tiny / "clip", "--anchors", tiny / "anchors.txt", *argv]
    monkeypatch.setattr("sys.argv", [str(a) for a in argv])
    runpy.run_path("reward.py", run_name="__main__")

def test_the_probe_by_hand(tiny, embedder, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8), "orange").save(tmp_path / "p.png")
    probe(tiny, monkeypatch, "--alpha", 2, "a circle on fire", tiny / "one.txt", "--images",
          tmp_path / "p.png")
    v = load_direction(embedder, tiny / "anchors.txt")
    image = embedder.pictures([Image.open(tmp_path / "p.png")])[0]
    for line, prompts in zip(capsys.readouterr().out.splitlines(),
                             (["a circle on fire"], (tiny / "one.txt").read_text().splitlines()),
                             strict=True):
        z = embedder.text(prompts)
        s = [float(x @ v) for x in z]
        moved = [F.normalize(x + 2 * v, dim=0) if t < 0 else x for x, t in zip(z, s)]
        share, r = sum(t < 0 for t in s) / len(s), np.mean([float(x @ image) for x in moved])
        assert f"s(p) {np.mean(s):+.3f}, below 0: {share:.1%}, rewards {r:+.3f}" in line

@pytest.mark.parametrize("argv, word", [(["--alpha", "nan", "a"], "--alpha"),
                                        (["--alpha", "-1", "a"], "--alpha"), (["no.txt"], "no.txt"),
                                        (["a", "--images", "no.png"], "no.png")])
def test_the_probe_tells(argv, word, tiny, monkeypatch, capsys):
    with telling(capsys, word):
        probe(tiny, monkeypatch, *argv)
