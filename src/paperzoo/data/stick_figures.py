"""Stick figures: a small world for human pose that is always there.

Articulated figures (a kinematic tree in three dimensions with plausible ranges of its joints, drawn from rounded, shaded,
anti-aliased limbs) stand over crops of the real photographs of `paperzoo.data.scenes`. Places and visibility of the joints are
exact, because they follow from what was drawn. Nothing is downloaded, everything follows from the seed.

The figures have CrowdPose's 14 joints: COCO's five points of the face would lie within three pixels of each other here, and the
ends of the head, which COCO lacks, give PCKh its head size. Left and right look alike but for what tells them apart in
photographs too: a face and a stripe on the chest are seen from the front only.

The two splits share nothing: no figure (each has lengths, angles and colours of its own) and no part of a photograph (the right
30% of each is for tests).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.data.scenes import photographs
from paperzoo.data.skeletons import CROWDPOSE

_CHUNK = 64  # scenes that are drawn together; a longer list starts with the same scenes as a shorter one
_TRAIN_COLUMNS = 0.7
_UNANNOTATED = 0.1  # so many of the further people in a scene have no keypoints, as in COCO

LEFT, RIGHT = 1.0, -1.0


class Draw:
    """Uniform numbers for n figures, from one generator."""

    def __init__(self, n: int, rng: torch.Generator) -> None:
        self.n, self.rng = n, rng

    def __call__(self, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(self.n, generator=self.rng)

    def degrees(self, low: float, high: float) -> Tensor:
        return self(low, high) * (math.pi / 180)


def unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=1, keepdim=True).clamp(min=1e-6)


def turned(direction: Tensor, towards: Tensor, angle: Tensor) -> Tensor:
    """Directions (n, 3) turned by angles (n,) towards others; what is parallel in those does not count."""
    across = unit(towards - (towards * direction).sum(1, keepdim=True) * direction)
    return angle.cos()[:, None] * direction + angle.sin()[:, None] * across


def articulate(n: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Random figures in units of their height; x is right, y down, z towards the viewer, the pelvis at 0.

    Returns:
        points by name, (n, 3) each: the 14 joints, and those that only the drawing needs;
        the direction that the chest faces (n, 3); and the build (n,), a factor on the limbs' thickness.
    """
    u = Draw(n, rng)
    behind = torch.rand(n, generator=rng) < 0.25  # a quarter of the people is seen from behind
    yaw = u.degrees(-50, 50) + behind * math.pi
    zero = torch.zeros(n)
    left = torch.stack([yaw.cos(), zero, -yaw.sin()], 1)
    front = torch.stack([yaw.sin(), zero, yaw.cos()], 1)
    up = torch.tensor([0.0, -1.0, 0.0]).expand(n, 3)
    spine = turned(turned(up, front, u.degrees(-8, 25)), left, u.degrees(-14, 14))
    bar = turned(left, spine, u.degrees(-10, 10))  # the line of the shoulders
    p = {"pelvis": torch.zeros(n, 3)}
    p["neck"] = p["pelvis"] + u(0.28, 0.33)[:, None] * spine
    skull = turned(turned(spine, front, u.degrees(-15, 25)), left, u.degrees(-18, 18))
    p["top_head"] = p["neck"] + u(0.18, 0.205)[:, None] * skull
    p["crown"], p["chin"] = p["top_head"] - 0.05 * skull, p["top_head"] - 0.085 * skull
    p["face"] = (p["crown"] + p["chin"]) / 2 + 0.026 * front + 0.004 * spine
    p["chest"] = p["neck"] - 0.02 * spine
    p["belly"] = p["pelvis"] + 0.06 * spine
    shoulder, hip = u(0.095, 0.12)[:, None], u(0.055, 0.07)[:, None]
    upper_arm, forearm, thigh, shin = (
        u(*r)[:, None] for r in ((0.15, 0.18), (0.13, 0.155), (0.23, 0.26), (0.22, 0.25))
    )
    for name, side in (("left", LEFT), ("right", RIGHT)):
        out = side * left
        p[f"{name}_shoulder"] = p["neck"] - 0.03 * spine + side * shoulder * bar
        arm = turned(turned(-spine, front, u.degrees(-35, 80)), out, u.degrees(4, 130))
        p[f"{name}_elbow"] = p[f"{name}_shoulder"] + upper_arm * arm
        bend = u(0.2, 1)[:, None] * front + u(-0.2, 1)[:, None] * spine - u(-0.3, 0.7)[:, None] * out
        arm = turned(arm, bend, u.degrees(0, 120))
        p[f"{name}_wrist"] = p[f"{name}_elbow"] + forearm * arm
        p[f"{name}_hand"] = p[f"{name}_wrist"] + 0.035 * arm
        p[f"{name}_hip"] = p["pelvis"] + side * hip * left
        leg = turned(turned(-up, front, u.degrees(-25, 55)), out, u.degrees(-4, 38))
        p[f"{name}_knee"] = p[f"{name}_hip"] + thigh * leg
        leg = turned(leg, -front, u(0, 1).square() * (95 * math.pi / 180))
        p[f"{name}_ankle"] = p[f"{name}_knee"] + shin * leg
        p[f"{name}_toe"] = p[f"{name}_ankle"] + 0.05 * unit(front + 0.4 * leg)
    return p, front, u(0.9, 1.25)


# A limb: the points at its ends, its radii there, what it is dressed in, a shift in depth towards where the chest faces
SHIRT, TROUSERS, SKIN, HAIR, SHOES, STRIPE, SLEEVES = range(7)
PARTS: list[tuple[str, str, float, float, int, float]] = [
    ("left_shoulder", "right_shoulder", 0.042, 0.042, SHIRT, 0.0),
    ("left_shoulder", "left_hip", 0.045, 0.05, SHIRT, 0.0),
    ("right_shoulder", "right_hip", 0.045, 0.05, SHIRT, 0.0),
    ("chest", "belly", 0.062, 0.055, SHIRT, 0.001),
    ("left_hip", "right_hip", 0.05, 0.05, TROUSERS, 0.002),
    ("neck", "chin", 0.028, 0.026, SKIN, 0.0),
    ("crown", "chin", 0.06, 0.05, HAIR, 0.0),
    ("face", "face", 0.047, 0.047, SKIN, 0.05),
    ("chest", "belly", 0.016, 0.016, STRIPE, 0.06),
]
for _side in ("left", "right"):
    PARTS += [
        (f"{_side}_shoulder", f"{_side}_elbow", 0.036, 0.029, SHIRT, 0.0),
        (f"{_side}_elbow", f"{_side}_wrist", 0.028, 0.021, SLEEVES, 0.0),
        (f"{_side}_wrist", f"{_side}_hand", 0.023, 0.02, SKIN, 0.0),
        (f"{_side}_hip", f"{_side}_knee", 0.05, 0.036, TROUSERS, 0.0),
        (f"{_side}_knee", f"{_side}_ankle", 0.036, 0.023, TROUSERS, 0.0),
        (f"{_side}_ankle", f"{_side}_toe", 0.026, 0.02, SHOES, 0.0),
    ]
TORSO, SKULL, LIMBS = slice(0, 5), 6, slice(9, None)
_NEAR = {  # parts of the torso and the head that a joint may be seen on, besides those that end in it
    "neck": (0, 3, 5, 8),
    "top_head": (6, 7),
    "left_shoulder": (0, 1, 2, 3),
    "right_shoulder": (0, 1, 2, 3),
    "left_hip": (1, 2, 3, 4),
    "right_hip": (1, 2, 3, 4),
}


@functools.cache
def _touching() -> Tensor:
    """bool (joints, parts): whether a joint lies on a part, so that it is visible where that part is."""
    table = torch.zeros(len(CROWDPOSE), len(PARTS), dtype=torch.bool)
    for k, name in enumerate(CROWDPOSE.names):
        for c, (a, b, *_) in enumerate(PARTS):
            table[k, c] = name in (a, b) or c in _NEAR.get(name, ())
    return table


class Figures:
    """n random figures, scaled and placed in pixels.

    Args:
        side: (n,) the longer side of each figure's box, in pixels.
        centre: (n, 2) the middle of the box, x and y.
    """

    def __init__(self, side: Tensor, centre: Tensor, rng: torch.Generator) -> None:
        n = len(side)
        points, front, build = articulate(n, rng)
        stack = lambda end: torch.stack([points[part[end]] for part in PARTS], 1)  # noqa: E731
        self.a, self.b = stack(0), stack(1)  # (n, parts, 3)
        self.ra, self.rb = (torch.tensor([part[k] for part in PARTS]) * build[:, None] for k in (2, 3))
        joints = torch.stack([points[name] for name in CROWDPOSE.names], 1)  # (n, K, 3)
        roll = Draw(n, rng).degrees(-18, 18)
        turn = torch.stack([torch.stack([roll.cos(), -roll.sin()], 1), torch.stack([roll.sin(), roll.cos()], 1)], 1)
        flat = lambda x: x[..., :2] @ turn.transpose(1, 2)  # noqa: E731
        depth = (self.a[..., 2] + self.b[..., 2]) / 2 + torch.tensor([part[5] for part in PARTS]) * front[:, 2:]
        depth[:, TORSO] += depth[:, TORSO].mean(1, keepdim=True) - (self.a + self.b)[:, TORSO, 2] / 2
        depth[:, LIMBS] += 0.02  # a limb as deep as the torso lies on it
        self.order = depth.argsort(1)  # far parts first
        self.a, self.b, self.joints = flat(self.a), flat(self.b), flat(joints)
        low = torch.minimum((self.a - self.ra[..., None]).amin(1), (self.b - self.rb[..., None]).amin(1))
        high = torch.maximum((self.a + self.ra[..., None]).amax(1), (self.b + self.rb[..., None]).amax(1))
        scale = side / (high - low).amax(1)
        place = lambda x: (x - (low + high)[:, None] / 2) * scale[:, None, None] + centre[:, None]  # noqa: E731
        self.a, self.b, self.joints = place(self.a), place(self.b), place(self.joints)
        self.ra, self.rb = self.ra * scale[:, None], self.rb * scale[:, None]
        self.colours = clothes(n, rng)
        ends = torch.stack([self.a[:, SKULL], self.b[:, SKULL]])  # (2, n, 2)
        reach = torch.stack([self.ra[:, SKULL], self.rb[:, SKULL]])[..., None]
        corner = (ends - reach).amin(0), (ends + reach).amax(0)
        self.head_size = 0.6 * (corner[1] - corner[0]).norm(dim=1)  # as MPII: 0.6 of its box's diagonal


def clothes(n: int, rng: torch.Generator) -> Tensor:
    """Colours (n, parts, 3) in [0, 1]; shirt and stripe contrast."""
    colour = torch.rand(n, 7, 3, generator=rng)
    tone = torch.rand(n, 1, generator=rng)
    colour[:, SKIN] = (1 - tone) * torch.tensor([0.95, 0.78, 0.66]) + tone * torch.tensor([0.62, 0.43, 0.32])
    colour[:, HAIR] = 0.05 + 0.25 * torch.rand(n, 1, generator=rng) * torch.tensor([1.0, 0.7, 0.45])
    colour[:, SHOES] *= 0.5
    dark = colour[:, SHIRT].mean(1, keepdim=True) < 0.5
    colour[:, STRIPE] = torch.where(dark, 0.75 + 0.25 * colour[:, STRIPE], 0.25 * colour[:, STRIPE])
    bare = torch.rand(n, 1, generator=rng) < 0.5
    colour[:, SLEEVES] = torch.where(bare, colour[:, SKIN], colour[:, SHIRT])
    return colour[:, torch.tensor([part[4] for part in PARTS])]


def paint(images: Tensor, owner: Tensor, figures: Figures, number: int) -> Tensor:
    """Draw figures over images, in place.

    Args:
        images: (n, 3, S, S) in [0, 1].
        owner: int64 (n, S, S): for each pixel the part in front, `number * 32 + part`, or -1.

    Returns:
        bool (n, S, S): each figure's own pixels, before others hide them.
    """
    n, _, size, _ = images.shape
    pixels, owners = images.view(n, 3, -1), owner.view(n, -1)
    silhouette = torch.zeros(n, size * size, dtype=torch.bool)
    rows = torch.arange(n)
    for step in range(len(PARTS)):
        part = figures.order[:, step]
        a, b, ra, rb = (t[rows, part] for t in (figures.a, figures.b, figures.ra, figures.rb))
        reach = torch.maximum(ra, rb)[:, None] + 1.5
        low = (torch.minimum(a, b) - reach).floor()
        extent = (
            ((torch.maximum(a, b) + reach).ceil() - low).amax(0).long().clamp(max=size)
        )  # one window for all: its largest
        corner = low.long().clamp(min=0).minimum(size - extent)
        x = (corner[:, :1] + torch.arange(int(extent[0])))[:, None, :]  # (n, 1, w)
        y = (corner[:, 1:] + torch.arange(int(extent[1])))[:, :, None]  # (n, h, 1)
        along, dx, dy = b - a, x - a[:, 0, None, None], y - a[:, 1, None, None]
        square = along.square().sum(1).clamp(min=1e-6)[:, None, None]
        t = ((dx * along[:, 0, None, None] + dy * along[:, 1, None, None]) / square).clamp(0, 1)
        dx, dy = dx - t * along[:, 0, None, None], dy - t * along[:, 1, None, None]
        radius = ra[:, None, None] + t * (rb - ra)[:, None, None]
        distance = (dx.square() + dy.square()).sqrt()
        alpha = (radius - distance + 0.5).clamp(0, 1).flatten(1)  # an edge of one pixel
        # lit from the upper left, darker towards the rim
        light = 0.95 - 0.16 * (dx + dy) / radius - 0.22 * (distance / radius).square()
        colour = (figures.colours[rows, part][..., None] * light.flatten(1)[:, None]).clamp(0, 1)
        at = (y * size + x).flatten(1)
        spread = at[:, None].expand(-1, 3, -1)
        under = pixels.gather(2, spread)
        pixels.scatter_(2, spread, under + alpha[:, None] * (colour - under))
        solid = alpha > 0.5
        silhouette.scatter_(1, at, silhouette.gather(1, at) | solid)
        label = (number * 32 + part)[:, None].expand_as(at)
        owners.scatter_(1, at, torch.where(solid, label, owners.gather(1, at)))
    return silhouette.view(n, size, size)


def stick_figures(
    count: int,
    size: int = 96,
    seed: int = 0,
    max_people: int = 1,
    split: str = "train",
    scale: tuple[float, float] = (0.6, 0.85),
) -> list[dict[str, Tensor]]:
    """Scenes of people; kept in memory, so treat the tensors as read-only.

    Args:
        count: how many scenes. The first ones do not depend on it.
        size: height and width in pixels, at least 48.
        max_people: each scene has 1 to `max_people` people, drawn uniformly, who may hide each other.
        split: "train" or "test"; they share no figure and no part of a photograph.
        scale: smallest and largest longer side of a figure's box, as a part of `size`.

    Returns:
        One dict a scene, with N people from back to front:
        image: uint8 (3, size, size);
        keypoints: float32 (N, 14, 2), x and y, the middle of the first pixel is (0, 0); 0 where not annotated;
        visible: int64 (N, 14): 2 seen, 1 hidden behind a limb or a person, 0 not annotated: outside of the image, or a person
            whose keypoints are all missing (one further person in ten);
        boxes: float32 (N, 4), x1 y1 x2 y2 around the figure, x2 and y2 exclusive, inside the image;
        area: float32 (N,), pixels of the figure, those that others hide included;
        head_size: float32 (N,), 0.6 of the diagonal of the head's box.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'test'")
    if count < 1 or max_people < 1:
        raise ValueError(f"count is {count} and max_people {max_people}; they must be 1 or more")
    if size < 48:
        raise ValueError(f"size is {size}; it must be 48 or more")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {scale}; it must be (smallest, largest) with 0 < smallest <= largest <= 1")
    scenes: list[dict[str, Tensor]] = []
    for chunk in range(-(-count // _CHUNK)):
        scenes += _scenes(chunk, size, seed, max_people, split, (float(scale[0]), float(scale[1])))
    return scenes[:count]


@functools.lru_cache(maxsize=128)
def _scenes(
    chunk: int, size: int, seed: int, max_people: int, split: str, scale: tuple[float, float]
) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed((seed * 100_003 + chunk) * 2 + (split == "test"))
    images = _backgrounds(size, split, rng)
    owner = torch.full((_CHUNK, size, size), -1)
    wanted = torch.randint(1, max_people + 1, (_CHUNK,), generator=rng)
    found: list[list[dict[str, Tensor]]] = [[] for _ in range(_CHUNK)]
    for slot in range(max_people):
        rows = (wanted > slot).nonzero()[:, 0]
        if not len(rows):
            continue
        side = size * Draw(len(rows), rng)(*scale)
        # people stand beside each other, at about equal distances, and not quite within the picture when there are several
        share = (
            ((slot + 0.5) / wanted[rows] + Draw(len(rows), rng)(-0.12, 0.12))
            if max_people > 1
            else Draw(len(rows), rng)(0, 1)
        )
        room = (size - side * (1.0 if max_people == 1 else 0.7)).clamp(min=0)
        centre = torch.stack(
            [
                size / 2 + (share - 0.5) * room,
                size / 2 + (Draw(len(rows), rng)(0, 1) - 0.5) * (size - side).clamp(min=0),
            ],
            1,
        )
        figures = Figures(side, centre, rng)
        part, over = images[rows], owner[rows]
        silhouette = paint(part, over, figures, slot)
        images[rows], owner[rows] = part, over
        bare = (torch.rand(len(rows), generator=rng) < _UNANNOTATED) & (slot > 0)
        for i, row in enumerate(rows.tolist()):
            person = {"slot": slot, "joints": figures.joints[i], "bare": bool(bare[i])}
            found[row].append(person | {"silhouette": silhouette[i], "head_size": figures.head_size[i]})
    images = (images + 0.012 * torch.randn(images.shape, generator=rng)).clamp(0, 1)
    finished = (images * 255).round().to(torch.uint8)
    return [_finished(finished[i].clone(), owner[i], found[i]) for i in range(_CHUNK)]


def _finished(image: Tensor, owner: Tensor, people: list[dict]) -> dict[str, Tensor]:
    size = image.shape[1]
    joints = torch.stack([p["joints"] for p in people])  # (N, K, 2)
    at = joints.round().long()
    inside = ((at >= 0) & (at < size)).all(2)
    at = at.clamp(0, size - 1)
    front = owner[at[..., 1], at[..., 0]]  # (N, K)
    slots = torch.tensor([p["slot"] for p in people])[:, None]
    seen = (front // 32 == slots) & _touching().gather(1, (front.clamp(min=0) % 32).T).T
    visible = torch.where(seen, 2, 1) * inside * torch.tensor([not p["bare"] for p in people])[:, None]
    masks = torch.stack([p["silhouette"] for p in people])
    columns, lines = masks.any(1), masks.any(2)  # (N, S) each
    x1, y1 = (line.float().argmax(1) for line in (columns, lines))
    x2, y2 = (size - line.flip(1).float().argmax(1) for line in (columns, lines))
    return {
        "image": image,
        "keypoints": joints * (visible > 0)[..., None],
        "visible": visible,
        "boxes": torch.stack([x1, y1, x2, y2], 1).float(),
        "area": masks.sum((1, 2)).float(),
        "head_size": torch.stack([p["head_size"] for p in people]),
    }


def _backgrounds(size: int, split: str, rng: torch.Generator) -> Tensor:
    """Random crops of the photographs, resized and dimmed: (B, 3, S, S) in [0, 1]."""
    which = torch.randint(len(photographs()), (_CHUNK,), generator=rng)
    corner, extent = torch.rand(_CHUNK, 2, generator=rng), torch.rand(_CHUNK, generator=rng)
    gain = 0.5 + 0.5 * torch.rand(_CHUNK, 1, 1, 1, generator=rng)
    out = torch.empty(_CHUNK, 3, size, size)
    for i, photograph in enumerate(photographs()):
        border = int(photograph.shape[2] * _TRAIN_COLUMNS)
        part = photograph[:, :, :border] if split == "train" else photograph[:, :, border:]
        largest = min(part.shape[1:])
        for row in (which == i).nonzero()[:, 0].tolist():
            side = round(largest * (0.4 + 0.6 * float(extent[row])))
            x, y = (int(float(corner[row, k]) * (part.shape[2 - k] - side + 1)) for k in (0, 1))
            crop = part[:, y : y + side, x : x + side].float()[None] / 255
            out[row] = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
    return out * gain
