"""notes.md as HTML: equations drawn, tables with scopes, names of works and of code linked. Cards and notes are text: their HTML is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin

from paperzoo.serve.equations import mathml

EQUATION = re.compile(r"(?P<code>(?P<ticks>`+)[\s\S]*?(?P=ticks))|\$(?!\s)(?:[^$\n]|\n(?!\n))+\$")
Link = Callable[[str], str | None]


def joined(text: str) -> str:
    """Each equation on one line: a line of it that begins with + or - would be read as a list."""
    return EQUATION.sub(lambda found: found[0] if found["code"] else found[0].replace("\n", " "), text)


def code_inline(self: Any, tokens: list[Token], index: int, options: Any, env: dict[str, Any]) -> str:
    text = tokens[index].content
    made = f"<code>{html.escape(text)}</code>"
    target = env["link"](text) if "link" in env and not env.get("inside") else None
    return f'<a href="{html.escape(target)}">{made}</a>' if target else made


def link_open(self: Any, tokens: list[Token], index: int, options: Any, env: dict[str, Any]) -> str:
    env["inside"] = True
    return self.renderToken(tokens, index, options, env)


def link_close(self: Any, tokens: list[Token], index: int, options: Any, env: dict[str, Any]) -> str:
    env["inside"] = False
    return self.renderToken(tokens, index, options, env)


def shifted(self: Any, tokens: list[Token], index: int, options: Any, env: dict[str, Any]) -> str:
    """Headings stand one level lower, below the page's own; none is deeper than h6."""
    tag = f"h{min(6, int(tokens[index].tag[1]) + 1)}"
    return f"<{tag}>" if tokens[index].nesting == 1 else f"</{tag}>\n"


def image(self: Any, tokens: list[Token], index: int, options: Any, env: dict[str, Any]) -> str:
    """Pages load nothing from elsewhere: a picture is its description."""
    return html.escape(tokens[index].content)


RULES = {
    "code_inline": code_inline,
    "link_open": link_open,
    "link_close": link_close,
    "heading_open": shifted,
    "heading_close": shifted,
    "image": image,
    "th_open": lambda *_: '<th scope="col">',
    "td_open": lambda *_: "<td>",
    "table_open": lambda *_: '<div class="scroll" tabindex="0"><table>\n',
    "table_close": lambda *_: "</table></div>\n",
}


def markdown() -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.use(
        dollarmath_plugin,
        allow_space=False,
        allow_digits=True,
        double_inline=True,
        renderer=lambda latex, options: mathml(latex, bool(options["display_mode"])),
    )
    for name, rule in RULES.items():
        reader.add_render_rule(name, rule)
    return reader


MARKDOWN = markdown()


def as_html(text: str, link: Link) -> str:
    """A work's notes without their title.

    Args:
        link: from the text of a piece of `code` to an address, or None.
    """
    tokens = MARKDOWN.parse(joined(text))
    if tokens and tokens[0].type == "heading_open" and tokens[0].tag == "h1":
        tokens = tokens[3:]
    return MARKDOWN.renderer.render(tokens, MARKDOWN.options, {"link": link})
