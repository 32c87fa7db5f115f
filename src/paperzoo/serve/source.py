"""Code on pages: files with a link for every line, and where a class, function or attribute is defined."""

from __future__ import annotations

import ast
import functools
import html
import re
from pathlib import Path

from pygments.lexers.python import PythonLexer
from pygments.token import Token, _TokenType

from paperzoo.catalog.cards import Paper, papers

ORDER = ("model.py", "technique.py", "recipe.py", "parity.py")
COLOURS = (  # the first kind of token that fits -> a class of the stylesheet
    (Token.Literal.String.Doc, "d"),
    (Token.Literal.String, "s"),
    (Token.Comment, "c"),
    (Token.Keyword, "k"),
    (Token.Operator.Word, "k"),
    (Token.Name.Function, "f"),
    (Token.Name.Class, "f"),
    (Token.Name.Decorator, "f"),
    (Token.Literal.Number, "n"),
    (Token.Name.Builtin.Pseudo, "v"),
)
IMPORTED = re.compile(r"\b(paperzoo\.papers\.\w+)\.(\w+)(?:\.(\w+))?")
LEXER = PythonLexer(stripnl=False, ensurenl=False)


def files(paper: Paper) -> list[Path]:
    """The paper's Python files: the network or technique, the recipe, the proof, then others by name."""
    found = [path for path in paper.path.glob("*.py") if path.name != "__init__.py"]
    return sorted(found, key=lambda p: (ORDER.index(p.name) if p.name in ORDER else len(ORDER), p.name))


def page(slug: str, file: str) -> str:
    """The address of a file's page, from the site's root."""
    return f"code/{slug}/{file}.html"


@functools.lru_cache(maxsize=4096)
def highlighted(path: Path, changed: int) -> list[str]:
    """The file's lines as HTML. `changed` is the file's time, so that a changed file is read again."""
    lines, line = [], []
    for kind, text in LEXER.get_tokens(path.read_text(encoding="utf-8")):
        name = colour(kind)
        for place, part in enumerate(text.split("\n")):
            if place:
                lines.append("".join(line))
                line = []
            if part:
                escaped = html.escape(part, quote=False)
                line.append(f'<i class="{name}">{escaped}</i>' if name else escaped)
    return [*lines, "".join(line)] if line else lines


def with_links(line: str, root: str) -> str:
    """A line of highlighted code with imports from other papers linked to their code, or to their page."""

    def link(found: re.Match) -> str:
        whole, slug, file = found[0], found[2], found[3]
        paper = papers().get(slug)
        if paper is None:
            return whole
        there = file and (paper.path / f"{file}.py").exists()
        target = page(slug, f"{file}.py") if there else f"papers/{slug}.html"
        return f'<a href="{root}{target}">{whole}</a>'

    return IMPORTED.sub(link, line) if "paperzoo.papers." in line else line


@functools.cache
def colour(kind: _TokenType) -> str:
    return next((name for parent, name in COLOURS if kind in parent), "")


@functools.lru_cache(maxsize=4096)
def symbols(path: Path, changed: int) -> dict[str, int]:
    """Name -> line: classes, functions, `Class.method`, `Class.field`, `self.attribute`, constants; the first place wins."""
    found: dict[str, int] = {}
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return found
    for node in tree.body:
        define(node, "", found)
    return found


def define(node: ast.stmt, inside: str, found: dict[str, int]) -> None:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        found.setdefault(inside + node.name, node.lineno)
        if inside and node.name not in found and not node.name.startswith("__"):
            found[node.name] = node.lineno
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            define(part, f"{node.name}.", found)
        if not isinstance(node, ast.ClassDef):
            for name, line in attributes(node):
                found.setdefault(f"self.{name}", line)
                found.setdefault(f"{inside}{name}", line)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                found.setdefault(inside + target.id, node.lineno)
                if inside:
                    found.setdefault(target.id, node.lineno)


def attributes(function: ast.AST) -> list[tuple[str, int]]:
    """What a method stores on self."""
    stores = [n for n in ast.walk(function) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return [(n.attr, n.lineno) for n in stores if isinstance(n.value, ast.Name) and n.value.id == "self"]


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns


NAME = re.compile(r"[A-Za-z_][\w.]*")


def place(paper: Paper, text: str) -> tuple[str, int] | None:
    """(file, line) of what a piece of code in the notes names: `model.py`, `Class.method`, `PRESETS["published"]`; line 0 is the file."""
    if re.fullmatch(r"\w+\.py", text):
        return (text, 0) if (paper.path / text).exists() else None
    found = NAME.match(text)
    rest = text[found.end() :] if found else ""
    if not found or (rest and rest[0] not in "([ "):
        return None
    name = found[0].removeprefix("model.").removeprefix("recipe.") if rest[:1] != " " else ""
    for path in files(paper) if name else ():
        line = symbols(path, stamp(path)).get(name)
        if line:
            return path.name, line
    return None
