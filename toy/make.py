"""Makes the toy world's models and prompt files: draws scenes, trains a VAE, a CLIP, and a text encoder with a UNet on them.

    python toy/make.py            # about 20 minutes on 2 CPU cores; writes toy/sd, toy/clip and toy/prompts

toy/sd is a StableDiffusionPipeline folder and toy/clip a CLIPModel folder, both of the true classes, so that train.py,
sample.py and reward.py load them by path as they would Stable Diffusion. The captions of the UNet's training data are
noisy on purpose, as captions from the web are: the start model obeys imperfectly, and GRPO has something to explore.
"""

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

import world

HERE = Path(__file__).parent
MAX_TOKENS = 16  # the longest caption has 13 words, plus start and end
FIRE_IGNORED = 0.15  # share of burning captions whose picture is calm: the hazard is drawn in about nine of ten images
CAPTION_WRONG = 0.12  # share of captions whose picture shows another scene of the same task: composition stays imperfect


def draw(n, seed, fire_ignored, caption_wrong):
    """n scenes, the tasks in turn, two of five on fire: (uint8 images [n, 3, 32, 32], captions)."""
    rng, images, captions = random.Random(seed), [], []
    for i in tqdm(range(n), desc="draw", mininterval=5):
        spec = world.random_spec(rng, world.TASKS[i % len(world.TASKS)], rng.random() < 0.4)
        shown = dict(spec, unsafe=spec["unsafe"] and rng.random() >= fire_ignored)
        if rng.random() < caption_wrong:
            shown["include"] = world.random_spec(rng, spec["tag"])["include"]
        images.append(world.paint(rng, world.random_scene(rng, shown)))
        captions.append(spec["prompt"])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions


def contrast(rng, spec):
    """CLIP's hard negative of a spec: the same words with fire put out or lit, or another scene of the same task."""
    if rng.random() < 0.2:
        words = next((w for w in world.UNSAFE + world.SAFE if spec["prompt"].endswith(w)), "")
        other = world.random_spec(rng, spec["tag"], not spec["unsafe"])
        ending = next((w for w in world.UNSAFE + world.SAFE if other["prompt"].endswith(w)), "")
        return dict(spec, unsafe=other["unsafe"], prompt=spec["prompt"].removesuffix(words) + ending)
    return world.random_spec(rng, spec["tag"], spec["unsafe"])


def train_loop(name, parameters, steps, lr, loss_at, ema_of=None, decay=0.998):
    """AdamW under a cosine schedule with a short warm-up; the modules in ema_of end with averaged weights."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    averages = [
        torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
        for m in ema_of or ()
    ]
    bar = tqdm(range(steps), desc=name, mininterval=5)
    for step in bar:
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for average, module in zip(averages, ema_of or ()):
            average.update_parameters(module)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    for average, module in zip(averages, ema_of or ()):
        module.load_state_dict(average.module.state_dict())


def make_tokenizer(captions):
    """CLIP's kind of BPE with the captions' words as tokens and printable ASCII to fall back on. The end token is the last id:
    transformers takes an eos id of 2 for a legacy checkpoint and would pool elsewhere."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(captions + [" ".join(letters)], trainer)
    learned = json.loads(bpe.to_str())["model"]
    words = [w for w in learned["vocab"] if not w.startswith("<|")]
    order = words + [c + "</w>" for c in letters if c + "</w>" not in learned["vocab"]] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={w: i for i, w in enumerate(order)}, merges=[tuple(m) for m in learned["merges"]], model_max_length=MAX_TOKENS
    )


def tokenize(tokenizer, captions):
    return tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def make_vae(images, steps, seed):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        3,
        3,
        ("DownEncoderBlock2D",) * 3,
        ("UpDecoderBlock2D",) * 3,
        (16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
    )

    def loss_at(step):
        x = images[torch.randint(len(images), (48,))].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        return error.abs().mean() + 4 * error.square().mean() + 1e-5 * posterior.kl().mean()  # a light KL, as in latent diffusion

    train_loop("vae", list(vae.parameters()), steps, 2e-3, loss_at)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in images[:2048].split(256)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


def make_clip(vae, tokenizer, steps, n, seed):
    """Contrastive training on pairs that differ in one promise. Half of the images pass the VAE with noise, since rewards are
    given to decoded latents."""
    torch.manual_seed(seed)
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act="gelu",
        image_size=world.SIZE,
        patch_size=8,
    )
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=math.log(50)))
    clip.logit_scale.requires_grad_(False)  # a sharp temperature keeps the fire's share of the embedding small
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIPImageProcessorPil.image_mean, CLIPImageProcessorPil.image_std))
    rng = random.Random(seed)
    first = [world.random_spec(rng, world.TASKS[i % 6], rng.random() < 0.4) for i in range(n)]
    specs = [s for spec in first for s in (spec, contrast(rng, spec))]
    images = torch.stack(
        [torch.from_numpy(world.paint(rng, world.random_scene(rng, s))) for s in tqdm(specs, desc="draw pairs", mininterval=5)]
    ).permute(0, 3, 1, 2)
    with torch.no_grad():
        for i in tqdm(range(0, n, 256), desc="reconstruct", mininterval=5):  # the first half of the pairs
            latents = vae.encode(images[i : i + 256].float() / 127.5 - 1).latent_dist.mean
            latents += 0.15 * torch.rand(len(latents), 1, 1, 1) * latents.std() * torch.randn_like(latents)
            images[i : i + 256] = ((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    captions = [s["prompt"] for s in specs]
    ids = tokenize(tokenizer, captions)
    number = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([number[c] for c in captions])

    def loss_at(step):
        pick = torch.randint(n, (128,))
        pick = torch.stack([2 * pick, 2 * pick + 1], 1).flatten()
        x = images[pick].float() / 255
        z_image = F.normalize(clip.get_image_features((x - mean) / std).pooler_output, dim=-1)
        z_text = F.normalize(clip.get_text_features(ids[pick]).pooler_output, dim=-1)
        logits = clip.logit_scale.exp() * z_image @ z_text.T
        match = (same[pick][:, None] == same[pick][None]).float()
        return (
            -(
                (logits.log_softmax(1) * match).sum(1) / match.sum(1) + (logits.log_softmax(0) * match).sum(0) / match.sum(0)
            ).mean()
            / 2
        )

    train_loop("clip", [p for p in clip.parameters() if p.requires_grad], steps, 1e-3, loss_at)
    return clip.eval()


def make_sd(vae, clip, tokenizer, images, captions, steps, seed):
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())  # as in SD: CLIP's text tower
    unet = UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        block_out_channels=(48, 64),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in tqdm(images.split(256), desc="encode", mininterval=5)]
        )
    latents *= vae.config.scaling_factor
    ids, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])

    def loss_at(step):
        pick, t = torch.randint(len(latents), (128,)), torch.randint(1000, (128,))
        noise = torch.randn(128, 4, 8, 8)
        prompt = torch.where(torch.rand(128, 1) < 0.1, empty, ids[pick])  # 10 % without a caption, for classifier-free guidance
        prediction = unet(scheduler.add_noise(latents[pick], noise, t), t, text_encoder(prompt).last_hidden_state).sample
        return F.mse_loss(prediction, noise)

    train_loop("sd", [*unet.parameters(), *text_encoder.parameters()], steps, 2e-3, loss_at, ema_of=[unet, text_encoder])
    return StableDiffusionPipeline(
        vae, text_encoder.eval(), tokenizer, unet.eval(), scheduler, None, None, requires_safety_checker=False
    )


def prompt_files(folder, seed):
    """Training prompts (never a test prompt), test prompts for sample.py, and the anchors of the safety direction."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, test, unsafe in [("unsafe", False, True), ("compositional", False, False), ("test-unsafe", True, True)]:
        prompts = dict.fromkeys(spec["prompt"] for spec in world.specs(1200, seed, test, unsafe))
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    every = [[f"a {shape}{words}" for shape in world.SHAPES for words in side] for side in (world.SAFE, world.UNSAFE)]
    # Few anchors must differ in all but the harm: with one shape each, their mean would say "one shape" louder than "fire".
    things = ("a circle", "a square and a triangle", "four triangles")
    few = [[thing + words for thing, words in zip(things, side)] for side in (world.SAFE, world.UNSAFE)]
    for name, (safe, unsafe) in {"anchors": every, "anchors-compact": few, "anchors-unsafe-only": ([], few[1])}.items():
        (folder / f"{name}.txt").write_text("".join([f"+ {p}\n" for p in safe] + [f"- {p}\n" for p in unsafe]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE, type=Path, help="folder that gets sd/, clip/ and prompts/")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the data and of the training steps, for a quick look")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and prompts")
    args = parser.parse_args()

    def amount(n):
        return max(int(n * args.scale), 1)

    prompt_files(args.out / "prompts", args.seed)
    # Pictures for the VAE and words for the tokenizer; whether a picture keeps its caption's promise does not matter to either.
    images, captions = draw(amount(48_000), args.seed, fire_ignored=0.08, caption_wrong=0.25)
    tokenizer = make_tokenizer(captions)
    vae = make_vae(images, amount(2000), args.seed)
    clip = make_clip(vae, tokenizer, amount(3000), amount(20_000), args.seed)
    clip.save_pretrained(args.out / "clip")
    tokenizer.save_pretrained(args.out / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": world.SIZE}, crop_size=world.SIZE).save_pretrained(args.out / "clip")
    images, captions = draw(amount(48_000), args.seed, FIRE_IGNORED, CAPTION_WRONG)
    make_sd(vae, clip, tokenizer, images, captions, amount(3000), args.seed).save_pretrained(args.out / "sd")
