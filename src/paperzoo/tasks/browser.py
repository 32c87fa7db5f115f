"""What the tasks' recipes share when they say how a web page runs their networks: see `Recipe.browser`.

A page hands a network plain pixels, float32 (1, 3, H, W) in [0, 1], or token ids; what follows (normalisation, softmax, the
choice among boxes) is part of the exported graph, so that a page repeats nothing of it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from paperzoo.data.text import SPECIAL, TextTokenizer

SHOWN = 10  # held-out samples on a page

ABOUT = {  # data -> what a network of it has learned from, and what it cannot do, in English and Chinese
    "digits": {
        "learned_from": {
            "en": "1,438 scans of handwritten digits, 8 × 8 pixels each",
            "zh": "1438 张 8×8 像素的手写数字扫描图",
        },
        "limits": {
            "en": "It knows the ten digits and nothing else: whatever you give it, it answers with a digit.",
            "zh": "它只认识十个数字：无论给它什么，它都会回答一个数字。",
        },
    },
    "digit_ink": {
        "learned_from": {
            "en": "1,024 small pictures of handwritten digits pasted on photographs",
            "zh": "1024 张把手写数字贴在照片上的小图",
        },
        "limits": {
            "en": "It knows digits and background alone. In other pictures it marks whatever looks like a stroke of a pen.",
            "zh": "它只会区分数字和背景。在别的图片里，它会把任何像笔画的东西标出来。",
        },
    },
    "digit_scenes": {
        "learned_from": {
            "en": "small pictures of handwritten digits pasted on photographs",
            "zh": "把手写数字贴在照片上的小图",
        },
        "limits": {
            "en": "It finds handwritten digits alone. It has never seen people, cars or anything else.",
            "zh": "它只会寻找手写数字，从未见过人、汽车或其他任何东西。",
        },
    },
    "python_docs": {
        "learned_from": {
            "en": "docstrings of Python's standard library",
            "zh": "Python 标准库的文档字符串",
        },
        "limits": {
            "en": "It has read English docstrings and nothing else, and it always picks one of the families it knows.",
            "zh": "它只读过英文的文档字符串，并且总会从它认识的类别中选一个。",
        },
    },
}


def about(data: str) -> dict[str, dict[str, str]]:
    """`learned_from` and `limits` of a network that learned from this data, each in English ("en") and Chinese ("zh")."""
    other = {
        "learned_from": {"en": f"the data set {data}", "zh": f"数据集 {data}"},
        "limits": {
            "en": "It is small and was trained in seconds; what it has not seen, it does not know.",
            "zh": "它很小，只训练了几秒；没见过的东西，它不认识。",
        },
    }
    return ABOUT.get(data, other)


def picture_url(image: Tensor) -> str:
    """A uint8 picture (3, H, W), or class ids (H, W), as a PNG data URL at its own size."""
    array = image.permute(1, 2, 0) if image.ndim == 3 else image
    file = io.BytesIO()
    Image.fromarray(array.to(torch.uint8).numpy()).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def hex_colours(colours: Tensor) -> list[str]:
    """uint8 (N, 3) as "#rrggbb"."""
    return ["#{:02x}{:02x}{:02x}".format(*row) for row in colours.tolist()]


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of 0 … count - 1, evenly spaced."""
    return list(range(0, count, max(1, count // wanted)))[:wanted]


def of_each_class(targets: Sequence[int], wanted: int) -> list[int]:
    """At most `wanted` rows, sorted by class: the first of each class, then the second of each, and so on."""
    seen: dict[int, int] = {}
    ranked = []
    for row, target in enumerate(targets):
        seen[target] = seen.get(target, -1) + 1
        ranked.append((seen[target], target, row))
    return [row for _, _, row in sorted(sorted(ranked)[:wanted], key=lambda entry: entry[1:])]


# -- parts of the exported graph ---------------------------------------------------------------------------------------


class Normalise(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1], less the mean, divided by the deviation."""

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(facts["mean"])[:, None, None])
        self.register_buffer("deviation", torch.tensor(facts["deviation"])[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.deviation


class Probabilities(nn.Module):
    """A network of any inputs whose logits (B, K) become probabilities."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs).softmax(1)


class BestClass(nn.Module):
    """Logits (B, K, H, W) -> class ids int32 (B, H, W) and their probabilities float32 (B, H, W)."""

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        confidence, mask = logits.softmax(1).max(1)
        return mask.to(torch.int32), confidence


class Objects(nn.Module):
    """Pixels (1, 3, size, size) in [0, 1] -> boxes (N, 4) in those pixels, scores (N,), labels int64 (N,), best first.

    Args:
        detector: as in `paperzoo.tasks.detection`.
        canvas: height and width that the normalised pixels are zero-padded to.
    """

    def __init__(self, detector: nn.Module, facts: dict[str, Any], size: int, canvas: int) -> None:
        super().__init__()
        self.normalise, self.detector, self.size, self.canvas = Normalise(facts), detector, size, canvas

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        margin = self.canvas - self.size
        images = F.pad(self.normalise(pixels), (0, margin, 0, margin))
        sizes, canvas = torch.tensor([[self.size, self.size]]), (self.canvas, self.canvas)
        found = self.detector.postprocess(self.detector(images), sizes, canvas)[0]
        return found["boxes"], found["scores"], found["labels"]


# -- tokenizers as tables ----------------------------------------------------------------------------------------------


def tokenizer_tables(tokenizer: TextTokenizer) -> dict[str, Any] | None:
    """A WordPiece tokenizer as `TextTokenizer.train` makes it: its tokens in the order of their ids, and its rules.

    None for a tokenizer with another model or other rules: a page does not know those.
    """
    stored = json.loads(tokenizer.to_json())
    model, steps = stored["model"], (stored["normalizer"] or {}).get("normalizers", [])
    names = [step["type"] for step in steps]
    if model["type"] != "WordPiece" or stored["pre_tokenizer"] != {"type": "BertPreTokenizer"}:
        return None
    if names not in (["NFKC"], ["NFKC", "Lowercase"]):
        return None
    return {
        "kind": "wordpiece",
        "tokens": sorted(model["vocab"], key=model["vocab"].get),
        "special": [token["content"] for token in stored["added_tokens"] if token["content"] in SPECIAL],
        "lowercase": "Lowercase" in names,
        "continuation": model["continuing_subword_prefix"],
        "longest_word": model["max_input_chars_per_word"],
        "unknown": tokenizer.unknown_id,
        "pad": tokenizer.pad_id,
        "start": tokenizer.start_id,
        "end": tokenizer.end_id,
    }
