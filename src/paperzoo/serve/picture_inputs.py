"""Inputs that are pictures: one, two to compare, with boxes, with a text."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from PIL import Image

from paperzoo.serve.inputs import Kind, Schema, fields_of, numbers, same_count, strings
from paperzoo.serve.limits import MOST_INPUTS, Refused
from paperzoo.serve.pictures import Pixels, from_base64, png, read_picture

PICTURE: Schema = {
    "type": "object",
    "description": "A picture: the bytes of a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file.",
    "properties": {"base64": {"type": "string", "format": "byte", "minLength": 1}},
    "required": ["base64"],
    "additionalProperties": False,
}


class Picture(Kind):
    name = "picture"
    files = ("image/*",)
    tensors = [("image", "UINT8", [-1, -1, -1, 3])]

    @property
    def schema(self) -> Schema:
        return PICTURE

    def example(self) -> Any:
        return {"base64": base64.b64encode(png(gradient(32, 32))).decode()}

    def warm_up(self) -> Any:
        first = self.recipe.example()[0]
        height, width = (min(1333, n) for n in first.shape[-2:]) if first.ndim == 4 else (64, 64)
        return gradient(width, height)

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        return from_base64(fields_of(item, {"base64"})["base64"], pixels)

    def from_file(self, content: bytes, pixels: Pixels) -> list[Any]:
        return [read_picture(content, pixels)]

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        return rows_of_pictures(tensors["image"], pixels)


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    planes = [np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width)), np.add.outer(y, x) / 2]
    return Image.fromarray(np.stack(planes, 2).astype(np.uint8))


def rows_of_pictures(tensor: np.ndarray, pixels: Pixels) -> list[Any]:
    """A BYTES tensor of encoded pictures, or pixels (N, H, W, 3), (N, 3, H, W) or (N, H, W)."""
    if tensor.dtype == object:
        return [read_picture(content, pixels) for content in tensor.reshape(-1)]
    if tensor.ndim not in (3, 4):
        raise Refused(f"image has the shape {list(tensor.shape)}; it is [N, H, W, 3], or BYTES [N] of encoded files")
    for row in tensor:
        height, width = row.shape[1:] if row.ndim == 3 and row.shape[0] in (1, 3) else row.shape[:2]
        if not height or not width:
            raise Refused(f"image has the shape {list(tensor.shape)}, without pixels")
        pixels.take(width, height)
    return list(tensor)


class Faces(Picture):
    """A picture, or a list of two to compare."""

    name = "pictures"
    tensors = [("image", "UINT8", [-1, -1, -1, 3]), ("second", "UINT8", [-1, -1, -1, 3])]
    may_lack = {"second"}

    @property
    def schema(self) -> Schema:
        return {"anyOf": [PICTURE, {"type": "array", "items": PICTURE, "minItems": 2, "maxItems": 2}]}

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        if not isinstance(item, list):
            return super().from_json(item, pixels)
        if len(item) != 2:
            raise Refused(f"a pair has two pictures, not {len(item)}")
        return tuple(super(Faces, self).from_json(part, pixels) for part in item)

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        firsts = rows_of_pictures(tensors["image"], pixels)
        if "second" not in tensors:
            return firsts
        return list(zip(firsts, same_count(rows_of_pictures(tensors["second"], pixels), firsts), strict=True))


class PicturePair(Faces):
    """Two pictures of one size: before and after, first and second frame."""

    name = "pair of pictures"
    may_lack = set()

    @property
    def schema(self) -> Schema:
        return {"type": "array", "items": PICTURE, "minItems": 2, "maxItems": 2}

    def example(self) -> Any:
        return [super().example()] * 2

    def warm_up(self) -> Any:
        return (super().warm_up(),) * 2

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        if not isinstance(item, list):
            raise Refused("an input is a list of two pictures")
        return self.pair(*super().from_json(item, pixels))

    def from_file(self, content: bytes, pixels: Pixels) -> list[Any]:
        raise Refused("this model takes two pictures: as JSON, or as a form with two files named file", 415)

    def from_form(self, texts: dict[str, list[str]], files: list[bytes], pixels: Pixels) -> list[Any]:
        if texts or not files or len(files) % 2:
            raise Refused("the form has two files named file for each input, the first one first, and no other fields")
        pictures = [read_picture(content, pixels) for content in files]
        return [self.pair(*pictures[i : i + 2]) for i in range(0, len(pictures), 2)]

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        return [self.pair(*both) for both in super().from_tensors(tensors, pixels)]

    def pair(self, first: Any, second: Any) -> tuple[Any, Any]:
        sizes = [p.size if isinstance(p, Image.Image) else p.shape for p in (first, second)]
        if sizes[0] != sizes[1]:
            raise Refused(f"the two pictures have different sizes: {sizes[0]} and {sizes[1]}")
        return first, second


class AnyPair(PicturePair):
    """Two pictures, each of its own size: source and target."""

    def pair(self, first: Any, second: Any) -> tuple[Any, Any]:
        return first, second


class PictureWithHoles(Picture):
    """A picture whose transparent pixels are to be filled."""

    name = "picture with transparent holes"
    tensors = [("image", "UINT8", [-1, -1, -1, 4])]

    def example(self) -> Any:
        return {"base64": base64.b64encode(png(with_hole(gradient(32, 32)))).decode()}

    def warm_up(self) -> Any:
        return with_hole(super().warm_up())


def with_hole(picture: Image.Image) -> Image.Image:
    """The same picture with a transparent rectangle in its middle."""
    width, height = picture.size
    picture.putalpha(255)
    picture.paste((0, 0, 0, 0), (width // 3, height // 3, max(width // 2, width // 3 + 1), max(height // 2, 1)))
    return picture


class People(Picture):
    """A picture, with the boxes of the people in it if they are known."""

    tensors = [("image", "UINT8", [-1, -1, -1, 3]), ("boxes", "FP32", [-1, -1, 4])]
    may_lack = {"boxes"}

    @property
    def schema(self) -> Schema:
        box = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
        boxes = {"type": "array", "items": box, "description": "x1, y1, x2, y2 of each person, in pixels."}
        return PICTURE | {"properties": PICTURE["properties"] | {"boxes": boxes}}

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        fields = fields_of(item, {"base64"}, {"boxes"})
        picture = from_base64(fields["base64"], pixels)
        return (picture, self.boxes(fields["boxes"])) if "boxes" in fields else picture

    def boxes(self, value: Any) -> Any:
        boxes = numbers(value)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not 1 <= len(boxes) <= MOST_INPUTS:
            raise Refused(f"boxes are 1 to {MOST_INPUTS} rows of four numbers: x1, y1, x2, y2")
        return boxes.tolist()

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        pictures = rows_of_pictures(tensors["image"], pixels)
        if "boxes" not in tensors:
            return pictures
        return [(p, self.boxes(b)) for p, b in zip(pictures, same_count(tensors["boxes"], pictures), strict=True)]


class PictureAndText(Picture):
    """A picture and what shall be different."""

    name = "picture and text"
    files = ()
    tensors = [("image", "UINT8", [-1, -1, -1, 3]), ("text", "BYTES", [-1])]

    @property
    def schema(self) -> Schema:
        properties = PICTURE["properties"] | {"text": {"type": "string", "maxLength": self.limits.text}}
        return PICTURE | {"properties": properties, "required": ["base64", "text"]}

    def example(self) -> Any:
        return super().example() | {"text": "the same, but larger"}

    def warm_up(self) -> Any:
        return super().warm_up(), "the same, but larger"

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        fields = fields_of(item, {"base64", "text"})
        return from_base64(fields["base64"], pixels), self.text(fields["text"])

    def from_file(self, content: bytes, pixels: Pixels) -> list[Any]:
        raise Refused("this model takes a picture and a text: as JSON, or as a form with file and text", 415)

    def from_form(self, texts: dict[str, list[str]], files: list[bytes], pixels: Pixels) -> list[Any]:
        said = texts.get("text", [])
        if set(texts) - {"text"} or len(said) != len(files) or not files:
            raise Refused("the form has as many fields named text as files named file, and no others")
        return [(read_picture(f, pixels), self.text(t)) for f, t in zip(files, said, strict=True)]

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        pictures = rows_of_pictures(tensors["image"], pixels)
        texts = [self.decoded(t) for t in strings(tensors, "text")]
        return list(zip(pictures, same_count(texts, pictures), strict=True))
