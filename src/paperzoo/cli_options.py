"""What the commands share: the options that are spelled alike everywhere, completion, examples below the help."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Source = Annotated[str, typer.Argument(help="A run's folder, or a paper's name for its latest run under ./runs.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:<number> or mps.")]
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}


def complete_name(incomplete: str) -> list[str]:
    from paperzoo.catalog.cards import papers, variants

    return sorted(n for n in {*papers(), *variants()} if n.startswith(incomplete))


Completed = Annotated[
    str, typer.Argument(help="A paper's slug, name or alias, or one of its models.", autocompletion=complete_name)
]


def example(*lines: str) -> str:
    """The examples below a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
