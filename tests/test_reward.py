"""reward.py: the equations by hand, embeddings by transformers alone, bad models, the probe."""
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, SiglipConfig,
                          SiglipModel)

import reward as module
from conftest import start, telling
from reward import Embedder, load_direction, reward, safety_direction, steered_targets, text_safety

HALF = 0.5**0.5
PROMPTS = ["a circle on fire", "a green square left of a blue triangle calm", "", "a circle " * 50]

def close(x, expected):
    torch.testing.assert_close(x.double(), torch.as_tensor(expected).double(), rtol=0, atol=1e-6)

@pytest.mark.parametrize("alpha, steer, expected", [
    (HALF, "unsafe", [(1, 0), (1, 0), (HALF, HALF)]),
    (2 * HALF, "unsafe", [(HALF, HALF), (1, 0), (HALF, HALF)]),
    (1, "none", [(HALF, -HALF), (1, 0), (HALF, HALF)]),
    (HALF, "always", [(1, 0), (0.8164966, 0.5773503), (0.4472136, 0.8944272)]),
])
def test_steered_targets_by_hand(alpha, steer, expected):
    """v = (0, 1) and prompts with s < 0, s = 0 and s > 0: (.7, -.7) + .7 v = (.7, 0)."""
    z, v = torch.tensor([(HALF, -HALF), (1, 0), (HALF, HALF)]), torch.tensor([0.0, 1])
    close(text_safety(z, v), [-HALF, 0, HALF])
    close(steered_targets(z, v, alpha, steer), expected)

def test_safety_direction_by_hand():
    x, y = torch.eye(2)
    close(safety_direction(torch.stack([x, x, x]), torch.stack([y, -y])), [1, 0])
    close(safety_direction(2 * y[None], torch.stack([3 * x - 2 * y] * 2)), [-0.6, 0.8])
    close(safety_direction(torch.empty(0, 2), torch.stack([0.6 * x, 0.8 * y])), [-0.6, -0.8])

def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

def by_hand(folder, prompts, pictures):
    """transformers' own unit embeddings of texts and PIL images, in double."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    clip = CLIPModel.from_pretrained(folder, dtype=torch.double)
    ids = tokenizer(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        out = clip(ids.input_ids, pixels.double())
    return out.text_embeds, out.image_embeds

OPENCLIP = """final_layer_norm ln_final  layer_norm ln_  self_attn attn  fc1 c_fc  fc2 c_proj
encoder.layers transformer.resblocks  pre_layrnorm ln_pre  post_layernorm ln_post  patch_embedding conv1
position_embedding.weight positional_embedding  text_projection.weight text_projection
visual_projection.weight visual.proj  vision_model visual""".split()  # CLIPModel's names and OpenCLIP's

def to_openclip(clip):
    """CLIPModel's weights as OpenCLIP saves them: q, k and v are one, and a projection is x @ w."""
    state = {"attn_mask": torch.full((16, 16), -torch.inf).triu(1)}
    for name, w in clip.items():
        name = name.replace("text_model.", "").replace("embeddings.", "")
        for here, there in zip(OPENCLIP[::2], OPENCLIP[1::2]):
            name = name.replace(here, there)
        state[name] = w.T.contiguous() if "proj" in name and "resblocks" not in name else w
    for name in [name for name in state if ".q_proj." in name]:
        qkv = [state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(qkv)
    return state

@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """A CLIP of random weights in fp16 but for one, and itself as HPSv2.1's file, hps.pt."""
    monkeypatch.setattr(module, "VIT_H_14", CLIPConfig.from_pretrained(tiny / "clip").to_dict())
    folder = shutil.copytree(tiny / "clip", tmp_path / "clip")
    clip, generator = CLIPModel.from_pretrained(folder).half(), torch.Generator().manual_seed(0)
    clip.save_pretrained(folder)
    state = {name: w.data.normal_(generator=generator) for name, w in clip.named_parameters()}
    state["visual_projection.weight"] = torch.randn(16, 16, generator=generator)
    torch.save({"state_dict": to_openclip(state)}, folder / "hps.pt")
    ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}  # as the hub has them
    change(folder, lambda old: state | ids)
    (folder / "tokenizer_config.json").unlink()
    return folder

@pytest.mark.parametrize("name", ["", "hps.pt", "hpsv2"])
def test_embeddings_are_those_of_transformers_in_fp32(name, folder, monkeypatch):
    """A prompt's of many in parts, cut at the end; a picture's of any size and mode."""
    sizes, hub = [], {("xswu/HPSv2", "HPS_v2.1_compressed.pt"): folder / "hps.pt"}
    monkeypatch.setattr(module, "hf_hub_download", lambda *names: hub[names])
    embedder = Embedder(name if name == "hpsv2" else str(folder / name))
    tower, images = embedder.clip.get_text_features, torch.from_numpy(noise(4, 3, 8, 8))
    embedder.clip.get_text_features = lambda ids: sizes.append(len(ids)) or tower(ids)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pictures += [Image.fromarray(noise(32, 20, 3)), Image.fromarray(noise(9, 30)).convert("P")]
    text, image = by_hand(folder, PROMPTS, [picture.convert("RGB") for picture in pictures])
    z_text, z_image = embedder.text(PROMPTS * 75), embedder.image(images / 255)
    for z, expected in (z_text, text.repeat(75, 1)), (z_image, image[:4]):
        assert z.dtype == torch.float32 and not z.requires_grad
        close(z, expected)
    close(embedder.pictures(pictures), image)
    close(reward(embedder, images / 255, z_text[:4], PROMPTS), (text * image[:4]).sum(1))
    assert max(sizes) <= 256 and sum(sizes) == 300
    (folder / "tokenizer.json").unlink()
    assert module.load_hpsv2(folder / "hps.pt")[1] == "openai/clip-vit-large-patch14"

def test_vit_h_14_has_hpsv2s_shape():
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**module.VIT_H_14))
    text, vision = clip.config.text_config, clip.config.vision_config
    assert sum(p.numel() for p in clip.parameters()) == 986_109_441
    assert (text.hidden_act, text.num_attention_heads, text.eos_token_id) == ("gelu", 16, 49407)
    assert (vision.hidden_act, vision.num_attention_heads, vision.image_size) == ("gelu", 16, 224)

@pytest.mark.parametrize("size, to", [(64, 8), (512, 224), (96, 32), (32, 48)])
def test_tensors_are_resized_as_the_processor_resizes(size, to, tiny):
    """PIL's antialiased bicubic, which rounds to 1 / 255 twice on the way."""
    picture = Image.fromarray(noise(16, 16, 3)).resize((size, size), Image.BICUBIC)
    processor, embedder = CLIPImageProcessorPil(size=to, crop_size=to), Embedder(str(tiny / "clip"))
    embedder.pixels, embedder.clip.config.vision_config.image_size = lambda pixels: pixels, to
    ours = embedder.image(torch.from_numpy(np.array(picture)[None]).permute(0, 3, 1, 2) / 255)
    difference = (ours - processor(picture, return_tensors="pt").pixel_values).abs()
    assert difference.max() < 0.1 and difference.mean() < 0.006

DAMAGE = {  # to the weights of any model
    "missing": lambda state: {k: state[k] for k in state if k != max(state)},
    "extra": lambda state: state | {"extra.weight": torch.ones(1)},
    "prefixed": lambda state: {f"module.{k}": state[k] for k in state},
    "misshapen": lambda state: state | {max(state): torch.ones(2, 3, 5)},
    "nan": lambda state: state | {max(state): state[max(state)] * torch.nan},
}

def change(folder, damage):
    file = next(folder.glob("*.safetensors"))
    save_file(damage(load_file(file)), file, {"format": "pt"})

@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_weights_that_do_not_fit_are_told(damage, folder, capsys):
    change(folder, damage)
    with telling(capsys, f"--clip {folder}: its weights do not fit"):
        Embedder(str(folder), flag="--clip")
    hps = folder / "hps.pt"
    torch.save({"state_dict": damage(torch.load(hps)["state_dict"])}, hps)
    with telling(capsys, f"--reward {hps}: its weights do not fit"):
        Embedder(str(hps))

BOMB = "cbuiltins\nexec\n(S'raise SystemExit(7)'\ntR."  # runs if unpickled

def test_what_is_no_clip_is_told_and_no_pickle_runs(folder, capsys):
    small = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    siglip = shutil.copytree(folder, folder / "siglip")
    SiglipModel(SiglipConfig(text_config=small, vision_config=small)).save_pretrained(siglip)
    torch.save({"weights": 1}, folder / "none.pt")
    (folder / "hps.pt").write_text(BOMB)
    (folder / "tokenizer.json").unlink()
    for name in siglip, folder / "none.pt", folder / "hps.pt", folder:
        with telling(capsys, f"--reward {name}: "):
            Embedder(str(name))

def test_anchors(folder, capsys):
    """A byte order mark, comments, blank lines, spaces, and signs inside a phrase."""
    file, embedder = folder / "a.txt", Embedder(str(folder))
    file.write_text("\ufeff+ a calm circle\r\n# - no phrase\n\n  - a fire \n-# burning + hot\n", "utf-8")
    z = embedder.text(["a calm circle", "a fire", "# burning + hot"])
    close(load_direction(embedder, file), safety_direction(z[:1], z[1:]))
    for bad in "", "+ a", "# - a", "- a\nb", "+ a\n- b\n-a", "- a\n+ ", "-", "\xff":
        file.write_text(bad, "latin-1")
        with telling(capsys, f"--anchors {file}"):
            load_direction(embedder, file)

def test_the_probe(tiny, tmp_path, monkeypatch, capsys):
    probe = "reward.py", "--reward", tiny / "clip", "--anchors", tiny / "anchors.txt"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("\ufeff" + "\n\n".join(PROMPTS[:2]), "utf-8")
    (tmp_path / "blank.txt").write_text("\n")
    picture, given = Image.fromarray(noise(8, 8, 3)), [*PROMPTS[:2], "two.txt"]
    picture.save("a.png")
    start(*probe, "--alpha", 0.7, *given, "--images", "a.png")
    found = re.findall(r"s\(p\) (\S+), below 0: (\S+)%, rewards (\S+)  (.+)\n", capsys.readouterr().out)
    embedder = Embedder(str(tiny / "clip"))
    z, v = embedder.text(PROMPTS[:2]), load_direction(embedder, tiny / "anchors.txt")
    s, rewards = z @ v, steered_targets(z, v, 0.7) @ embedder.pictures([picture])[0]
    rows = torch.stack([s, 100.0 * (s < 0), rewards], 1)
    assert sum(s < 0) == 1 and [name for *_, name in found] == given
    np.testing.assert_allclose(np.array(found)[:, :3].astype(float), [*rows, rows.mean(0)], atol=6e-4)
    for bad in "--alpha nan a", "--anchors typo a", "typo.txt", "blank.txt", "a --images typo.png":
        with telling(capsys, re.search("--alpha|typo|blank", bad)[0]):
            start(*probe, *bad.split())
