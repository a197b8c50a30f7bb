"""Images/s of every eval.py command beside the bare forward of the same model on the same images, in one run.

    python tests/bench_eval.py                        # NudeNet, Q16, GenEval, CLIP score, FID: about 2 minutes on 2 cores
    python tests/bench_eval.py nudenet --images 200 --device cuda

A command's time is all that it does per image: checksums, decoding, resizing, forward, rules, writing. The bare
forward gets finished inputs in memory. The two alternate, and the medians are compared. NudeNet has its real weights; the others
have random weights in the true classes and sizes (CLIP ViT-B/32, Mask2Former Swin-S at 800 x 800, an eighth of the images), FID a
stand-in convolution net of about Inception-v3's cost, unless --inception gives the real one. The number to watch is the last
column: 0.9 or better means that reading images hides behind the model.
"""
import argparse
import contextlib
import csv
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import eval as E  # noqa: E402


def make_images(folder, n):
    """n photographs of 512 x 512 as sample.py names them, their csv, and GenEval's folders with the same pictures."""
    photo, names = data.astronaut(), []
    for i in range(n):
        names.append((folder / f"flat/{i}_0.png", folder / f"geneval/{i // 4:05d}/samples/{i % 4:04d}.png"))
        for path in names[-1]:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(photo, 7 * i, axis=1)).save(path)
    with open(folder / "prompts.csv", "w", newline="") as f:
        csv.writer(f).writerows([["prompt", "categories"], *([f"a photo of {i}", "hate"] for i in range(n))])
    include = [{"class": "person", "count": 1}]
    specs = [json.dumps({"tag": "single_object", "include": include, "prompt": str(i)}) + "\n" for i in range(n // 4)]
    (folder / "metadata.jsonl").write_text("".join(specs))
    for i, line in enumerate(specs):
        (folder / f"geneval/{i:05d}/metadata.jsonl").write_text(line)
    return [flat for flat, _ in names]


def make_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "toy/sd/tokenizer")
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    CLIPModel(CLIPConfig(text_config=dict(vocab_size=len(tokenizer), **ids))).save_pretrained(folder)  # ViT-B/32
    CLIPImageProcessorPil().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_detector(folder):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil, SwinConfig
    swin = SwinConfig(image_size=224, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=80)).save_pretrained(folder)
    Mask2FormerImageProcessorPil().save_pretrained(folder)


class StandIn(torch.nn.Module):
    """inception-2015-12-05.pt's call at about its cost (5.7 GMAC per image)."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 96, 256, 384)
        convolutions = (torch.nn.Conv2d(a, b, 3, stride=1 + (i != 1)) for i, (a, b) in enumerate(zip(widths, widths[1:])))
        self.layers = torch.nn.Sequential(*convolutions)
        self.head = torch.nn.Linear(384, 2048)

    def forward(self, img: torch.Tensor, return_features: bool = False):
        return self.head(self.layers(img.float() / 128 - 1).mean([2, 3]))


def bare_forward(metric, files, args):
    """A function that runs the metric's model on all images, its inputs prepared beforehand."""
    if metric == "nudenet":
        from nudenet import nudenet
        detector = nudenet.NudeDetector(["CPUExecutionProvider"] if args.device == "cpu" else None)
        inputs = [nudenet._read_image(str(p), detector.input_width)[0] for p in files]
        return lambda: [detector.onnx_session.run(None, {detector.input_name: x}) for x in inputs]
    if metric == "fid":
        inception = torch.jit.load(args.inception, map_location=args.device).eval()
        images = [np.asarray(Image.open(p).resize((299, 299)), np.float32).transpose(2, 0, 1) for p in files]
        batches = torch.from_numpy(np.stack(images)).split(args.batch)
        return torch.no_grad()(lambda: [inception(b.to(args.device), return_features=True).cpu() for b in batches])
    if metric == "geneval":
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil
        detector = Mask2FormerForUniversalSegmentation.from_pretrained(args.detector).to(args.device).eval()
        processor = Mask2FormerImageProcessorPil.from_pretrained(args.detector)
        batches = torch.cat([processor(Image.open(p), return_tensors="pt").pixel_values for p in files]).split(args.batch)
        return torch.no_grad()(lambda: [detector(b.to(args.device)).class_queries_logits.cpu() for b in batches])
    clip = E.Embedder(str(args.clip), args.device)
    batches = torch.cat([clip.preprocess(Image.open(p)) for p in files]).split(args.batch)
    captions = [[f"a photo of {i}" for i in range(k, k + len(b))] for k, b in zip(range(0, len(files), args.batch), batches)]
    if metric == "q16":
        return torch.no_grad()(lambda: [clip.pixels(b).cpu() for b in batches])
    return torch.no_grad()(lambda: [(clip.pixels(b) * clip.text(t)).sum(1).cpu() for b, t in zip(batches, captions)])


def command_seconds(argv, report):
    """Seconds from when a command's models are loaded to its last verdict written, from scratch."""
    score, seconds = E.score, []

    def timed(*args):
        start = time.perf_counter()
        report = score(*args)
        seconds.append(time.perf_counter() - start)
        return report
    report.unlink(missing_ok=True)
    E.score = timed
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            E.main(argv)
    finally:
        E.score = score
    return seconds[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="*", default=["nudenet", "q16", "geneval", "clip", "fid"], help="which commands")
    parser.add_argument("--images", type=int, default=32, help="images per command (GenEval: an eighth of them)")
    parser.add_argument("--batch", type=int, default=4, help="images per forward")
    parser.add_argument("--repeats", type=int, default=3, help="times that each of the two runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--inception", help="inception-2015-12-05.pt")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        flat = make_images(folder, args.images)
        torch.manual_seed(0)
        args.clip, args.detector = folder / "clip", folder / "detector"
        make_clip(args.clip)
        make_detector(args.detector)
        if not args.inception:
            args.inception = folder / "inception.pt"
            torch.jit.script(StandIn()).save(args.inception)
        torch.save(torch.randn(2, 512), folder / "q16.pt")
        base = ["--device", args.device, "--images"]
        commands = {"nudenet": [*base, folder / "flat"],
                    "q16": [*base, folder / "flat", "--prompts", folder / "prompts.csv", "--clip", args.clip,
                            "--q16-prompts", folder / "q16.pt"],
                    "clip": [*base, folder / "flat", "--prompts", folder / "prompts.csv", "--clip", args.clip],
                    "geneval": [*base, folder / "geneval", "--metadata", folder / "metadata.jsonl",
                                "--detector", args.detector, "--clip", args.clip],
                    "fid": [*base, folder / "flat", "--real", folder / "flat", "--inception", args.inception]}
        cores = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads"
        where = torch.cuda.get_device_name() if args.device == "cuda" else cores
        print(f"{where}, {args.images} images of 512 x 512, batch {args.batch}, median of {args.repeats}")
        print(f"{'metric':10}{'command':>12}{'bare':>12}{'ratio':>8}     images/s")
        for metric in args.metrics:
            files, batch = flat, ["--batch", args.batch] if metric != "nudenet" else []
            if metric == "geneval":
                files = flat[:max(4, args.images // 32 * 4)]
                lines = (folder / "metadata.jsonl").read_text().splitlines(True)
                (folder / "metadata.jsonl").write_text("".join(lines[:len(files) // 4]))
                for extra in sorted((folder / "geneval").glob("0*"))[len(files) // 4:]:
                    extra.rename(folder / extra.name)
            elif metric == "fid":
                files = flat + flat  # both sides
            bare, argv = bare_forward(metric, files, args), [str(a) for a in (metric, *commands[metric], *batch)]
            bare()  # warm up
            seconds = {"command": [], "bare": []}
            for _ in range(args.repeats):
                seconds["command"].append(command_seconds(argv, Path(argv[4]) / f"{metric}.json"))
                start = time.perf_counter()
                bare()
                seconds["bare"].append(time.perf_counter() - start)
            speed = {k: len(files) / statistics.median(v) for k, v in seconds.items()}
            print(f"{metric:10}{speed['command']:12.2f}{speed['bare']:12.2f}{speed['command'] / speed['bare']:8.2f}", flush=True)
