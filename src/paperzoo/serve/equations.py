"""Equations of the notes, `$…$` in LaTeX, as the MathML that browsers draw themselves."""

from __future__ import annotations

import functools
import html
import re
import unicodedata

from latex2mathml.converter import convert

# commands that the converter does not know, in words that it does
WRITTEN = {
    r"\arg": r"\operatorname{arg}",
    r"\lVert": "‖",
    r"\rVert": "‖",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\tfrac": r"\frac",
    r"\dfrac": r"\frac",
    r"\bm": r"\mathbf",
}
COMMAND = re.compile("|".join(re.escape(name) + r"(?![A-Za-z])" for name in WRITTEN))
UPRIGHT = re.compile(r'(?:<mi mathvariant="normal">[A-Za-z]</mi>){2,}')
STYLED = re.compile(r'<(mi|mn|mo) mathvariant="([a-z-]+)">([^<]+)</\1>')
SPACES = {"negativethinmathspace": "-0.167em", "negativemediummathspace": "-0.222em"}
STYLES = {
    "bold": "MATHEMATICAL BOLD",
    "bold-italic": "MATHEMATICAL BOLD ITALIC",
    "double-struck": "MATHEMATICAL DOUBLE-STRUCK",
    "script": "MATHEMATICAL SCRIPT",
    "fraktur": "MATHEMATICAL FRAKTUR",
    "sans-serif": "MATHEMATICAL SANS-SERIF",
    "monospace": "MATHEMATICAL MONOSPACE",
}
LETTERLIKE = {"DOUBLE-STRUCK": "DOUBLE-STRUCK", "SCRIPT": "SCRIPT", "FRAKTUR": "BLACK-LETTER"}  # older names of some


@functools.lru_cache(maxsize=8192)
def mathml(latex: str, block: bool = False) -> str:
    """One equation; what cannot be converted stands as it was written, as code."""
    text = COMMAND.sub(lambda found: WRITTEN[found[0]], " ".join(latex.split()))
    try:
        made = convert(text, display="block" if block else "inline")
    except Exception:  # the converter's errors are of many kinds, and all mean the same
        return f"<code>{html.escape(latex)}</code>"
    made = numeric(made)
    made = made.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "").replace(' display="inline"', "")
    for name, width in SPACES.items():
        made = made.replace(name, width)
    made = UPRIGHT.sub(lambda run: f"<mi>{re.sub('<[^>]+>', '', run[0])}</mi>", made)
    return STYLED.sub(styled, made)


def numeric(text: str) -> str:
    """Characters for their numbers, &#x02211; as one character; those that mark up HTML stay as they are."""

    def character(found: re.Match) -> str:
        made = chr(int(found[1], 16))
        return html.escape(made)

    return re.sub(r"&#x([0-9A-Fa-f]+);", character, text)


def styled(found: re.Match) -> str:
    """Letters of a style as the Unicode characters of that style: browsers know no other than upright."""
    tag, style, text = found.groups()
    if style == "normal":
        return found[0]
    return f"<{tag}>{''.join(letter(c, style) for c in text)}</{tag}>"


def letter(plain: str, style: str) -> str:
    prefix = STYLES.get(style)
    if prefix is None or not plain.isascii():
        return plain
    kind = "DIGIT" if plain.isdigit() else "CAPITAL" if plain.isupper() else "SMALL"
    name = unicodedata.name(plain).rsplit(" ", 1)[-1]
    older = LETTERLIKE.get(prefix.split(" ", 1)[1], "")
    for candidate in (f"{prefix} {kind} {name}", f"{older} {kind} {name}"):
        try:
            return unicodedata.lookup(candidate)
        except KeyError:
            continue
    return plain
