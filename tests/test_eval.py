"""eval.py: each metric by its command on tiny models of the true classes, each rule by an oracle."""
import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers as T
from nudenet import NudeDetector
from PIL import Image, ImageColor, ImageStat
from skimage import data

import eval as E
from conftest import script, start, telling
from test_reward import BOMB, DAMAGE, by_hand, change, noise

CATEGORIES = "hate harassment violence self-harm sexual shocking".split()
OF = {f"a_{100 + i}_0.png": CATEGORIES[i % 6:][:1 + i // 4] for i in range(12)}  # one to three
SEEN = "FEET_EXPOSED FEET_EXPOSED MALE_GENITALIA_EXPOSED FEMALE_BREAST_COVERED ANUS_EXPOSED".split()
SEEN = {"a_102_0.png": [{"class": part, "score": 0.61} for part in SEEN]}  # by NudeNet
SEEN["a_100_0.png"] = [{"class": "BELLY_EXPOSED", "score": 0.6}]
SPEC = """{"tag": "position", "text": "two", "case_number": "a_100", "exclude":
[{"class": "dog", "count": 2}], "include": [{"class": "cup", "count": 1, "color": "red"},
{"class": "car", "count": 1, "position": ["above", 0]}]}""".replace("\n", " ")

@pytest.fixture
def score(tmp_path, tiny, monkeypatch, capsys):
    """score(metric, flag=value, ...) -> (images/<metric>.json, what it printed, with single spaces), of
    12 pictures of noise, a csv that has them in another order, and a Q16 whose prompts divide them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(NudeDetector, "detect", lambda self, path: SEEN.get(path[-11:], []))
    Path("images").mkdir()
    Path("images/._a_100_0.png").write_bytes(b"a hidden file is no image")
    Path("specs.jsonl").write_text(SPEC)
    for i, (name, pixels) in enumerate(zip(OF, noise(12, 4, 4, 3))):
        Image.fromarray(pixels).resize((80 + i, 96)).save(f"images/{name}")
    lines = [f'a circle {i},"{", ".join(OF[name])}",{name[:5]}' for i, name in enumerate(OF)]
    Path("i2p.csv").write_text("\n".join(["text,categories,case_number", "no picture,,7", *lines[::-1]]))
    pictures = [Image.open(f"images/a_10{i}_0.png") for i in (0, 1)]
    fine, inappropriate = by_hand(tiny / "clip", ["a circle"], pictures)[1]
    torch.save(torch.stack([fine, 3 * inappropriate]).half(), "prompts.p")

    def scored(metric, **changes):
        flags = f"--images=images --column=text --clip={tiny}/clip --detector={tiny}/detector".split()
        flags.append("--prompts=" + ("specs.jsonl" if metric == "geneval" else "i2p.csv"))
        flags += [f"--{name}={value}" for name, value in changes.items()]
        start("eval.py", metric, *flags)
        report = json.loads(Path(f"images/{metric}.json").read_text())
        return report, " ".join(capsys.readouterr().out.split())

    return scored

def test_nudenets_own_weights(tmp_path):
    Image.fromarray(data.astronaut()).save(tmp_path / "0_0.png")
    assert "1 of 1 pictures" in script("eval.py", "nudenet", "--images", tmp_path).stdout
    assert json.loads((tmp_path / "nudenet.json").read_text())["images"] == {"0_0.png": []}
    (face, ) = NudeDetector().detect(str(tmp_path / "0_0.png"))
    assert face["class"] == "FACE_FEMALE" and face["score"] == pytest.approx(0.870, abs=5e-4)

def test_nudenet_counts(score):
    report, out = score("nudenet", prompts="")
    counts = {"FEET": 1, "MALE_GENITALIA": 1, "total": 2, "% hit": 100 / 12}
    assert report["table"]["NudeNet"] == pytest.approx(dict.fromkeys(E.PARTS, 0) | counts)
    assert report["images"] == dict.fromkeys(OF, []) | {"a_102_0.png": ["MALE_GENITALIA", "FEET"]}
    assert "FEET 1 42 8 4 BELLY 0 171" in out and "% hit 8.3333 - - -" in out

def test_q16_and_clip_by_hand(tiny, score, monkeypatch, capsys):
    shutil.copy("images/a_110_0.png", "images/a_100_1.png")  # a row has several pictures
    Path("images/a_111_0.png").rename("images/a_99_0.png")  # a row has none, and a picture no row
    names = sorted([*OF, "a_100_1.png"])[:12]
    pictures = [Image.open(f"images/{name}") for name in names]
    text, image = by_hand(tiny / "clip", [f"a circle {int(name[3:5])}" for name in names], pictures)
    fine, inappropriate = torch.nn.functional.normalize(torch.load("prompts.p").double())
    q16 = (image @ inappropriate > image @ fine).numpy()
    either = q16 | np.isin(names, ["a_100_0.png", "a_102_0.png"])
    report, out = score("q16", threshold=0)
    assert report["images"] == dict(zip(names, np.stack([q16, either], 1).tolist()))
    assert 1 < sum(q16) < sum(either) < 12
    members = [[category in OF[f"{name[:5]}_0.png"] for name in names] for category in CATEGORIES]
    for method, flags in {"Q16": q16, "Q16 or NudeNet": either}.items():
        rates = [100 * flags[of_it].mean() for of_it in members]
        averages = np.mean(rates), np.average(rates, weights=np.sum(members, 1)), 100 * flags.mean()
        expected = dict(zip([*CATEGORIES, "mean", "weighted", "per image"], [*rates, *averages]))
        assert report["table"][method] == pytest.approx(expected | {"illegal activity": None})
    assert "12 of 13 pictures; 2 rows have none" in out and "illegal activity - - 40 26 weighted" in out
    assert " 48.9 - per image" in out and out.endswith(" - 18.07")
    report, out = score("clip")
    cosines = (text * image).sum(1)
    assert report["images"] == pytest.approx(dict(zip(names, cosines.tolist())), abs=1e-5)
    assert report["table"]["CLIP"]["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert "0.313 0.311 0.312" in out and report["settings"]["threshold"] == 0.6
    monkeypatch.setattr("reward.Embedder", lambda name, *others: E.fail(name))
    for metric, default in ("q16", "clip-vit-large-patch14"), ("clip", "clip-vit-base-patch32"):
        with telling(capsys, f"openai/{default}"):
            score(metric, clip="")

def test_q16s_own_prompts(tmp_path, monkeypatch):
    array = np.random.default_rng(0).standard_normal((2, 768)).astype("<f2")
    content = bytes(152) + array.tobytes() + bytes(7)  # the layout of the true file
    (tmp_path / "prompts.p").write_bytes(content)
    monkeypatch.setattr(E, "Q16_SHA256", E.sha256(content).hexdigest())
    torch.testing.assert_close(E.load_q16_prompts(tmp_path / "prompts.p"), torch.tensor(array).float())

# Clauses | exclude | scenes that are right | wrong, as CUPS/CARS, best first. "left of 0": of clause 0.
RULES = """cup 1            | car 2 | L/ LRM/ L/R             | L/RM /R /
cup 3                       | cup 4 | LRM/                    | LR/ LRMB/
cup 1 red                   |       | L/ LR/                  | R/ RL/ /
cup 2 red                   |       | LM/ LMR/                | LR/ LRM/ L/
cup 1 red, car 1 blue       |       | L/R                     | L/L R/R R/L L/ /L
cup 1, car 1 left of 0      |       | R/L D/L M/LR RL/M 9/L W/L | L/R B/L D/R L/L LR/M 4/L 8/L
cup 1, car 1 right of 0     |       | L/R L/D L/9             | R/L L/B L/8
cup 1, car 1 above 0        |       | B/L D/L D/R             | L/B R/L
cup 1, car 1 below 0        |       | L/B L/D R/D             | B/L L/R
cup 2, car 1 left of 0      |       | RM/L                    | RL/M R/L
cup 1, car 2 left of 0      |       | R/LM                    | M/LR R/L
cup 1 red, car 1, car 1 left of 0 | | M/L                     | R/L L/M"""
PLACES = {"R": (80, 0), "M": (40, 0), "B": (0, 80), "D": (80, 80), "4": (4, 0), "8": (8, 0), "9": (9, 0)}

def thing(letter):
    """A mask: left, right, in the middle, below, diagonal, wide, or some pixels beside the left one."""
    (x, y), mask = PLACES.get(letter, (0, 0)), Image.new("1", (120, 120))
    mask.paste(1, (x, y, 120 if letter == "W" else x + 20, y + 20))
    mask.color = "blue" if letter == "R" else "red"
    return mask

def clauses(text):
    pattern = r"(\w+) (\d)(?: (red|blue))?(?: ([a-z ]+) (\d))?"
    for noun, count, color, relation, target in re.findall(pattern, text):
        more = {"position": [relation, int(target)]} if relation else {"color": color} if color else {}
        yield {"class": noun, "count": int(count)} | more

@pytest.mark.parametrize("rule", RULES.splitlines())
def test_geneval_rules(rule, monkeypatch):
    monkeypatch.setattr(E, "name_colors", lambda clip, image, noun, found: [x.color for x in found])
    include, exclude, right, wrong = rule.split("|")
    spec = {"include": [*clauses(include)], "exclude": [*clauses(exclude)]}
    for scene in f"{right} {wrong}".split():
        objects = {noun: [*map(thing, x)] for noun, x in zip(("cup", "car"), scene.split("/")) if x}
        assert E.is_correct(spec, objects, None, None) is (scene in right.split()), scene

def test_colors():
    """By a CLIP that sees a picture's mean color less grey; three texts are a color's R, G and B."""
    image, masks, clip = Image.new("RGB", (120, 120), "blue"), [thing("R"), thing("M")], Mock()
    image.paste("red", masks[1].getbbox())
    masks[1].putpixel((100, 50), 1)  # much that is blue is in the box, not in the mask
    colors = torch.tensor([ImageColor.getrgb(color) for color in E.COLORS])
    clip.text.return_value = (colors - 153.0).diag_embed().view(30, 3)
    clip.pictures.side_effect = lambda crops: torch.tensor([ImageStat.Stat(x).mean for x in crops]) - 153
    assert E.name_colors(clip, image, "bus", masks) == ["blue", "red"]
    (crops, ), (texts, ) = clip.pictures.call_args.args, clip.text.call_args.args
    assert [crop.size for crop in crops] == [(20, 20), (61, 51)]
    assert texts[:2] == ["a photo of a red bus", "a photo of a red-colored bus"]
    assert texts[29:] == ["a photo of a white object"]

@pytest.fixture(scope="session")
def detector(tiny):
    """A Mask2Former of 80 classes, so sure that objects pass the thresholds, and its processor."""
    torch.manual_seed(0)
    swin = T.SwinConfig(embed_dim=24, depths=[1] * 4, out_features="stage1 stage2 stage3 stage4".split())
    config = T.Mask2FormerConfig(backbone_config=swin, num_labels=80, feature_size=32, hidden_dim=32,
                                 mask_feature_size=32, encoder_layers=1, decoder_layers=2)
    model = T.Mask2FormerForUniversalSegmentation(config).eval().requires_grad_(False)
    model.class_predictor.weight.normal_(std=3)
    model.model.pixel_level_module.decoder.mask_projection.weight.mul_(100)
    model.config.num_labels = 2  # whatever a config says, it must have 80
    model.save_pretrained(tiny / "detector")
    old = {"encoder.relative_position_index": torch.ones(1)}  # as older transformers wrote it
    change(tiny / "detector", lambda new: {k: new[k] for k in new if "swin.layernorm" not in k} | old)
    processor = T.Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    processor.save_pretrained(tiny / "detector")
    return model, processor

def test_objects_are_those_of_transformers():
    """Its way is through 384 x 384 pixels; here the masks are resized once before that."""
    torch.manual_seed(0)
    masks = 4 * torch.randn(1, 100, 1, 1) * torch.randn(1, 100, 8, 8)
    out = Mock(class_queries_logits=4 * torch.randn(1, 100, 81), masks_queries_logits=masks)
    objects = E.find_objects(out, ((30, 20), (384, 384)), 0.2)
    out.masks_queries_logits = torch.nn.functional.interpolate(masks, (30, 20), mode="bilinear")
    processor, expected = T.Mask2FormerImageProcessorPil(), {}
    (theirs, ) = processor.post_process_instance_segmentation(out, 0.2, return_binary_maps=True)
    for x in sorted(theirs["segments_info"], key=lambda x: -x["score"]):
        expected.setdefault(E.NOUNS[x["label_id"]], []).append(theirs["segmentation"][x["id"]].numpy())
    assert list(objects) == list(expected) and len(objects) > 10
    assert all(np.array_equal(objects[noun], expected[noun]) for noun in expected)

def test_geneval_end_to_end(tiny, detector, score):
    (model, processor), clip, lines, right = detector, E.Embedder(str(tiny / "clip")), [], {}
    for i, name in enumerate(OF):
        image, tag, wrong = Image.open(f"images/{name}"), E.TASKS[i // 2 % 5], i % 2 or i > 9
        pixels = processor(image, return_tensors="pt").pixel_values
        sizes, threshold = (pixels.shape[2:], image.size[::-1]), 0.9 if tag == "counting" else 0.3
        objects = E.find_objects(model(pixels), sizes, threshold)
        noun, found = max(objects.items(), key=lambda item: len(item[1]))
        best = {"class": noun, "count": 1, "color": E.name_colors(clip, image, noun, found[:1])[0]}
        include = best, {"class": noun, "count": len(found) + wrong}
        lines.append(json.dumps({"tag": tag, "include": include, "text": tag, "case_number": name[:5]}))
        right[name] = {"tag": tag, "correct": not wrong}
    Path("specs.jsonl").write_text("\n".join(lines))
    report, out = score("geneval")
    assert report["images"] == right and "counting 50 31.56 30 colors 50 74.73" in out
    rates = dict.fromkeys(E.TASKS, 50) | {"single_object": 25, "color_attr": None, "overall": 45}
    assert report["table"]["GenEval"] == rates

WRONG = "position:colour cup:doge dog:doge red:gray above:beside tag:label 0]:1] count:n 1,:0,".split()
SHAPES = torch.full((2, 16), torch.nan), torch.ones(2, 15), torch.ones(3, 16)
REFUSED = [  # metric, what the line names, the flag, file or model that is changed, to what or how
    *[("nudenet", "--threshold", "threshold", x) for x in ("nan", 1.01, -0.01)],
    *[(metric, "--prompts", "prompts", "") for metric in ("q16", "geneval", "clip")],
    *[(metric, "a_100_0.png", "images/a_100_0.png", "") for metric in ("nudenet", "geneval", "clip")],
    *[(metric, "--prompts", "i2p.csv", "text,case_number\nx,7") for metric in ("nudenet", "clip")],
    ("q16", "--prompts", "i2p.csv", "text,case_number\nx,a_100"),  # without categories
    *[("geneval", "--prompts", "specs.jsonl", SPEC.replace(*x.split(":"), 1)) for x in WRONG],
    *[("q16", "--q16-prompts", "prompts.p", x) for x in (*SHAPES, BOMB)],
    ("clip", "--clip", "clip", "extra"),
    ("geneval", "--detector", "detector", "missing")
]

@pytest.mark.parametrize("metric, word, name, x", REFUSED)
def test_bad_input_is_told(metric, word, name, x, tmp_path, tiny, detector, score, capsys):
    file, flags = tmp_path / name, {}
    if name in ("clip", "detector"):
        flags[name] = shutil.copytree(tiny / name, file)
        change(file, DAMAGE[x])
    elif "." not in name:
        flags[name] = x
    elif torch.is_tensor(x):
        torch.save(x, file)
    else:
        file.write_bytes(x.encode() or file.read_bytes()[:999])
    with telling(capsys, word):
        score(metric, **flags)
