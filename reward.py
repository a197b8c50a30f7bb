"""The steering reward: a frozen CLIP scores an image against its prompt, moved towards safety where the prompt is unsafe.

    v     = normalize(mean z_txt(safe) - mean z_txt(unsafe))                     safety_direction
    s(p)  = z_txt(p) . v                                                         text_safety, < 0 means unsafe
    z*(p) = normalize(z_txt(p) + alpha v) if s(p) < 0, else z_txt(p)             steered_targets
    r     = z_img(x) . z*(p)                                                     reward

Probe a CLIP, an anchor file and an alpha before a long run: prints s(p) of each prompt, and the cosine of its target z*(p) with
the text of every prompt and with the images that --images names:

    python reward.py --reward toy/clip --anchors toy/prompts/anchors.txt --alpha 1.5 "a circle on fire" "a circle calm"

To train on another reward, edit `reward`: images [B, 3, H, W] in [0, 1] and their prompts' targets in, one number per image out.
"""
import argparse
import math
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from sample import check, fail, first_line  # bad input: one line on stderr, exit code 2


# ----------------------------------------------------------------------------- the steering reward

def safety_direction(z_safe, z_unsafe):
    """v [D], unit: from the mean unsafe to the mean safe embedding ([S, D], [U, D]). With S = 0, away from the unsafe alone."""
    return F.normalize((z_safe.mean(0) if len(z_safe) else 0) - z_unsafe.mean(0), dim=0)


def text_safety(z_text, v):
    """s(p) [B], a cosine: below 0 the prompt lies on the unsafe side."""
    return z_text @ v


def steered_targets(z_text, v, alpha, steer="unsafe"):
    """z*(p) [B, D], unit. steer: "unsafe" moves the prompts with s(p) < 0 by alpha along v (the paper), "always" every prompt
    (its public code), "none" no prompt (plain CLIP)."""
    unsafe = text_safety(z_text, v) < 0
    where = {"unsafe": unsafe, "always": unsafe | True, "none": unsafe & False}[steer]
    return torch.where(where[:, None], F.normalize(z_text + alpha * v, dim=-1), z_text)


def reward(embedder, images, targets):
    """r [B]: the cosine of each image [B, 3, H, W] in [0, 1] with its target [B, D]."""
    return (embedder.image(images) * targets).sum(-1)


# ----------------------------------------------------------------------------- CLIPs

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # all CLIPs share its BPE; OpenCLIP's other padding cannot reach the end token
VIT_H_14 = {"projection_dim": 1024,
            "text_config": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                hidden_act="gelu", eos_token_id=49407),
            "vision_config": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                                  hidden_act="gelu", image_size=224, patch_size=14)}


def load_clip(name):
    """(CLIPModel, tokenizer, image processor) of "hpsv2", a path to its weights (.pt), or any CLIP's hub id or folder."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, logging  # the Pil one needs no torchvision
    logging.disable_progress_bar()
    if name == "hpsv2" or name.endswith(".pt"):
        return *load_hpsv2(name), CLIPImageProcessorPil()  # its defaults are CLIP's: 224 pixels, mean and std
    try:
        processor, tokenizer = CLIPImageProcessorPil.from_pretrained(name), CLIPTokenizer.from_pretrained(name)
        if tokenizer.vocab_size < 3:  # transformers makes an empty one where a folder has none
            raise OSError("it has no tokenizer, such as vocab.json and merges.txt")
        return CLIPModel.from_pretrained(name, dtype=torch.float32), tokenizer, processor
    except Exception as e:  # OSError, ValueError, SafetensorError, ... for what a folder may lack
        fail(f"--reward / --clip {name}: not readable as a CLIPModel ({first_line(e)}); give its hub id or folder, "
             "hpsv2, or HPSv2.1's .pt file")


def from_openclip(state):
    """OpenCLIP's state dict under the names of transformers' CLIPModel: q, k and v apart, the two projections transposed."""
    whole = {"logit_scale": "logit_scale", "text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight",
             "token_embedding": "text_model.embeddings.token_embedding", "ln_final": "text_model.final_layer_norm",
             "positional_embedding": "text_model.embeddings.position_embedding.weight",
             "transformer.resblocks": "text_model.encoder.layers", "visual.transformer.resblocks": "vision_model.encoder.layers",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "visual.class_embedding": "vision_model.embeddings.class_embedding",
             "visual.conv1": "vision_model.embeddings.patch_embedding",
             "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    part = {".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2.", ".attn.": ".self_attn."}
    renamed = {}
    for key in state.keys() - {"attn_mask"}:  # a buffer; CLIPModel makes its own
        start = re.match(r"(visual\.)?(transformer\.resblocks|\w+)", key)[0]
        name, w = whole[start] + key.removeprefix(start), state[key]
        for theirs, ours in part.items():
            name = name.replace(theirs, ours)
        if "in_proj_" in name:
            renamed |= {name.replace("in_proj_", f"{q}_proj."): piece for q, piece in zip("qkv", w.chunk(3))}
        else:
            renamed[name] = w.T.contiguous() if key in ("visual.proj", "text_projection") else w
    return renamed


def load_hpsv2(name):
    """HPSv2.1, an OpenCLIP ViT-H-14, in transformers' CLIPModel: from the hub ("hpsv2") or its .pt file. No pickle runs."""
    from huggingface_hub import hf_hub_download
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.initialization import no_init_weights
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's about an odd pickle, before it refuses it
            file = hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt") if name == "hpsv2" else name
            state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        state = from_openclip(state)
        with no_init_weights():  # a billion random numbers would be overwritten
            clip = CLIPModel(CLIPConfig(**VIT_H_14))
        clip.load_state_dict(state, strict=True)
        tokenizer = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
    except Exception as e:
        why = first_line(e).split(". ")[0]
        fail(f"--reward {name}: HPSv2.1 cannot be loaded ({why}); it needs HPS_v2.1_compressed.pt, by path or from the hub, and "
             f"the tokenizer of {CLIP_TOKENIZER} from the hub or its cache")
    return clip.float(), tokenizer


class Embedder:
    """Unit-norm fp32 embeddings of a frozen CLIP-style model. autocast: the image tower's dtype (None: fp32)."""

    def __init__(self, name, device="cpu", autocast=None):
        clip, self.tokenizer, self.processor = load_clip(name)
        self.clip = clip.to(device).eval().requires_grad_(False)
        self.size = clip.config.vision_config.image_size
        self.mean = torch.tensor(self.processor.image_mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(self.processor.image_std, device=device).view(3, 1, 1)
        self.device, self.autocast = torch.device(device), autocast

    @torch.no_grad()
    def text(self, phrases):
        """[len(phrases), D], always in fp32: the sign of s(p) must not hang on the batch or the precision."""
        length = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(list(phrases), padding=True, max_length=length, truncation=True, return_tensors="pt").input_ids
        z = self.clip.get_text_features(ids.to(self.device)).pooler_output
        return F.normalize(z.float(), dim=-1)

    def image(self, images):
        """[B, D] of images [B, 3, H, W] in [0, 1]: bicubic resize of the short side, centre crop, CLIP's mean and std."""
        h, w = images.shape[-2:]
        scale = self.size / min(h, w)
        images = F.interpolate(images, (round(h * scale), round(w * scale)), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (images.shape[-2] - self.size) // 2, (images.shape[-1] - self.size) // 2
        return self.pixels((images[..., top:top + self.size, left:left + self.size] - self.mean) / self.std)

    def preprocess(self, image):
        """[1, 3, H, W] of a PIL image for `pixels`, by the CLIP's own processor."""
        return self.processor(image.convert("RGB"), return_tensors="pt").pixel_values

    @torch.no_grad()
    def pixels(self, pixels):
        """[B, D] of preprocessed images."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            z = self.clip.get_image_features(pixels.to(self.device)).pooler_output
        return F.normalize(z.float(), dim=-1)


# ----------------------------------------------------------------------------- anchors and flags

def read_anchors(path):
    """(safe, unsafe) phrases of a text file of "+ safe phrase", "- unsafe phrase" and "# comment" lines; safe is optional."""
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
    if sorted(safe) == sorted(unsafe):
        fail(f"--anchors {path}: the safe and the unsafe phrases are the same, so there is no direction; change one side")
    return safe, unsafe


def add_reward_flags(parser):
    parser.add_argument("--reward", default="hpsv2", help="hpsv2, a path to its weights (.pt), or a CLIP's hub id or folder")
    parser.add_argument("--anchors", default="prompts/anchors/scaled.txt", help="file of '+ safe' and '- unsafe' phrases")
    parser.add_argument("--alpha", type=float, default=0.5, help="steering strength; the paper finds 0.3 to 0.7 alike")
    parser.add_argument("--steer", choices=["unsafe", "always", "none"], default="unsafe", help="which targets are steered")


def check_alpha(args):
    check(args, "alpha", lambda x: 0 <= x < math.inf, "0 or more and finite: below 0 it would steer towards the unsafe side")


def direction_from(embedder, safe, unsafe):
    """v [D] of the phrases; one call of the text tower, for texts are padded to the longest."""
    z = embedder.text(safe + unsafe)
    return safety_direction(z[:len(safe)], z[len(safe):])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reward_flags(parser)
    parser.add_argument("prompts", nargs="+", help="prompts to probe")
    parser.add_argument("--images", nargs="+", default=[], help="image files: each one's reward under every prompt")
    args = parser.parse_args()
    check_alpha(args)
    safe, unsafe = read_anchors(args.anchors)
    try:
        images = [Image.open(file).convert("RGB") for file in args.images]
    except OSError as e:
        fail(f"--images: {first_line(e)}; give image files")
    embedder = Embedder(args.reward)
    v, z = direction_from(embedder, safe, unsafe), embedder.text(args.prompts)
    targets = steered_targets(z, v, args.alpha, args.steer)
    columns = torch.cat([z, *(embedder.pixels(embedder.preprocess(image)) for image in images)])
    print(f"cosine of each prompt's target z*(p), --steer {args.steer}, --alpha {args.alpha}: with the prompts' own texts [0], "
          "[1], ..." + ", then with the images (their reward)" * bool(images) + "\n")
    names = [f"[{i}]" for i in range(len(z))] + [Path(file).stem[-6:] for file in args.images]
    print("  s(p)  moved  " + "  ".join(name.rjust(6) for name in names))
    for i, prompt in enumerate(args.prompts):
        moved = "yes" if not torch.equal(targets[i], z[i]) else "no"
        cosines = "  ".join(f"{c:+.3f}" for c in (targets @ columns.T)[i])
        print(f"{text_safety(z, v)[i]:+.3f}  {moved:>5}  {cosines}  [{i}] {prompt}")
