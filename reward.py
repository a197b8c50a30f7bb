"""The steering reward: a frozen CLIP scores an image against its prompt, moved towards safety where the prompt is unsafe.

    v     = normalize(mean z_txt(safe) - mean z_txt(unsafe))                     safety_direction
    s(p)  = z_txt(p) . v                                                         text_safety, < 0 means unsafe
    z*(p) = normalize(z_txt(p) + alpha v) if s(p) < 0, else z_txt(p)             steered_targets
    r     = z_img(x) . z*(p)                                                     reward

A first probe of a CLIP, an anchor file and an alpha (prints s(p), and which text each target is nearest to):

    python reward.py --reward toy/clip --anchors toy/prompts/anchors.txt "a circle on fire" "a circle calm" "a green square"

To train on another reward, edit `reward`: it gets images [B, 3, H, W] in [0, 1] and returns one number per image.
"""
import argparse
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from sample import fail, first_line

HPS_FILE = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")  # what the hpsv2 package downloads
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # every CLIP's BPE; what follows the end token does not reach its embedding
VIT_H_14 = {"projection_dim": 1024,
            "text_config": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                hidden_act="gelu", eos_token_id=49407),
            "vision_config": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                                  hidden_act="gelu", image_size=224, patch_size=14)}


# ----------------------------------------------------------------------------- embedders

def load_clip(name):
    """(CLIPModel, tokenizer, image size, mean, std) of "hpsv2", a path to its weights (.pt), or any CLIP's hub id or folder."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, logging
    logging.disable_progress_bar()
    if name == "hpsv2" or name.endswith(".pt"):
        return load_hpsv2(name)
    if (Path(name).exists() or name.startswith((".", "/"))) and not (Path(name) / "config.json").is_file():
        fail(f"--reward {name}: no CLIPModel folder (config.json is missing); give hpsv2, its .pt file, or a CLIP's id or folder")
    try:
        clip = CLIPModel.from_pretrained(name, dtype=torch.float32)
        tokenizer, processor = CLIPTokenizer.from_pretrained(name), CLIPImageProcessorPil.from_pretrained(name)
    except Exception as e:  # OSError, ValueError, SafetensorError, ... for what a folder may lack
        fail(f"--reward {name}: not readable as a CLIPModel ({first_line(e)})")
    return clip, tokenizer, clip.config.vision_config.image_size, processor.image_mean, processor.image_std


def from_openclip(state):
    """OpenCLIP's state dict under the names of transformers' CLIPModel: q, k and v apart, the two projections transposed."""
    part = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
            "attn.out_proj": "self_attn.out_proj"}
    whole = {"logit_scale": "logit_scale", "text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight",
             "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
             "positional_embedding": "text_model.embeddings.position_embedding.weight",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "visual.class_embedding": "vision_model.embeddings.class_embedding",
             "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight"}
    for kind in ("weight", "bias"):
        whole |= {f"ln_final.{kind}": f"text_model.final_layer_norm.{kind}",
                  f"visual.ln_pre.{kind}": f"vision_model.pre_layrnorm.{kind}",
                  f"visual.ln_post.{kind}": f"vision_model.post_layernorm.{kind}"}
    renamed = {}
    for key, w in state.items():
        if block := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", key):
            tower, layer, name, kind = block.groups()
            prefix = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{layer}"
            if name == "attn.in_proj":
                renamed |= {f"{prefix}.self_attn.{q}_proj.{kind}": piece for q, piece in zip("qkv", w.chunk(3))}
            else:
                renamed[f"{prefix}.{part[name]}.{kind}"] = w
        elif key != "attn_mask":  # a buffer; CLIPModel makes its own
            renamed[whole[key]] = w.T.contiguous() if key in ("visual.proj", "text_projection") else w
    return renamed


def load_hpsv2(name):
    """HPSv2.1, an OpenCLIP ViT-H-14, in transformers' CLIPModel: from the hub ("hpsv2") or its .pt file. No pickle runs."""
    from huggingface_hub import hf_hub_download
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.initialization import no_init_weights
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's about an odd pickle, before it refuses it
            file = hf_hub_download(*HPS_FILE) if name == "hpsv2" else name
            state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        state = from_openclip(state)
        with no_init_weights():  # a billion random numbers would be overwritten
            clip = CLIPModel(CLIPConfig(**VIT_H_14))
        clip.load_state_dict(state, strict=True)
        tokenizer = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
    except Exception as e:
        why = first_line(e).split(". ")[0]
        fail(f"--reward {name}: HPSv2.1 cannot be loaded ({why}); give the path to HPS_v2.1_compressed.pt")
    return clip.float(), tokenizer, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Embedder:
    """Unit-norm fp32 embeddings of a frozen CLIP-style model. autocast: the towers' dtype (None: fp32)."""

    def __init__(self, name, device="cpu", autocast=None):
        clip, self.tokenizer, self.size, mean, std = load_clip(name)
        self.clip = clip.to(device).eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
        self.device, self.autocast = torch.device(device), autocast

    @torch.no_grad()
    def text(self, phrases):
        """[len(phrases), D], always in fp32: the sign of s(p) must not hang on the batch or the precision."""
        length = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(list(phrases), padding=True, max_length=length, truncation=True, return_tensors="pt").input_ids
        z = self.clip.get_text_features(ids.to(self.device)).pooler_output
        return F.normalize(z.float(), dim=-1)

    @torch.no_grad()
    def image(self, images):
        """[B, D] of images [B, 3, H, W] in [0, 1]: bicubic resize of the short side, centre crop, CLIP's mean and std."""
        h, w = images.shape[-2:]
        if min(h, w) != self.size:
            scale = self.size / min(h, w)
            images = F.interpolate(images, (round(h * scale), round(w * scale)), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (images.shape[-2] - self.size) // 2, (images.shape[-1] - self.size) // 2
        images = images[..., top:top + self.size, left:left + self.size]
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            z = self.clip.get_image_features((images - self.mean) / self.std).pooler_output
        return F.normalize(z.float(), dim=-1)


# ----------------------------------------------------------------------------- the steering reward

def read_anchors(path):
    """(safe, unsafe) phrases of a text file of "+ safe phrase", "- unsafe phrase" and "# comment" lines; safe ones may lack."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        fail(f"--anchors {path}: cannot be read ({e}); give a text file of '+ safe phrase' and '- unsafe phrase' lines")
    for number, line in enumerate(lines, 1):
        if line and not (line[0] == "#" or line[0] in "+-" and line[1:].strip()):
            fail(f"--anchors {path}, line {number}: {line!r} must start with '+' (safe) or '-' (unsafe) and hold a phrase")
    safe, unsafe = ([line[1:].strip() for line in lines if line[:1] == sign] for sign in "+-")
    if not unsafe:
        fail(f"--anchors {path}: no '- unsafe phrase' line; at least one is needed")
    return safe, unsafe


def safety_direction(z_safe, z_unsafe):
    """v [D], unit: from the mean unsafe to the mean safe embedding ([S, D], [U, D]). With S = 0, away from the unsafe alone."""
    return F.normalize((z_safe.mean(0) if len(z_safe) else 0) - z_unsafe.mean(0), dim=0)


def text_safety(z_text, v):
    """s(p) [B], a cosine: below 0 the prompt lies on the unsafe side."""
    return z_text @ v


def steered_targets(z_text, v, alpha, steer="unsafe"):
    """z*(p) [B, D], unit. steer: "unsafe" moves the prompts with s(p) < 0 by alpha along v (the paper), "always" every prompt
    (its public code), "none" no prompt (plain CLIP)."""
    moved = F.normalize(z_text + alpha * v, dim=-1)
    s = text_safety(z_text, v)
    where = {"unsafe": s < 0, "always": torch.ones_like(s, dtype=bool), "none": torch.zeros_like(s, dtype=bool)}[steer]
    return torch.where(where[:, None], moved, z_text)


def reward(embedder, images, targets):
    """r [B]: the cosine of each image [B, 3, H, W] in [0, 1] with its target [B, D]."""
    return (embedder.image(images) * targets).sum(-1)


def add_reward_flags(parser):
    parser.add_argument("--reward", default="hpsv2", help="hpsv2, a path to its weights (.pt), or a CLIP's hub id or folder")
    parser.add_argument("--anchors", default="prompts/anchors/scaled.txt", help="file of '+ safe' and '- unsafe' phrases")
    parser.add_argument("--alpha", type=float, default=0.5, help="steering strength; the paper finds 0.3 to 0.7 alike")
    parser.add_argument("--steer", choices=["unsafe", "always", "none"], default="unsafe", help="whose targets move along v")


def check_alpha(args):
    if not 0 <= args.alpha < float("inf"):
        fail(f"--alpha {args.alpha}: must be 0 or more and finite; a negative one would steer towards the unsafe side")


def direction_from(args, embedder):
    safe, unsafe = read_anchors(args.anchors)
    z = embedder.text(safe + unsafe)
    return safety_direction(z[:len(safe)], z[len(safe):])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reward_flags(parser)
    parser.add_argument("prompts", nargs="+", help="prompts to probe")
    args = parser.parse_args()
    check_alpha(args)
    read_anchors(args.anchors)  # bad input is told before a model is loaded
    embedder = Embedder(args.reward)
    v, z = direction_from(args, embedder), embedder.text(args.prompts)
    targets = steered_targets(z, v, args.alpha, args.steer)
    print(f"cosine of each row's target z*(p) (--steer {args.steer}, alpha {args.alpha}) with every prompt's own text\n")
    print("  s(p)  moved  " + "  ".join(f"[{j}]".rjust(6) for j in range(len(z))))
    for i, prompt in enumerate(args.prompts):
        moved = "yes" if not torch.equal(targets[i], z[i]) else "no"
        cosines = "  ".join(f"{c:+.3f}" for c in (targets @ z.T)[i])
        print(f"{text_safety(z, v)[i]:+.3f}  {moved:>5}  {cosines}  [{i}] {prompt}")
