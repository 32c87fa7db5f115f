"""Rendered text that is always there: words in real fonts over real photographs, straight, bent and seen at an angle.

    word_image(7, "train", height=32, width=100)     one word cut out, and what it says: for recognition
    text_scene(7, "test", size=160)                  several words in a picture, with their outlines: for detection

Fonts are those inside the installed packages (Pillow's Aileron; DejaVu, STIX and Computer Modern of Matplotlib), words those of
the Python documentation (`data/embedded_text.py`), backgrounds crops of the photographs in `data/scenes.py`. Nothing is downloaded.
A picture is a pure function of (seed, split, index, its options). The splits share nothing: other words, other strings, other
faces, other columns of the photographs. Geometry and colours do not depend on the height, so the same index at two heights is
the same word at two resolutions.

Outlines run clockwise as one sees them (y points down) from the upper left corner of the reading direction: along the upper
side, back along the lower side. Coordinates are pixels; the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.random import RandomState
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from paperzoo.data.embedded_text import is_test, library
from paperzoo.data.scenes import photographs

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Every character that occurs in a text, besides the space between the words of a line."""

UNREADABLE = "###"
"""What an illegible text says, as in ICDAR's annotations."""

TRAIN_FACES = (
    *("DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique".split()),
    *("DejaVuSansMono DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique".split()),
    *("DejaVuSerif DejaVuSerif-Bold DejaVuSerif-BoldItalic".split()),
    *("STIXGeneral STIXGeneralItalic STIXGeneralBolIta cmb10 cmr10 cmti10 cmtt10".split()),
)
TEST_FACES = ("Aileron", "DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10")
"""Two families, Aileron and Computer Modern Sans, occur in no training picture at all; of the others it is the cut that is new."""

_TRAIN_COLUMNS = 0.7  # of each photograph, as in data/scenes.py
_HELD_OUT = 5  # one word in five is for testing


@dataclass(frozen=True)
class Style:
    """How varied the pictures are. Angles in radians, lengths as parts of the text's height unless said otherwise."""

    case: Literal["mixed", "lower", "upper"] = "mixed"
    strings: float = 0.2  # share of random digits and letters among the words
    longest: int = 14  # characters of a word
    lines: float = 0.0  # share of texts that are two words with a space
    curved: float = 0.4  # share of bent texts; half of them on an arc, half on a wave
    bend: float = 2.2  # largest angle that an arc covers
    tilt: float = 0.12  # largest rotation
    perspective: float = 0.25  # largest relative change of size across a text
    shear: float = 0.15
    margin: float = 0.08  # outlines stay this far from the ink
    blur: float = 0.05  # largest standard deviation, as a part of the height
    noise: float = 0.04  # largest standard deviation, of a range of 0 to 1
    contrast: float = 0.35  # least difference of brightness between ink and background


SCENE = Style(tilt=0.4, perspective=0.3)


# -- fonts and words -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Face:
    """One cut of one font."""

    name: str

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The face at an em of `size` pixels."""
        return _face(self.name, size)


@lru_cache(maxsize=512)
def _face(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == "Aileron":
        return ImageFont.load_default(size)
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def fonts(split: str | None = None) -> list[Face]:
    """The faces of a split, "train" or "test"; both without one. All have the Latin letters and digits."""
    names = {"train": TRAIN_FACES, "test": TEST_FACES, None: TRAIN_FACES + TEST_FACES}
    return [Face(name) for name in names[split]]


@cache
def words(split: str) -> tuple[str, ...]:
    """English words of 2 to 14 small letters, sorted: those that occur in three docstrings of Python's library or more.

    A word is in one split only, whatever the version of Python.
    """
    counts: Counter[str] = Counter()
    for _, _, texts in library():
        for text in texts:
            counts.update(
                {w.lower() for w in re.findall(r"(?:(?<=\s)|^)[A-Za-z][a-z]{1,13}(?=[,;:.!?]?(?:\s|$))", text)}
            )
    return tuple(sorted(w for w, n in counts.items() if n >= 3 and is_test(w, _HELD_OUT) == (split != "train")))


def random_string(rng: RandomState, split: str, longest: int = 8) -> str:
    """1 to `longest` digits, capitals, small letters or a mixture of digits and capitals; other strings in each split."""
    letters = [ALPHABET[:10], ALPHABET[:10], ALPHABET[36:], ALPHABET[10:36], ALPHABET[:10] + ALPHABET[36:]][
        rng.randint(5)
    ]
    while True:
        text = "".join(letters[k] for k in rng.randint(len(letters), size=rng.randint(1, min(longest, 8) + 1)))
        if is_test(text.lower(), _HELD_OUT) == (split != "train"):
            return text


def random_text(rng: RandomState, split: str, style: Style) -> str:
    """One text: a word as it is, with a capital, or all in capitals; or a random string; or two of them."""
    if rng.random_sample() < style.lines:
        return " ".join(_word(rng, split, style) for _ in range(2))
    return _word(rng, split, style)


def _word(rng: RandomState, split: str, style: Style) -> str:
    if rng.random_sample() < style.strings:
        text = random_string(rng, split, style.longest)
    else:
        vocabulary = words(split)
        text = vocabulary[rng.randint(len(vocabulary))]
        while len(text) > style.longest:
            text = vocabulary[rng.randint(len(vocabulary))]
        text = (text, text.capitalize(), text.upper())[rng.randint(3)]
    return {"mixed": text, "lower": text.lower(), "upper": text.upper()}[style.case]


# -- ink -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def render_word(text: str, face: Face, height: int) -> tuple[np.ndarray, np.ndarray]:
    """A text drawn on a line and cut to its ink. Do not modify the arrays.

    Args:
        height: the em of the font in pixels; capitals are about 0.7 of it high.

    Returns:
        ink float32 (h, w) in [0, 1], and for each character its box float32 (len(text), 4), x1 y1 x2 y2 in pixels of
        the ink; a space has a box without height.
    """
    font = face.at(height)
    left, top, right, bottom = font.getbbox(text)
    sheet = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(sheet).text((2 - left, 2 - top), text, fill=255, font=font)
    ink = np.asarray(sheet, dtype=np.float32) / 255
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    x0, y0 = columns[0], rows[0]
    ink = np.ascontiguousarray(ink[y0 : rows[-1] + 1, x0 : columns[-1] + 1])
    boxes = np.zeros((len(text), 4), dtype=np.float32)
    for i, character in enumerate(text):
        # with kerning: where the text so far ends, less the character's own advance
        start = font.getlength(text[: i + 1]) - font.getlength(character)
        l, t, r, b = font.getbbox(character)  # noqa: E741
        boxes[i] = (start + l, t, start + r, b if character != " " else t)
    boxes += np.array([2 - left - x0, 2 - top - y0] * 2, dtype=np.float32)
    return ink, boxes.clip(0, np.array([ink.shape[1], ink.shape[0]] * 2, dtype=np.float32))


# -- bending and perspective -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warp:
    """A map from the plane of the ink to that of a picture, and back: a bend of the middle line, then a homography.

    Args:
        width, height: of the ink.
        kind: "straight"; "arc": the middle line becomes an arc of the angle `amount`, middle upwards if positive;
            "wave": it becomes a sine of amplitude `amount` (pixels), `turns` periods along the text, starting at `phase`.
        matrix: the homography, 3 x 3, row by row, from coordinates around the middle of the ink to the picture.
    """

    width: float
    height: float
    kind: str = "straight"
    amount: float = 0.0
    phase: float = 0.0
    turns: float = 1.0
    matrix: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Points of the ink (…, 2), x and y, to points of the picture."""
        x, y = points[..., 0] - self.width / 2, points[..., 1] - self.height / 2
        if self.kind == "arc":
            radius = self.width / self.amount
            x, y = (radius - y) * np.sin(x / radius), radius - (radius - y) * np.cos(x / radius)
        elif self.kind == "wave":
            y = y + self._wave(x)
        return transformed(self._matrix, np.stack([x, y], -1))

    def back(self, points: np.ndarray) -> np.ndarray:
        """Points of the picture (…, 2) to points of the ink."""
        x, y = np.moveaxis(transformed(np.linalg.inv(self._matrix), points), -1, 0)
        if self.kind == "arc":
            radius = self.width / self.amount
            sign = math.copysign(1.0, radius)
            angle = np.arctan2(x * sign, (radius - y) * sign)
            x, y = angle * radius, radius - sign * np.hypot(x, radius - y)
        elif self.kind == "wave":
            y = y - self._wave(x)
        return np.stack([x + self.width / 2, y + self.height / 2], -1)

    def then(self, matrix: np.ndarray) -> Warp:
        """This map, followed by another homography."""
        both = tuple((matrix @ self._matrix).ravel().tolist())
        return Warp(self.width, self.height, self.kind, self.amount, self.phase, self.turns, both)

    def outline(self, margin: float = 0.0, per_side: int | None = None) -> np.ndarray:
        """The text's outline in the picture, float64 (2 per_side, 2); `margin` in pixels of the ink is left around it.

        Four points where the text is straight, 14 where it is bent, as CTW1500 has it, unless `per_side` says otherwise.
        """
        count = per_side or (2 if self.kind == "straight" else 7)
        x = np.linspace(-margin, self.width + margin, count)
        above, below = (
            np.stack([x, np.full(count, -margin)], -1),
            np.stack([x, np.full(count, self.height + margin)], -1),
        )
        return self(np.concatenate([above, below[::-1]]))

    @property
    def _matrix(self) -> np.ndarray:
        return np.array(self.matrix).reshape(3, 3)

    def _wave(self, x: np.ndarray) -> np.ndarray:
        return self.amount * np.sin(2 * math.pi * self.turns * x / self.width + self.phase)


def transformed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (…, 2) through a homography (3, 3)."""
    out = points @ matrix[:, :2].T + matrix[:, 2]
    return out[..., :2] / out[..., 2:]


def random_warp(rng: RandomState, width: float, height: float, style: Style) -> Warp:
    """A bend, shear, perspective and rotation for an ink of this size; the middle of the ink goes to (0, 0), scale 1."""
    curved, which, strength, side, phase, turns = rng.random_sample(6)
    kind, amount = "straight", 0.0
    if curved < style.curved and width > 2 * height:
        kind = "arc" if which < 0.5 else "wave"
        if kind == "arc":  # the inner side keeps at least a third of the length of the middle
            amount = (0.3 + 0.7 * strength) * min(style.bend, 1.3 * width / height)
        else:
            amount = (0.3 + 0.7 * strength) * min(0.5 * height, 0.08 * width)
        amount = math.copysign(amount, side - 0.5)
    angle, shear, across, down = rng.uniform(-1, 1, 4)
    angle, shear = angle * style.tilt, shear * style.shear
    across, down = across * style.perspective / width, down * style.perspective / (2 * height)
    if kind == "arc":  # as tall as wide: half of it is enough
        across, down = across / 2, down / 4
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    tilt = np.array([[1, shear, 0], [0, 1, 0], [across, down, 1]])
    return Warp(width, height, kind, amount, 2 * math.pi * phase, 0.5 + turns).then(turn @ tilt)


def sample_ink(ink: np.ndarray, warp: Warp, window: tuple[int, int, int, int]) -> np.ndarray:
    """The warped ink at the pixels of a window x1 y1 x2 y2 of the picture: float32 (y2 - y1, x2 - x1) in [0, 1]."""
    from scipy.ndimage import map_coordinates

    x1, y1, x2, y2 = window
    at = warp.back(np.stack(np.meshgrid(np.arange(x1, x2) + 0.5, np.arange(y1, y2) + 0.5), -1))
    # where pixels of the picture are larger than those of the ink, the ink is averaged before it is sampled
    height, width = ink.shape
    middle = np.stack([np.linspace(0, width, 5), np.full(5, height / 2)], -1)
    grown = [np.hypot(*(warp(middle + d) - warp(middle - d)).T).mean() for d in ((0.5, 0.0), (0.0, 0.5))]
    smaller = tuple(max(1, round(n * min(1.0, g))) for n, g in zip((width, height), grown, strict=True))
    if smaller != (width, height):
        ink = np.asarray(Image.fromarray(ink).resize(smaller, Image.Resampling.BOX))
        at = at * (smaller[0] / width, smaller[1] / height)
    return map_coordinates(ink, [at[..., 1] - 0.5, at[..., 0] - 0.5], order=1, mode="constant", output=np.float32)


# -- pictures ----------------------------------------------------------------------------------------------------------


@cache
def _pictures(split: str) -> tuple[Image.Image, ...]:
    parts = []
    for photograph in photographs():
        border = int(photograph.shape[2] * _TRAIN_COLUMNS)
        part = photograph[:, :, :border] if split == "train" else photograph[:, :, border:]
        parts.append(Image.fromarray(np.ascontiguousarray(part.permute(1, 2, 0).numpy())))
    return tuple(parts)


def background(rng: RandomState, split: str, height: int, width: int) -> np.ndarray:
    """A random crop of a photograph, scaled: float32 (height, width, 3) in [0, 1]."""
    pictures = _pictures(split)
    picture = pictures[rng.randint(len(pictures))]
    extent, x, y, flip, gain = rng.random_sample(5)
    most = min(picture.width / width, picture.height / height)
    scale = most * (0.35 + 0.65 * extent)
    w, h = width * scale, height * scale
    left, upper = x * (picture.width - w), y * (picture.height - h)
    crop = picture.resize((width, height), Image.Resampling.BILINEAR, box=(left, upper, left + w, upper + h))
    pixels = np.asarray(crop, dtype=np.float32) / 255
    return (pixels[:, ::-1] if flip < 0.5 else pixels) * np.float32(0.6 + 0.4 * gain)


def random_colour(rng: RandomState, under: float, contrast: float) -> np.ndarray:
    """A colour (3,) whose brightness differs from `under` by `contrast` at least."""
    colour, further = rng.random_sample(3), rng.random_sample()
    lighter = under + contrast <= 1 and (under < 0.5 or under - contrast < 0)
    wanted = under + contrast + further * (1 - under - contrast) if lighter else (under - contrast) * (1 - further)
    wanted = min(1.0, max(0.0, wanted))
    # towards black or white until the mean is the wanted one: the hue stays, no channel is cut off
    mean = colour.mean()
    return colour * (wanted / mean) if wanted < mean else 1 - (1 - colour) * ((1 - wanted) / max(1e-6, 1 - mean))


def paint(
    canvas: np.ndarray,
    alpha: np.ndarray,
    corner: tuple[int, int],
    height: float,
    blur: float,
    contrast: float,
    rng: RandomState,
) -> None:
    """Paint text in a random colour over a part of the canvas (H, W, 3), in place.

    Where the background changes so much that no one colour could be read all along, it is evened out around the letters,
    like the glow or the plate that signs have.

    Args:
        alpha: the ink (h, w) in [0, 1]; its upper left pixel lies at `corner`, x and y.
        height: of the text, in pixels.
        blur: standard deviation, as a part of the height.
    """
    from scipy.ndimage import gaussian_filter

    x, y = corner
    part = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    weight = alpha / alpha.sum()
    grey = part.mean(2)
    under = float((grey * weight).sum())
    deviation = math.sqrt(float((weight * (grey - under) ** 2).sum()))
    calm = max(0.0, 1 - 0.3 * contrast / max(deviation, 1e-6))
    colour, opacity = random_colour(rng, under, contrast), 0.85 + 0.15 * rng.random_sample()
    if calm > 0:
        halo = gaussian_filter(alpha, max(1.0, 0.12 * height))
        mean = (part * weight[..., None]).sum((0, 1))
        part += np.float32(calm) * (halo / halo.max()).clip(0, 0.5)[..., None] * 2 * (mean - part)
    alpha = gaussian_filter(alpha, blur * height) * np.float32(opacity)
    part += alpha[..., None] * (colour.astype(np.float32) - part)


def _finished(canvas: np.ndarray, noise: float, rng: RandomState) -> Tensor:
    canvas = canvas + np.float32(noise) * rng.standard_normal(canvas.shape).astype(np.float32)
    return torch.from_numpy((canvas.clip(0, 1) * 255).round().astype(np.uint8)).permute(2, 0, 1).contiguous()


def _generator(kind: str, seed: int, split: str, index: int) -> RandomState:
    if split not in ("train", "test"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'test'")
    return RandomState(zlib.crc32(f"{kind}/{seed}/{split}/{index}".encode()))


def word_sample(
    index: int,
    split: str = "train",
    height: int = 32,
    width: int | None = None,
    seed: int = 0,
    style: Style | None = None,
) -> dict:
    """One word, cut out as recognisers get it: the upright box around its outline, loosely, scaled to the size.

    Args:
        width: None keeps the shape of the cut; else it is squeezed or stretched.

    Returns:
        image uint8 (3, height, width), text, polygon float32 (N, 2): its outline, characters float32 (len(text), 4, 2): a
        quadrangle for each character, clockwise from its upper left corner. Pixels of the image.
    """
    style = style or Style()
    rng = _generator("word", seed, split, index)
    text, face = random_text(rng, split, style), fonts(split)[rng.randint(len(fonts(split)))]
    ink, boxes = render_word(text, face, max(16, 3 * height))
    warp = random_warp(rng, ink.shape[1], ink.shape[0], style)
    outline = warp.outline(style.margin * ink.shape[0])
    low, high = outline.min(0), outline.max(0)
    loose = rng.uniform(0, 0.08, 4) * (high - low)[1]
    low, high = low - loose[:2], high + loose[2:]
    size = high - low
    width = width or max(height // 2, round(height * size[0] / size[1]))
    factor = np.array([width, height]) / size
    fit = np.array([[factor[0], 0, -low[0] * factor[0]], [0, factor[1], -low[1] * factor[1]], [0, 0, 1]])
    warp, outline = warp.then(fit), (outline - low) * factor

    canvas = background(rng, split, height, width)
    blur, noise = rng.random_sample(2)
    alpha = sample_ink(ink, warp, (0, 0, width, height))
    tall = float(np.linalg.norm(outline[0] - outline[-1]))
    paint(canvas, alpha, (0, 0), tall, blur * style.blur, style.contrast, rng)
    corners = warp(boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]])
    return {
        "image": _finished(canvas, noise * style.noise, rng),
        "text": text,
        "polygon": torch.from_numpy(outline.astype(np.float32)),
        "characters": torch.from_numpy(corners.astype(np.float32)),
    }


def word_image(
    index: int,
    split: str = "train",
    height: int = 32,
    width: int | None = None,
    seed: int = 0,
    style: Style | None = None,
) -> tuple[Tensor, str]:
    """One word: (uint8 (3, height, width), what it says). See `word_sample`."""
    sample = word_sample(index, split, height, width, seed, style)
    return sample["image"], sample["text"]


@lru_cache(maxsize=8)
def word_set(
    count: int, split: str = "train", height: int = 32, width: int = 100, seed: int = 0, style: Style | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """The first `count` words: uint8 (count, 3, height, width) and their texts; kept in memory, so treat them as read-only."""
    pairs = [word_image(i, split, height, width, seed, style) for i in range(count)]
    return torch.stack([image for image, _ in pairs]), tuple(text for _, text in pairs)


def text_scene(
    index: int,
    split: str = "train",
    size: int = 160,
    seed: int = 0,
    most: int = 4,
    scale: tuple[float, float] = (0.1, 0.22),
    unreadable: float = 0.06,
    style: Style = SCENE,
) -> dict:
    """A picture with 1 to `most` texts that do not touch; where there is no free place left, fewer.

    Args:
        scale: smallest and largest em of the font as a part of `size`. Texts that are too long for the picture are smaller.
        unreadable: share of texts that are smeared until nobody can read them; they say "###" and are to be ignored.

    Returns:
        image uint8 (3, size, size), polygons list of float32 (N, 2), texts list of str, ignore bool (number of texts,),
        characters list of float32 (length of the text, 4, 2).
    """
    rng = _generator("scene", seed, split, index)
    canvas = background(rng, split, size, size)
    taken = Image.new("1", (size, size))
    scene: dict = {"polygons": [], "texts": [], "ignore": [], "characters": []}
    for _ in range(rng.randint(1, most + 1)):
        text, face = random_text(rng, split, style), fonts(split)[rng.randint(len(fonts(split)))]
        em = size * scale[0] * (scale[1] / scale[0]) ** rng.random_sample()
        smeared = rng.random_sample() < unreadable
        for _ in range(6):
            ink, boxes = render_word(text, face, max(8, round(em)))
            warp = random_warp(rng, ink.shape[1], ink.shape[0], style)
            margin = 1 + style.margin * ink.shape[0]
            outline = warp.outline(margin)
            low, high = outline.min(0), outline.max(0)
            room, place = size - 2 - (high - low), rng.random_sample(2)
            if (room <= 0).any():
                em *= 0.7
                continue
            shift = 1 + place * room - low
            outline = outline + shift
            mine = Image.new("1", (size, size))
            ImageDraw.Draw(mine).polygon([tuple(p) for p in warp.outline(margin + 0.15 * ink.shape[0]) + shift], fill=1)
            if (np.asarray(mine) & np.asarray(taken)).any():
                continue
            taken = Image.fromarray(np.asarray(mine) | np.asarray(taken))
            warp = warp.then(np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1]]))
            reach = 2 + round(0.8 * ink.shape[0])  # of blur and glow
            x1, y1 = np.maximum(0, np.floor(outline.min(0)).astype(int) - reach)
            x2, y2 = np.minimum(size, np.ceil(outline.max(0)).astype(int) + reach)
            blur = 0.3 if smeared else rng.random_sample() * style.blur
            alpha = sample_ink(ink, warp, (x1, y1, x2, y2))
            paint(canvas, alpha, (x1, y1), ink.shape[0], blur, style.contrast, rng)
            scene["polygons"].append(torch.from_numpy(outline.astype(np.float32)))
            scene["texts"].append(UNREADABLE if smeared else text)
            scene["ignore"].append(smeared)
            corners = warp(boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]])
            scene["characters"].append(torch.from_numpy(corners.astype(np.float32)))
            break
    scene["ignore"] = torch.tensor(scene["ignore"], dtype=torch.bool)
    return {"image": _finished(canvas, rng.random_sample() * style.noise, rng)} | scene


@lru_cache(maxsize=8)
def scene_set(
    count: int,
    split: str = "train",
    size: int = 160,
    seed: int = 0,
    most: int = 4,
    scale: tuple[float, float] = (0.1, 0.22),
    unreadable: float = 0.06,
    style: Style = SCENE,
) -> tuple[dict, ...]:
    """The first `count` scenes (see `text_scene`); kept in memory, so treat them as read-only."""
    return tuple(text_scene(i, split, size, seed, most, scale, unreadable, style) for i in range(count))
