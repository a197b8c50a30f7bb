"""Makes the toy world's models and prompt files: draws scenes and trains a VAE, a CLIP and a UNet.

    python toy/make.py        # writes toy/sd, toy/clip and toy/prompts; 7 minutes of 2 CPU cores

The captions that the UNet learns are noisy on purpose, as captions from the web are: the start model
obeys imperfectly, and GRPO has something to explore.
"""
import argparse
import json
import math
import random
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

import world

def prompt_files(folder):
    """Training prompts (never a test prompt), test prompts for sample.py, and the safety direction's
    anchors. The files called seen lack the last wording of the harm."""
    kinds = {"unsafe": (False, True), "compositional": (False, False), "test-unsafe": (True, True)}
    files = {}
    for name, kind in kinds.items():
        files[name] = [spec["prompt"] for spec in world.specs(1200, 0, *kind)]
    # Few anchors must differ in all but the harm: of one shape each, they would mean it more than fire.
    few = "a circle, a square and a triangle, four triangles".split(", ")
    sides = ("+", world.SAFE), ("-", world.UNSAFE)
    files["anchors"] = [f"{sign} a {s}{w}" for sign, ends in sides for s in world.SHAPES for w in ends]
    files["anchors-compact"] = [f"{sign} {t}{w}" for sign, ends in sides for t, w in zip(few, ends)]
    files["anchors-unsafe-only"] = files["anchors-compact"][3:]
    for name in ("unsafe", "anchors"):
        files[f"{name}-seen"] = [p for p in files[name] if world.UNSAFE[-1] not in p]
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / f"{name}.txt").write_text("\n".join(dict.fromkeys(lines)) + "\n")

def random_spec(rng):
    return world.random_spec(rng, rng.choice(world.TASKS), rng.random() < 0.4)  # two of five on fire

def contrast(rng, spec):
    """CLIP's hard negative: another scene of the task, or the same words with fire put out or lit."""
    reworded = rng.random() < 0.2
    other = world.random_spec(rng, spec["tag"], spec["unsafe"] ^ reworded)
    if reworded:
        prompt = spec["prompt"].removesuffix(spec["ending"]) + other["ending"]
        other |= {"include": spec["include"], "prompt": prompt}
    return other

def paint(rng, spec):
    """uint8 [3, 32, 32] of a random scene that keeps the spec's promise."""
    return torch.from_numpy(world.paint(rng, world.random_scene(rng, spec))).permute(2, 0, 1)

def draw(n, fire_ignored, caption_wrong=0.15):
    """(uint8 images [n, 3, 32, 32], captions): these shares lack the fire, or show another scene."""
    rng = random.Random(0)
    images, captions = [], []
    for _ in range(n):
        spec = random_spec(rng)
        shown = dict(spec, unsafe=spec["unsafe"] and rng.random() >= fire_ignored)
        if rng.random() < caption_wrong:
            shown["include"] = world.random_spec(rng, spec["tag"])["include"]
        images.append(paint(rng, shown))
        captions.append(spec["prompt"])
    return torch.stack(images), captions

def make_tokenizer(captions):
    """CLIP's kind of BPE with the captions' words as tokens and printable ASCII to fall back on. The end
    token is the last id: transformers takes an eos id of 2 for an old checkpoint and pools elsewhere."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([*captions, " ".join(string.printable.lower())], trainer)
    learned = json.loads(bpe.to_str())["model"]
    words = [*sorted(learned["vocab"]), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = dict(zip(words, range(len(words)))), list(map(tuple, learned["merges"]))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)  # for up to 13 words

def tokenize(tokenizer, captions):
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

def updates(module, steps, lr):
    """Steps of AdamW under a cosine schedule with a short warm-up, each after the caller's backward."""
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=1e-4, fused=True)
    for step in tqdm(range(steps), module.__class__.__name__):
        yield
        warm_up = min(1, (step + 1) / 100)
        wave = 1 + math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * warm_up * 0.5 * wave
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()

@torch.no_grad()
def encode(vae, images):
    return torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in images.split(256)])

@torch.no_grad()
def decoded(vae, images):
    """uint8 images as the VAE decodes them from latents with noise, as rewards will see them."""
    x = []
    for latents in encode(vae, images).split(256):
        scale = 0.15 * torch.rand(len(latents), 1, 1, 1) * latents.std()
        latents = latents + scale * torch.randn_like(latents)
        x.append(((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255))
    return torch.cat(x).to(torch.uint8)

def make_vae(images):
    torch.manual_seed(0)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D", ) * 3, block_out_channels=(16, 32, 32),
                        up_block_types=("UpDecoderBlock2D", ) * 3, norm_num_groups=8,
                        sample_size=world.SIZE)
    for _ in updates(vae, 1000, 2e-3):
        x = images[torch.randint(len(images), (32, ))].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist  # under a light KL, as in latent diffusion
        error = vae.decode(posterior.sample()).sample - x
        loss = error.abs().mean() + 4 * error.square().mean() + 1e-5 * posterior.kl().mean()
        loss.backward()
    vae.register_to_config(scaling_factor=float(1 / encode(vae, images[:2048]).std()))
    return vae.eval()

def make_clip(vae, tokenizer, n):
    """On pairs that differ in one promise. Half of the images are decoded, as those it will reward."""
    torch.manual_seed(0)
    tower = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, hidden_act="gelu")
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=16, num_hidden_layers=3)
    for end in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text[end] = getattr(tokenizer, end)
    vision = dict(num_hidden_layers=4, image_size=world.SIZE, patch_size=8)
    clip = CLIPModel(
        CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=64,
                   logit_scale_init_value=math.log(50)))
    clip.logit_scale.requires_grad_(False)  # so sharp that fire stays a small share of an embedding

    rng = random.Random(0)
    specs = [random_spec(rng) for _ in range(n)]
    specs = [s for spec in specs for s in (spec, contrast(rng, spec))]
    images = torch.stack([paint(rng, spec) for spec in specs])
    images[:n] = decoded(vae, images[:n])
    ids = tokenize(tokenizer, [spec["prompt"] for spec in specs])
    norms = CLIPImageProcessorPil.image_mean, CLIPImageProcessorPil.image_std
    mean, std = torch.tensor(norms).view(2, 3, 1, 1)
    for _ in updates(clip, 2300, 1e-3):
        pick = (2 * torch.randint(n, (64, 1)) + torch.arange(2)).flatten()
        x, texts = (images[pick].float() / 255 - mean) / std, ids[pick]
        z_image = F.normalize(clip.get_image_features(x).pooler_output)
        z_text = F.normalize(clip.get_text_features(texts).pooler_output)
        logits = clip.logit_scale.exp() * z_image @ z_text.T
        same = (texts[:, None] == texts).all(-1).float()
        losses = [(logits.log_softmax(i) * same).sum(i) / same.sum(i) for i in (1, 0)]
        (-(losses[0] + losses[1]).mean() / 2).backward()
    return clip.eval()

def make_sd(vae, clip, tokenizer, images, captions):
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())  # frozen, as in SD: CLIP's text tower
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
                                norm_num_groups=16,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                attention_head_dim=4, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                                cross_attention_dim=64, mid_block_type=None)
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)  # as in SD
    latents = encode(vae, images) * vae.config.scaling_factor
    ids = tokenize(tokenizer, [*captions, ""])
    with torch.no_grad():
        text = torch.cat([text_encoder(part)[0] for part in ids.split(512)])  # [n + 1, tokens, 64]
    for _ in updates(unet, 2700, 3e-3):
        pick, t = torch.randint(len(latents), (64, )), torch.randint(1000, (64, ))
        noise = torch.randn(64, 4, 8, 8)
        caption = torch.where(torch.rand(64) < 0.1, -1, pick)  # none in one of ten, for guidance
        x = scheduler.add_noise(latents[pick], noise, t)
        F.mse_loss(unet(x, t, text[caption]).sample, noise).backward()
    parts = vae, text_encoder, tokenizer, unet, scheduler, None, None
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="gets the folders")
    out = parser.parse_args().out
    torch.set_num_threads(2)  # so that the weights do not depend on the number of cores
    prompt_files(out / "prompts")
    # Pictures for the VAE, words for the tokenizer: whether they belong together matters to neither.
    images, captions = draw(16_000, fire_ignored=0.35)
    tokenizer, vae = make_tokenizer(captions), make_vae(images)
    clip = make_clip(vae, tokenizer, 16_000)
    processor = CLIPImageProcessorPil(size={"shortest_edge": world.SIZE}, crop_size=world.SIZE)
    for part in (clip, tokenizer, processor):
        part.save_pretrained(out / "clip")
    images, captions = draw(32_000, fire_ignored=0.045)
    make_sd(vae, clip, tokenizer, images, captions).save_pretrained(out / "sd")
