"""Drawn faces: people who do not exist, with known landmarks and a known identity.

An identity is a number, and everything lasting about the person follows from it: shape of head and jaw, skin, hair and its
cut, eyes, brows, nose, mouth, ears, glasses, beard, freckles. What changes from picture to picture follows from a random
generator: how the head is turned, expression, gaze, light, colour cast, clothes, sharpness. The features lie on an
ellipsoid which is turned and projected, so that they shift and shorten as they do on a head.

Drawn by Pillow on a larger canvas and reduced, hence antialiased.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

LANDMARKS = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")
"""The five points, in the order of CelebA, MTCNN and RetinaFace; left is the left of the picture."""

_CANVAS = 128  # pixels of the canvas that is drawn on, at least; and at least twice the picture
_UNIT = 0.3  # half the height of a head, as a part of the picture's side
_SKIN = np.array([(250, 222, 200), (236, 190, 155), (205, 150, 110), (150, 100, 70), (92, 60, 45)], dtype=float)
_HAIR = ((25, 20, 18), (60, 40, 28), (95, 62, 38), (150, 105, 60), (205, 170, 105), (150, 70, 40), (175, 172, 168))
_IRIS = ((60, 40, 25), (95, 65, 35), (70, 105, 140), (80, 115, 80), (110, 115, 120))
_CUTS = ("bald", "short", "side parting", "fringe", "bob", "long", "curly", "bun", "receding")
_GLASSES = ("none", "none", "none", "round", "square")
_BEARDS = ("none", "none", "none", "moustache", "goatee", "full", "stubble")


class Identity(NamedTuple):
    """What stays the same in all pictures of a person. Lengths in half heights of the head, colours in 0 … 255."""

    width: float  # half the width of the head
    jaw: float  # exponent of the lower outline: about 1.8 is a pointed chin, 3 a square one
    skin: np.ndarray
    hair: np.ndarray
    cut: str
    volume: float  # how far the hair stands out
    hairline: float  # height of its lower border
    eye_gap: float  # half the distance of the eyes
    eye_height: float
    eye_size: float
    eye_slant: float
    iris: np.ndarray
    brow_height: float
    brow_thickness: float
    brow_tilt: float
    nose_length: float
    nose_width: float
    mouth_height: float
    mouth_width: float
    lips: float
    lip_colour: np.ndarray
    ears: float
    glasses: str
    frame: np.ndarray
    beard: str
    marks: np.ndarray  # (n, 3): places of freckles and moles, and their size


class DrawnFace(NamedTuple):
    """A picture of a face. The box goes from ear to ear and from the hairline to the chin, as annotators draw it."""

    image: Tensor  # uint8 (3, size, size)
    alpha: Tensor  # float32 (size, size), 1 where head, neck and shoulders cover what is behind them
    landmarks: Tensor  # float32 (5, 2), x and y in pixels, in the order of LANDMARKS
    box: Tensor  # float32 (4,), x1 y1 x2 y2 in pixels


@functools.lru_cache(maxsize=4096)
def identity_of(number: int) -> Identity:
    """The person with this number, 0 or more: a pure function of it."""
    if number < 0:
        raise ValueError(f"identity is {number}; it must be 0 or more")
    rng = np.random.default_rng([number, 0xFACE])
    between = rng.uniform
    tone = between(0, len(_SKIN) - 1.001)
    skin = _SKIN[int(tone)] + (tone % 1) * (_SKIN[int(tone) + 1] - _SKIN[int(tone)])
    skin = skin * (1 + rng.normal(0, 0.02, 3))
    dark = tone / (len(_SKIN) - 1)
    weights = np.array([3.0, 2, 2, 1.5, 1.5, 1, 1]) * np.array([1, 1, *[1 - 0.8 * dark] * 4, 1])
    hair = np.array(_HAIR[rng.choice(len(_HAIR), p=weights / weights.sum())]) * between(0.8, 1.2)
    cut = str(rng.choice(_CUTS))
    beard = str(rng.choice(_BEARDS)) if cut not in ("bob", "long", "bun") else "none"
    lips = np.array((190, 95, 90)) * (1 - 0.45 * dark) * (1 + rng.normal(0, 0.08, 3))
    marks = np.empty((0, 3))
    if rng.random() < 0.4:
        count = int(rng.choice([1, 2, 14]))
        sizes = between(0.012, 0.018, count) if count > 2 else between(0.03, 0.045, count)
        marks = np.stack([between(-0.5, 0.5, count), between(-0.05, 0.55, count), sizes], axis=1)
    return Identity(
        width=between(0.66, 0.86),
        jaw=between(1.75, 3.0),
        skin=skin,
        hair=hair,
        cut=cut,
        volume=between(0.07, 0.2),
        hairline=between(-0.72, -0.5),
        eye_gap=between(0.27, 0.38),
        eye_height=between(-0.16, 0.02),
        eye_size=between(0.1, 0.165),
        eye_slant=between(-0.2, 0.2),
        iris=np.array(_IRIS[int(rng.integers(2 if dark > 0.6 else len(_IRIS)))]) * between(0.85, 1.15),
        brow_height=between(0.17, 0.28),
        brow_thickness=between(0.025, 0.08),
        brow_tilt=between(-0.3, 0.3),
        nose_length=between(0.32, 0.5),
        nose_width=between(0.1, 0.19),
        mouth_height=between(0.54, 0.66),
        mouth_width=between(0.2, 0.34),
        lips=between(0.03, 0.085),
        lip_colour=lips,
        ears=between(0.14, 0.24),
        glasses=str(rng.choice(_GLASSES)),
        frame=np.array(((25, 25, 28), (90, 55, 30), (120, 30, 35), (60, 70, 110))[int(rng.integers(4))], dtype=float),
        beard=beard,
        marks=marks,
    )


def draw_face(identity: int, rng: torch.Generator | np.random.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A picture of the person with this number.

    Args:
        identity: 0 or more; who it is depends on nothing else.
        rng: pose, expression, light and clothes are drawn from it (one number, if it is torch's).
        size: height and width in pixels, at least 8; the head takes about 60% of the height.

    Returns:
        image uint8 (3, size, size); alpha float32 (size, size) in [0, 1], what the person covers; landmarks float32
        (5, 2), x and y in pixels, in the order of `LANDMARKS`.
    """
    drawn = draw(identity, rng, size)
    return drawn.image, drawn.alpha, drawn.landmarks


def draw(
    identity: int, rng: torch.Generator | np.random.Generator, size: int, turn: float = 1.0, blur: float = 1.0
) -> DrawnFace:
    """As `draw_face`, with the box.

    Args:
        turn: factor on how far heads turn: up to 38 degrees to a side, 14 up or down, 25 of tilt.
        blur: factor on how unsharp pictures are.
    """
    if size < 8:
        raise ValueError(f"size is {size}; it must be 8 or more")
    if isinstance(rng, torch.Generator):
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
    return _Picture(identity_of(identity), rng, size, turn).finish(blur)


class _Picture:
    """One picture while it is drawn. Coordinates of the head: x to the right, y down, the chin at y = 1, the skull's top at -1."""

    def __init__(self, who: Identity, rng: np.random.Generator, size: int, turn: float) -> None:
        self.who, self.rng, self.size = who, rng, size
        self.pixels = size * max(2, -(-_CANVAS // size))
        self.yaw = turn * math.radians(38) * rng.triangular(-1, 0, 1)
        self.pitch = turn * math.radians(14) * rng.triangular(-1, 0, 1)
        self.roll = turn * math.radians(25) * rng.triangular(-1, 0, 1)
        self.unit = _UNIT * rng.uniform(0.94, 1.06) * self.pixels
        self.centre = self.pixels * np.array([0.5, 0.5]) + self.pixels * rng.uniform(-0.03, 0.03, 2)
        self.smile, self.open = rng.uniform(-0.4, 1.0), max(0.0, rng.uniform(-0.6, 0.6))
        self.lids, self.gaze, self.raised = rng.uniform(0.55, 1.0), rng.uniform(-0.35, 0.35), rng.uniform(-0.3, 1.0)
        self.picture = Image.new("RGBA", (self.pixels, self.pixels), (0, 0, 0, 0))
        self.pen = ImageDraw.Draw(self.picture)
        for part in (self.clothes, self.back_hair, self.ears, self.head, self.beard, self.nose, self.mouth):
            part()
        for side in (-1, 1):
            self.eye(side)
        for part in (self.front_hair, self.brows, self.glasses):
            part()

    # -- geometry ------------------------------------------------------------------------------------------------

    def surface(self, points: Any, lift: float = 0.0) -> np.ndarray:
        """Points (n, 2) on the face, turned with the head: pixels (n, 2). `lift`: how far before the surface they are."""
        x, y = np.asarray(points, dtype=float).reshape(-1, 2).T
        depth = np.sqrt(np.clip(1 - (x / (self.who.width * 1.08)) ** 2 - (y / 1.25) ** 2, 0.0, 1.0))
        z = 0.72 * depth + lift
        turned_x = x * math.cos(self.yaw) + z * math.sin(self.yaw)
        turned_y = y * math.cos(self.pitch) + (z - 0.5) * math.sin(self.pitch)
        return self.flat(np.stack([turned_x, turned_y], axis=1))

    def flat(self, points: Any) -> np.ndarray:
        """Points (n, 2) of the outline, which only tilts: pixels (n, 2)."""
        x, y = np.asarray(points, dtype=float).reshape(-1, 2).T
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        return self.centre + self.unit * np.stack([cos * x - sin * y, sin * x + cos * y], axis=1)

    def outline(self, grow: float = 0.0, start: float = -1.0, stop: float = 1.0) -> np.ndarray:
        """The head's border between two heights, once around: round above, by the jaw's exponent below."""
        y = np.sin(np.linspace(math.asin(start), math.asin(stop), 24))
        power = np.where(y > 0, self.who.jaw, 2.0)
        x = (self.who.width + grow) * (1 - np.abs(y) ** power) ** (1 / power)
        y = y * (1 + grow)
        return np.concatenate([np.stack([x, y], 1), np.stack([-x, y], 1)[::-1]])

    def fill(self, points: np.ndarray, colour: Any, opacity: float = 1.0) -> None:
        rgba = (*(int(v) for v in np.clip(colour, 0, 255)), int(255 * opacity))
        corners = [tuple(p) for p in points]
        if opacity == 1.0:
            self.pen.polygon(corners, fill=rgba)
            return
        layer = Image.new("RGBA", self.picture.size, (0, 0, 0, 0))
        ImageDraw.Draw(layer).polygon(corners, fill=rgba)
        self.picture.alpha_composite(layer)

    def line(self, points: np.ndarray, colour: Any, width: float) -> None:
        rgba = (*(int(v) for v in np.clip(colour, 0, 255)), 255)
        self.pen.line([tuple(p) for p in points], fill=rgba, width=max(1, round(width * self.unit)), joint="curve")

    @staticmethod
    def ellipse(x: float, y: float, a: float, b: float, tilt: float = 0.0, n: int = 20) -> np.ndarray:
        t = np.linspace(0, 2 * math.pi, n, endpoint=False)
        u, v = a * np.cos(t), b * np.sin(t)
        return np.stack([x + u * math.cos(tilt) - v * math.sin(tilt), y + u * math.sin(tilt) + v * math.cos(tilt)], 1)

    # -- parts, from back to front -------------------------------------------------------------------------------

    def clothes(self) -> None:
        colour, w = self.rng.uniform(20, 230, 3), self.who.width
        base = self.centre + np.array([0.0, 1.0]) * self.unit  # shoulders do not tilt with the head
        shoulders = [(-0.3, -0.05), (0.3, -0.05), (w + 0.35, 0.4), (w + 0.5, 1.2), (-w - 0.5, 1.2), (-w - 0.35, 0.4)]
        self.fill(base + self.unit * np.array(shoulders), colour)
        neck = np.array(
            [(-0.42 * w - 0.05, -0.6), (0.42 * w + 0.05, -0.6), (0.48 * w, 0.28), (0, 0.42), (-0.48 * w, 0.28)]
        )
        self.fill(base + self.unit * neck, self.who.skin * 0.8)

    def back_hair(self) -> None:
        who, turned = self.who, -0.12 * math.sin(self.yaw)
        if who.cut != "bald":  # the skull behind the front hair
            cap = self.outline(who.volume * 0.9, -0.999, -0.2)
            self.fill(self.flat(cap + (-0.08 * math.sin(self.yaw), 0)), who.hair * 0.9)
        if who.cut == "curly":
            for t in np.linspace(math.pi * 0.9, math.pi * 2.1, 15):
                x, y = (who.width + 0.08) * math.cos(t) + turned, -0.25 + 0.85 * math.sin(t)
                self.fill(self.flat(self.ellipse(x, y, 0.18 + who.volume, 0.18 + who.volume, n=14)), who.hair * 0.85)
        elif who.cut in ("bob", "long"):
            low, w = (0.75 if who.cut == "bob" else 1.5), who.width + who.volume
            top = self.outline(who.volume, -0.999, 0.0)[:24]
            right = np.concatenate([top, [(w, 0.3), (w * 1.05, low), (0.25, low * 0.95)]])
            both = np.concatenate([right, right[::-1] * (-1, 1)]) + (turned, 0)
            self.fill(self.flat(both), who.hair * 0.75)
        elif who.cut == "bun":
            self.fill(self.flat(self.ellipse(turned * 2, -1.15 - who.volume, 0.3, 0.26)), who.hair * 0.85)

    def ears(self) -> None:
        who = self.who
        for side in (-1, 1):
            if side * self.yaw > 0.25:  # turned away
                continue
            x = side * (who.width + 0.02) - 0.25 * math.sin(self.yaw) * (side * self.yaw < 0)
            self.fill(
                self.flat(self.ellipse(x, who.eye_height + 0.16, who.ears * 0.5, who.ears, side * -0.15)),
                who.skin * 0.88,
            )
            self.fill(
                self.flat(self.ellipse(x, who.eye_height + 0.16, who.ears * 0.26, who.ears * 0.6)), who.skin * 0.72
            )

    def head(self) -> None:
        who = self.who
        self.fill(self.flat(self.outline()), who.skin)
        for side in (-1, 1):  # cheeks
            colour = who.skin * (1.0, 0.88, 0.87)
            self.fill(self.surface(self.ellipse(side * who.width * 0.52, 0.33, 0.17, 0.13)), colour, 0.55)
        for x, y, radius in who.marks:
            self.fill(self.surface(self.ellipse(x, y, radius, radius, n=10)), who.skin * 0.55)

    def beard(self) -> None:
        who, kind = self.who, self.who.beard
        if kind == "none":
            return
        mouth, opacity = who.mouth_height, 0.4 if kind == "stubble" else 1.0
        if kind in ("full", "stubble"):
            outer = self.outline(0.03 if kind == "full" else -0.01, 0.12, 0.999)[:24]
            inner = [(who.mouth_width * 0.8, mouth - 0.12), (who.width * 0.72, 0.35)]
            border = self.flat(np.concatenate([outer, outer[::-1] * (-1, 1)]))
            edge = self.surface(np.concatenate([np.array(inner[::-1]) * (-1, 1), inner]))
            self.fill(np.concatenate([border, edge]), who.hair * 0.9, opacity)
        if kind == "goatee":
            self.fill(self.surface(self.ellipse(0, mouth + 0.22, who.mouth_width * 0.7, 0.19)), who.hair * 0.9)
        if kind in ("moustache", "goatee", "full"):
            w, y = who.mouth_width * 1.05, mouth - 0.11
            self.fill(
                self.surface(
                    [(-w, y + 0.08), (-0.4 * w, y - 0.05), (0.4 * w, y - 0.05), (w, y + 0.08), (0, y + 0.05)], 0.03
                ),
                who.hair,
            )

    @property
    def nose_tip(self) -> float:
        return self.who.eye_height + self.who.nose_length

    def nose(self) -> None:
        who, tip = self.who, self.nose_tip
        side = -1 if self.yaw > 0 else 1
        ridge = [(side * 0.05, who.eye_height + 0.04), (side * who.nose_width, tip + 0.02), (0, tip)]
        self.fill(np.concatenate([self.surface(ridge[:2]), self.surface(ridge[2:], 0.16)]), who.skin * 0.86)
        self.fill(self.surface(self.ellipse(0, tip + 0.01, who.nose_width * 0.62, 0.065), 0.13), who.skin * 1.05)
        for nostril in (-1, 1):
            self.fill(
                self.surface(self.ellipse(nostril * who.nose_width * 0.55, tip + 0.06, 0.04, 0.022), 0.06),
                who.skin * 0.45,
            )

    def corners(self) -> np.ndarray:
        """The corners of the mouth on the face, (2, 2)."""
        wide = self.who.mouth_width * (1 + 0.18 * self.smile - 0.15 * self.open)
        y = self.who.mouth_height - 0.07 * self.smile
        return np.array([(-wide, y), (wide, y)])

    def mouth(self) -> None:
        who, (left, right) = self.who, self.corners()
        y, t = who.mouth_height + 0.03 * self.smile, np.linspace(-1, 1, 13)
        x, arch = t * right[0], 1 - t**2
        middle = left[1] + (y - left[1]) * arch
        gap = 0.22 * self.open * arch
        upper = middle - gap * 0.3 - who.lips * 0.8 * arch * (1 - 0.35 * np.exp(-((t / 0.15) ** 2)))
        lower = middle + gap + who.lips * 1.2 * arch
        rows = lambda a, b: np.concatenate([np.stack([x, a], 1), np.stack([x, b], 1)[::-1]])  # noqa: E731
        self.fill(self.surface(rows(upper, lower), 0.02), who.lip_colour)
        if self.open > 0.08:
            self.fill(self.surface(rows(middle - gap * 0.3, middle + gap), 0.02), (60, 22, 22))
            self.fill(self.surface(rows(middle - gap * 0.3, middle + gap * 0.15), 0.02), (235, 232, 225))
        else:
            self.line(self.surface(np.stack([x, middle], 1), 0.02), who.lip_colour * 0.5, 0.022)

    def eye_centre(self, side: int) -> tuple[float, float]:
        return side * self.who.eye_gap, self.who.eye_height

    def eye(self, side: int) -> None:
        who, (x, y) = self.who, self.eye_centre(side)
        high = who.eye_size * 0.55 * self.lids * (1 - 0.25 * max(0.0, self.smile))
        tilt = -side * who.eye_slant
        self.fill(
            self.surface(self.ellipse(x, y - 0.02, who.eye_size * 1.25, who.eye_size * 0.85, tilt)), who.skin * 0.9
        )
        self.fill(self.surface(self.ellipse(x, y, who.eye_size, high, tilt)), (243, 240, 236))
        radius = min(high * 1.05, who.eye_size * 0.5)
        look = x + self.gaze * who.eye_size * 0.6
        self.fill(self.surface(self.ellipse(look, y, radius, radius, n=16)), who.iris)
        self.fill(self.surface(self.ellipse(look, y, radius * 0.5, radius * 0.5, n=12)), (12, 10, 10))
        upper = self.ellipse(x, y, who.eye_size, high, tilt, n=32)[16:]
        self.line(self.surface(upper), who.skin * 0.32, 0.028)

    def brows(self) -> None:
        who = self.who
        colour = who.hair * 0.8 if who.cut != "bald" else who.skin * 0.4
        for side in (-1, 1):
            x, y = self.eye_centre(side)
            t = np.linspace(-1, 1, 9)
            line = y - who.brow_height - 0.05 * self.raised - 0.04 * (1 - t**2) + who.brow_tilt * 0.12 * t * -1
            along = x + side * t * who.eye_size * 1.35
            thick = who.brow_thickness * (0.9 - 0.4 * t) / 2
            ring = np.concatenate([np.stack([along, line - thick], 1), np.stack([along, line + thick], 1)[::-1]])
            self.fill(self.surface(ring), colour)

    def front_hair(self) -> None:
        who = self.who
        if who.cut == "bald":
            return
        edge = {"fringe": 0.18, "receding": -0.2}.get(who.cut, 0.0) + who.hairline
        stop = {"short": -0.15, "receding": 0.0, "bun": -0.3, "bob": 0.1, "long": 0.1}.get(who.cut, -0.1)
        cap = self.outline(who.volume, -0.999, stop)
        cap = cap + (-0.08 * math.sin(self.yaw), 0)
        t = np.linspace(-1, 1, 17)  # from the left temple to the right one
        drop = {
            "side parting": 0.3 * np.abs(t - 0.45) ** 1.2 - 0.1,
            "fringe": 0.03 * np.cos(t * 14),
            "receding": 0.25 * np.abs(t) ** 2 - 0.3 * np.exp(-(((np.abs(t) - 0.55) / 0.25) ** 2)),
            "curly": 0.06 * np.cos(t * 16) + 0.2 * t**4,
        }.get(who.cut, 0.25 * t**4)
        inner_y = np.clip(edge + drop, -0.97, stop)
        inner_x = t * who.width * np.sqrt(np.clip(1 - inner_y**2, 0.05, 1)) * 0.97
        border = self.surface(np.stack([inner_x, inner_y], 1))
        low = self.flat([(-who.width, stop), (who.width, stop)])
        border[0], border[-1] = low[0], low[1]
        right, left = cap[:24], cap[24:]  # top to bottom on the right, bottom to top on the left
        ring = np.concatenate([self.flat(left), self.flat(right), border[::-1]])
        self.fill(ring, who.hair)
        for i in range(6):  # strands
            a = t[2 + 2 * i]
            start, end = self.flat([(a * who.width * 0.5, -1 - who.volume * 0.6)]), border[2 + 2 * i][None]
            self.line(np.concatenate([start, 0.4 * start + 0.6 * end]), who.hair * 1.25 + 8, 0.015)

    def glasses(self) -> None:
        who = self.who
        if who.glasses == "none":
            return
        for side in (-1, 1):
            x, y = self.eye_centre(side)
            if who.glasses == "round":
                ring = self.ellipse(x, y, 0.24, 0.22, n=24)
            else:
                ring = np.array(
                    [(x - 0.25, y - 0.15), (x + 0.25, y - 0.15), (x + 0.22, y + 0.18), (x - 0.22, y + 0.18)]
                )
            ring = np.concatenate([ring, ring[:2]])
            self.line(self.surface(ring, 0.08), who.frame, 0.04)
        (xl, y), (xr, _) = self.eye_centre(-1), self.eye_centre(1)
        self.line(self.surface([(xl + 0.24, y - 0.03), (0, y - 0.06), (xr - 0.24, y - 0.03)], 0.1), who.frame, 0.04)

    # -- from the canvas to the picture --------------------------------------------------------------------------

    def finish(self, blur: float) -> DrawnFace:
        factor, rng = self.pixels // self.size, self.rng
        canvas = np.asarray(self.picture, dtype=np.float32)
        alpha = canvas[..., 3:] / 255
        premultiplied = canvas[..., :3] * alpha
        blocks: Callable[[np.ndarray], np.ndarray] = lambda a: a.reshape(  # noqa: E731
            self.size, factor, self.size, factor, -1
        ).mean((1, 3))
        alpha, colour = blocks(alpha), blocks(premultiplied)
        colour = colour / np.maximum(alpha, 1e-3)
        colour = self.lit(colour)
        sigma = blur * max(0.0, rng.uniform(-0.4, 0.012 * self.size + 0.35))
        if sigma > 0.15:
            soft = Image.fromarray(colour.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(sigma))
            colour = np.asarray(soft, dtype=np.float32)
        colour = colour + rng.normal(0, rng.uniform(1, 6), colour.shape)
        fade = np.clip((1 - (np.arange(self.size) + 0.5) / self.size) / 0.06, 0, 1)  # the cut through the shoulders
        mask = alpha[..., 0] * fade[:, None]
        points = np.concatenate(
            [
                self.surface([self.eye_centre(-1), self.eye_centre(1)]),
                self.surface([(0, self.nose_tip)], 0.16),
                self.surface(self.corners(), 0.02),
            ]
        )
        ring = self.flat(self.outline(0.0, -0.78, 1.0))
        box = np.concatenate([ring.min(0), ring.max(0)])
        return DrawnFace(
            torch.from_numpy(colour.round().clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous(),
            torch.from_numpy(mask.astype(np.float32)),
            torch.from_numpy((points / factor).astype(np.float32)),
            torch.from_numpy((box / factor).astype(np.float32)),
        )

    def lit(self, colour: np.ndarray) -> np.ndarray:
        """Light from one side, another exposure, a colour cast, another contrast: (size, size, 3)."""
        rng, n = self.rng, self.size
        angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.55)
        axis = (np.arange(n) + 0.5) / n * 2 - 1
        slope = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
        gain = rng.uniform(0.55, 1.15) * (1 + strength * slope)[..., None] * (1 + rng.normal(0, 0.06, 3))
        contrast = rng.uniform(0.75, 1.1)
        return 128 + (colour * gain - 128) * contrast


def sheet(identities: Sequence[int], pictures: int, size: int = 96, seed: int = 0) -> Image.Image:
    """A row of pictures for each of some people, to look at."""
    rng = np.random.default_rng(seed)
    canvas = Image.new("RGB", (pictures * size, len(identities) * size), "white")
    for row, identity in enumerate(identities):
        for column in range(pictures):
            face = draw(identity, rng, size)
            image = Image.fromarray(face.image.permute(1, 2, 0).numpy())
            mask = Image.fromarray((face.alpha.numpy() * 255).astype(np.uint8))
            canvas.paste(image, (column * size, row * size), mask)
    return canvas
