"""The steering reward (arXiv 2605.18719, section 3.2): a frozen CLIP scores an image against its prompt,
whose embedding is moved towards safety where the prompt is unsafe. This file stands alone.

    v     = normalize(mean z_txt(safe) - mean z_txt(unsafe))           safety_direction
    s(p)  = z_txt(p) . v                                               text_safety, below 0: unsafe
    z*(p) = normalize(z_txt(p) + alpha v) if s(p) < 0, else z_txt(p)   steered_targets
    r     = z_img(x) . z*(p)                                           reward

Edit `reward` for another one. Before a long run probe it on prompts, files of prompts and pictures:
    python reward.py "a nude adult woman" prompts/nudity.txt prompts/benign.txt --images PICTURE.png
"""
import argparse
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download, logging
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

logging.set_verbosity_error()
transformers.logging.set_verbosity_error()  # no word on torchvision, which nothing here needs
transformers.logging.disable_progress_bar()

# ------------------------------------------------------------ the reward, equation by equation
def safety_direction(z_safe, z_unsafe):
    """v [D], unit, of embeddings [S, D] and [U, D]; with S = 0 it leads away from the unsafe alone."""
    return F.normalize((z_safe.mean(0) if len(z_safe) else 0) - z_unsafe.mean(0), dim=0)

def text_safety(z_text, v):
    """s(p) [B], a cosine: below 0 the prompt lies on the unsafe side."""
    return z_text @ v

def steered_targets(z_text, v, alpha, steer="unsafe"):
    """z*(p) [B, D], unit. Moved are those with s(p) < 0, "always" all (the public code), or "none"."""
    unsafe = text_safety(z_text, v) < 0
    moved = {"unsafe": unsafe, "always": unsafe | True, "none": unsafe & False}[steer]
    return torch.where(moved[:, None], F.normalize(z_text + alpha * v, dim=-1), z_text)

def reward(embedder, images, targets, prompts):
    """r [B]: cosine of images [B, 3, H, H] in [0, 1] and targets [B, D]; prompts [B]: for your own."""
    return (embedder.image(images) * targets).sum(-1)

# ------------------------------------------------------------ bad input: one line, exit code 2
def fail(message):
    argparse.ArgumentParser().exit(2, f"error: {message}\n")

@contextmanager
def loading(what, mend="give another"):
    """What goes wrong in here is the fault of the file or flag that `what` names."""
    try:
        yield
    except Exception as e:
        fail(f"{what}: {(str(e).strip() or repr(e)).splitlines()[0]}; {mend}")

def flags(doc, **more):
    """A script's parser, and add(name, default, help, its type where that is not the default's)."""
    parser = argparse.ArgumentParser(None, argparse.SUPPRESS, doc.splitlines()[0], **more)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter

    def add(name, default, help, kind=None, **options):
        switch = {"action": argparse.BooleanOptionalAction}
        options |= switch if default is False else {"type": kind or type(default)}
        parser.add_argument(name, default=default, help=help, **options)

    return parser, add

def check_numbers(parser, args, zero):
    """args, whose numbers must be finite and above 0; those named in `zero` may be 0."""
    for name, x in vars(args).items():
        most = 1 if name in ("eta", "threshold") else 2**62
        if type(x) in (int, float) and not (0 < x <= most or x == 0 and name in zero.split()):
            parser.error(f"--{name.replace('_', '-')} {x}: give a number above 0 and up to {most}")
    return args

# ------------------------------------------------------------ the frozen CLIP
def strictly(cls, name, dtype=torch.float32, **kwargs):
    """cls.from_pretrained, where a missing, unused, misshapen or non-finite weight is an error."""
    model, report = cls.from_pretrained(name, dtype=dtype, output_loading_info=True,
                                        ignore_mismatched_sizes=True, **kwargs)
    nan = (key for key, w in model.named_parameters() if not w.isfinite().all())
    for kind, keys in {**report, "not finite": nan}.items():  # a missing weight has no value to ask
        if wrong := sorted(map(str, keys)):
            raise ValueError(f"its weights do not fit, {len(wrong)} {kind}, as {wrong[0]}")
    return model.eval().requires_grad_(False)

class Embedder:
    """Unit-norm fp32 embeddings. name: "hpsv2" or its .pt file, or a CLIPModel's hub id or folder."""
    def __init__(self, name, device="cpu", flag="--reward"):
        with loading(f"{flag} {name}", "give hpsv2, HPSv2.1's .pt, or a CLIPModel's hub id or folder"):
            hps = name == "hpsv2" or name.endswith(".pt")
            clip, source = load_hpsv2(name) if hps else (strictly(CLIPModel, name), name)
            self.processor = CLIPImageProcessorPil.from_pretrained(source)
            self.tokenizer = CLIPTokenizer.from_pretrained(source)
            if self.tokenizer.vocab_size < 3:  # transformers makes an empty one where a folder has none
                raise ValueError("it has no tokenizer")
        self.clip = clip.to(device)
        self.tokenizer.model_max_length = self.clip.config.text_config.max_position_embeddings

    def text(self, phrases):
        """[len(phrases), D]. Not for autocast: the sign of s(p) must not hang on the precision."""
        tokens = self.tokenizer(list(phrases), padding=True, truncation=True, return_tensors="pt")
        parts = tokens.input_ids.to(self.clip.device).split(256)  # of files of tens of thousands
        z = torch.cat([self.clip.get_text_features(part).pooler_output for part in parts])
        return F.normalize(z, dim=-1)

    def image(self, images):
        """[B, D] of images [B, 3, H, H] in [0, 1], resized and normalised as CLIP's processor does."""
        size = self.clip.config.vision_config.image_size
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = images.new_tensor([self.processor.image_mean, self.processor.image_std])
        return self.pixels((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))

    def pictures(self, pictures):
        """[B, D] of PIL images of any size, by CLIP's own processor, one at a time."""
        pixels = (self.processor(picture, return_tensors="pt").pixel_values for picture in pictures)
        return torch.cat([*map(self.pixels, pixels)])

    def pixels(self, pixels):
        return F.normalize(self.clip.get_image_features(pixels.to(self.clip.device)).pooler_output)

def load_direction(embedder, path):
    """v [D] of a text file of "+ safe phrase", "- unsafe phrase" and "# comment" lines."""
    with loading(f"--anchors {path}", "its lines are '+ safe phrase', '- unsafe phrase', '# comment'"):
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
        lines = [line for line in lines if line and line[0] != "#"]
        safe, unsafe = ([line[1:].strip() for line in lines if line[0] == sign] for sign in "+-")
        if not unsafe or len({*safe, *unsafe} - {""}) < len(lines):
            raise ValueError("it has no unsafe phrase, one that stands twice, or a line of another kind")
    z = embedder.text(safe + unsafe)  # [S + U, D]
    return safety_direction(z[:len(safe)], z[len(safe):])

# ------------------------------------------------------------ HPSv2.1, an OpenCLIP ViT-H-14
TEXT = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, eos_token_id=49407)
IMAGE = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14)
BOTH = dict(num_attention_heads=16, hidden_act="gelu", projection_dim=1024)
VIT_H_14 = dict(text_config=TEXT | BOTH, vision_config=IMAGE | BOTH, projection_dim=1024)
RENAMED = """transformer.resblocks encoder.layers  attn. self_attn.  ln_1 layer_norm1  ln_2 layer_norm2
c_fc fc1  c_proj fc2  ln_pre pre_layrnorm  ln_post post_layernorm  ln_final final_layer_norm
positional_embedding embeddings.position_embedding.weight  token_embedding embeddings.token_embedding
class_embedding embeddings.class_embedding  conv1 embeddings.patch_embedding
vision_model.proj visual_projection.weight  text_model.text_projection text_projection.weight
text_model.logit_scale logit_scale""".split()  # OpenCLIP's names and CLIPModel's, replaced in this order

def from_openclip(state):
    """OpenCLIP's weights under CLIPModel's names: q, k and v apart, the two projections transposed."""
    renamed = {}
    for key in state.keys() - {"attn_mask"}:
        name = f"vision_model.{key[7:]}" if key.startswith("visual.") else f"text_model.{key}"
        for theirs, ours in zip(RENAMED[::2], RENAMED[1::2]):
            name = name.replace(theirs, ours)
        w = state[key].T if name.endswith("_projection.weight") else state[key]
        parts = zip("qkv", w.chunk(3)) if "in_proj_" in name else [("", w)]
        renamed |= {name.replace("in_proj_", f"{letter}_proj."): part for letter, part in parts}
    return renamed

def load_hpsv2(name):
    """(CLIPModel, where its tokenizer and processor are), by download or path; no pickle runs."""
    file = hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt") if name == "hpsv2" else name
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    clip = strictly(CLIPModel, None, config=CLIPConfig(**VIT_H_14), state_dict=from_openclip(state))
    beside = Path(file).parent
    return clip, beside if (beside / "tokenizer.json").exists() else "openai/clip-vit-large-patch14"

if __name__ == "__main__":
    parser, add = flags(__doc__)
    add("--reward", "hpsv2", "as in train.py")
    add("--anchors", "prompts/anchors/scaled.txt", "as in train.py")
    add("--alpha", 0.5, "as in train.py")
    add("--images", [], "pictures to reward", str, nargs="+")
    parser.add_argument("prompts", nargs="+", help="prompts, and .txt files of prompts")
    args = check_numbers(parser, parser.parse_args(), zero="alpha")
    embedder = Embedder(args.reward)
    v = load_direction(embedder, args.anchors)
    with loading("--images"):
        images = [embedder.pictures([Image.open(file)])[0] for file in args.images]
    for prompt in args.prompts:
        with loading(prompt, "give prompts, or .txt files of them"):
            text = Path(prompt).read_text("utf-8-sig") if prompt.endswith(".txt") else prompt
            z = embedder.text(filter(str.strip, text.splitlines()))  # [B, D]
        s, targets = text_safety(z, v), steered_targets(z, v, args.alpha)  # [B], [B, D]
        rewards = "".join(f" {(targets @ z).mean():+.3f}" for z in images)
        print(f"s(p) {s.mean():+.3f}, below 0: {(s < 0).float().mean():.1%}, rewards{rewards}  {prompt}")
