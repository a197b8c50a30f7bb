"""Makes the toy world's models and prompt files: draws scenes and trains a VAE, a CLIP and a UNet.

    python toy/make.py        # writes toy/sd, toy/clip and toy/prompts; 22 minutes of one CPU core

toy/sd is a StableDiffusionPipeline folder and toy/clip a CLIPModel folder, both of the true classes. The
captions that the UNet learns are noisy on purpose, as captions from the web are: the start model obeys
imperfectly, and GRPO has something to explore.
"""
import argparse
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

import world

MAX_TOKENS = 16  # the longest caption has 13 words, plus start and end
FIRE_IGNORED = 0.09  # share of burning captions whose picture is calm
CAPTION_WRONG = 0.15  # share of captions whose picture shows another scene of the same task
NOISE = 0.15  # most that is added to latents of CLIP's training images, in their standard deviations

# ------------------------------------------------------------ data
def draw(n, seed, fire_ignored):
    """n scenes, two of five on fire: (uint8 images [n, 3, 32, 32], captions)."""
    rng = random.Random(seed)
    images, captions = [], []
    for _ in tqdm(range(n), "draw", mininterval=5):
        spec = world.random_spec(rng, rng.choice(world.TASKS), rng.random() < 0.4)
        shown = dict(spec, unsafe=spec["unsafe"] and rng.random() >= fire_ignored)
        if rng.random() < CAPTION_WRONG:
            shown["include"] = world.random_spec(rng, spec["tag"])["include"]
        images.append(paint(rng, shown))
        captions.append(spec["prompt"])
    return torch.stack(images), captions

def paint(rng, spec):
    """uint8 [3, 32, 32] of a random scene that keeps the spec's promise."""
    return torch.from_numpy(world.paint(rng, world.random_scene(rng, spec))).permute(2, 0, 1)

def contrast(rng, spec):
    """CLIP's hard negative of a spec: another scene of the same task, or the same words with fire put
    out or lit."""
    if rng.random() >= 0.2:
        return world.random_spec(rng, spec["tag"], spec["unsafe"])
    other = world.random_spec(rng, spec["tag"], not spec["unsafe"])
    prompt = spec["prompt"].removesuffix(spec["ending"]) + other["ending"]
    return dict(spec, unsafe=other["unsafe"], prompt=prompt)

def prompt_files(folder, seed):
    """Training prompts (never a test prompt), test prompts for sample.py, and the safety direction's
    anchors. The files called seen lack the last wording of the harm."""
    def prompts(test, unsafe):
        return [spec["prompt"] for spec in world.specs(1200, seed, test, unsafe)]

    sides = {"+": world.SAFE, "-": world.UNSAFE}.items()
    # Few anchors must differ in all but the harm: of one shape each, they would mean it more than fire.
    things = ("a circle", "a square and a triangle", "four triangles")
    files = {
        "unsafe": prompts(False, True),
        "compositional": prompts(False, False),
        "test-unsafe": prompts(True, True),
        "anchors": [f"{sign} a {s}{w}" for sign, ends in sides for s in world.SHAPES for w in ends],
        "anchors-compact": [f"{sign} {t}{w}" for sign, ends in sides for t, w in zip(things, ends)],
    }
    files["anchors-unsafe-only"] = [line for line in files["anchors-compact"] if line[0] == "-"]
    for name in ("unsafe", "anchors"):
        files[f"{name}-seen"] = [p for p in files[name] if not p.endswith(world.UNSAFE[-1])]
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / f"{name}.txt").write_text("\n".join(dict.fromkeys(lines)) + "\n")

# ------------------------------------------------------------ the tokenizer
def make_tokenizer(captions):
    """CLIP's kind of BPE with the captions' words as tokens and printable ASCII to fall back on. The end
    token is the last id: transformers takes an eos id of 2 for an old checkpoint and pools elsewhere."""
    specials = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(unk_token=specials[1], end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, end_of_word_suffix="</w>",
                                  initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(captions + [" ".join(letters)], trainer)
    learned = json.loads(bpe.to_str())["model"]
    words = {*learned["vocab"], *(c + "</w>" for c in letters)} - {*specials}
    vocabulary = {word: i for i, word in enumerate(sorted(words) + specials)}
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)

def tokenize(tokenizer, captions):
    settings = dict(padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return tokenizer(list(captions), **settings).input_ids

# ------------------------------------------------------------ training
def train(name, module, steps, lr, loss_of_batch):
    """AdamW under a cosine schedule with a short warm-up."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-4, fused=True)
    bar = tqdm(range(steps), name, mininterval=5)
    for step in bar:
        warm_up = min(1, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

def pixels(images):
    """uint8 images as the VAE sees them, in [-1, 1]."""
    return images.float() / 127.5 - 1

@torch.no_grad()
def encode(vae, images):
    return torch.cat([vae.encode(pixels(x)).latent_dist.mean for x in images.split(256)])

@torch.no_grad()
def decoded(vae, images):
    """uint8 images as the VAE decodes them from latents with noise, as rewards will see them."""
    x = []
    for latents in encode(vae, images).split(256):
        noise = NOISE * torch.rand(len(latents), 1, 1, 1) * latents.std() * torch.randn_like(latents)
        x.append(((vae.decode(latents + noise).sample + 1) * 127.5).round().clamp(0, 255))
    return torch.cat(x).to(torch.uint8)

def make_vae(images, seed):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", ) * 3,
        up_block_types=("UpDecoderBlock2D", ) * 3,
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        sample_size=world.SIZE,
    )

    def loss_of_batch():
        x = pixels(images[torch.randint(len(images), (32, ))])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        # a light KL, as in latent diffusion
        return error.abs().mean() + 4 * error.square().mean() + 1e-5 * posterior.kl().mean()

    train("vae", vae, 1200, 2e-3, loss_of_batch)
    vae.register_to_config(scaling_factor=float(1 / encode(vae, images[:2048]).std()))
    return vae.eval()

def make_clip(vae, tokenizer, n, seed):
    """Contrastive training on pairs that differ in one promise. Half of the images pass the VAE with
    noise, since rewards are given to decoded latents."""
    torch.manual_seed(seed)
    tower = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, hidden_act="gelu")
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, num_hidden_layers=3)
    vision = dict(num_hidden_layers=4, image_size=world.SIZE, patch_size=8)
    clip = CLIPModel(
        CLIPConfig(text_config=tower | text | ends, vision_config=tower | vision, projection_dim=64,
                   logit_scale_init_value=math.log(50)))
    clip.logit_scale.requires_grad_(False)  # so sharp that fire stays a small share of an embedding
    processor = CLIPImageProcessorPil
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))

    rng = random.Random(seed)
    specs = [world.random_spec(rng, rng.choice(world.TASKS), rng.random() < 0.4) for _ in range(n)]
    specs = [s for spec in specs for s in (spec, contrast(rng, spec))]
    images = torch.stack([paint(rng, spec) for spec in tqdm(specs, "draw pairs", mininterval=5)])
    images[:n] = decoded(vae, images[:n])
    captions = [spec["prompt"] for spec in specs]
    ids = tokenize(tokenizer, captions)
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([number[caption] for caption in captions])

    def loss_of_batch():
        pick = torch.randint(n, (64, ))
        pick = torch.stack([2 * pick, 2 * pick + 1], 1).flatten()
        x = (images[pick].float() / 255 - mean) / std
        z_image = F.normalize(clip.get_image_features(x).pooler_output, dim=-1)
        z_text = F.normalize(clip.get_text_features(ids[pick]).pooler_output, dim=-1)
        logits = clip.logit_scale.exp() * z_image @ z_text.T
        match = (same[pick][:, None] == same[pick][None]).float()
        by_image = (logits.log_softmax(1) * match).sum(1) / match.sum(1)
        by_text = (logits.log_softmax(0) * match).sum(0) / match.sum(0)
        return -(by_image + by_text).mean() / 2

    train("clip", clip, 3000, 1e-3, loss_of_batch)
    return clip.eval()

def make_sd(vae, clip, tokenizer, images, captions, seed):
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())  # frozen, as in SD: CLIP's text tower
    unet = UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # as in SD
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    latents = encode(vae, images) * vae.config.scaling_factor
    ids = tokenize(tokenizer, [*captions, ""]).split(512)
    with torch.no_grad():
        text = torch.cat([text_encoder(part).last_hidden_state for part in ids])  # [n + 1, tokens, 64]

    def loss_of_batch():
        pick, t = torch.randint(len(latents), (64, )), torch.randint(1000, (64, ))
        noise = torch.randn(64, 4, 8, 8)
        caption = torch.where(torch.rand(64) < 0.1, -1, pick)  # none in one of ten, for guidance
        x = scheduler.add_noise(latents[pick], noise, t)
        return F.mse_loss(unet(x, t, text[caption]).sample, noise)

    train("sd", unet, 4000, 2e-3, loss_of_batch)
    parts = (vae, text_encoder, tokenizer, unet, scheduler)
    return StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="gets the folders")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and prompts")
    args = parser.parse_args()

    torch.set_num_threads(1)  # so that the weights do not depend on the number of cores
    prompt_files(args.out / "prompts", args.seed)
    # Pictures for the VAE, words for the tokenizer: whether they belong together matters to neither.
    images, captions = draw(32_000, args.seed, fire_ignored=0.35)
    tokenizer = make_tokenizer(captions)
    vae = make_vae(images, args.seed)
    clip = make_clip(vae, tokenizer, 20_000, args.seed)
    processor = CLIPImageProcessorPil(size={"shortest_edge": world.SIZE}, crop_size=world.SIZE)
    for part in (clip, tokenizer, processor):
        part.save_pretrained(args.out / "clip")
    images, captions = draw(32_000, args.seed, FIRE_IGNORED)
    make_sd(vae, clip, tokenizer, images, captions, args.seed).save_pretrained(args.out / "sd")
