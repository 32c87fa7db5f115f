"""Lines of text as a picture, for the tasks whose results are text."""

from __future__ import annotations

import textwrap
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDE_FONTS = (
    "notosanscjk",
    "notoserifcjk",
    "sourcehan",
    "wqy",
    "droidsansfallback",
    "pingfang",
    "msyh",
    "simhei",
    "simsun",
)


@lru_cache(maxsize=2)
def font(wide: bool) -> ImageFont.FreeTypeFont | None:
    """A font for Latin text, or one that has Chinese characters if this machine has any."""
    if not wide:
        return ImageFont.load_default(13)
    from matplotlib.font_manager import findSystemFonts

    for path in sorted(findSystemFonts()):
        if any(name in Path(path).name.lower().replace("-", "") for name in WIDE_FONTS):
            return ImageFont.truetype(path, 14)
    return None


def text_sheet(lines: list[tuple[str, str]], columns: int = 92) -> Image.Image | None:
    """(caption, text) pairs below each other; None where no font here can write them."""
    face = font(any(ord(c) > 0x2E7F for _, text in lines for c in text))
    if face is None:
        return None
    rows = []
    for caption, text in lines:
        for i, part in enumerate(textwrap.wrap(text, columns) or [""]):
            rows.append((caption if i == 0 else "", part))
    left = 12 + max(round(face.getlength(caption)) for caption, _ in rows)
    width = left + 12 + max(round(face.getlength(text)) for _, text in rows)
    sheet = Image.new("RGB", (width, 19 * len(rows) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (caption, text) in enumerate(rows):
        pen.text((4, 4 + 19 * i), caption, fill="#888888", font=face)
        pen.text((left, 4 + 19 * i), text, fill="black", font=face)
    return sheet
