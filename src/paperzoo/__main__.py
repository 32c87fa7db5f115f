"""`python -m paperzoo`, and the entry point of the `paperzoo` command.

A plain `paperzoo search WORDS` is answered at once, without the machinery that parses options; everything else goes to cli.py.
"""

import sys


def main() -> None:
    if sys.argv[1:2] == ["search"] and quick_search(sys.argv[2:]):
        return
    from paperzoo.cli import main as run

    run()


def quick_search(arguments: list[str]) -> bool:
    """Answer `search WORDS [--json]` if that is all there is; False when there are other options or nothing was found."""
    words = [word for word in arguments if word != "--json"]
    if not words or any(word.startswith("-") for word in words):
        return False
    from paperzoo.catalog.search import search
    from paperzoo.errors import PaperZooError
    from paperzoo.terminal_catalog import found_list

    try:
        found = search(" ".join(words), 20)
        if not found:
            return False
        found_list(found, len(words) < len(arguments))
    except PaperZooError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    return True


if __name__ == "__main__":
    main()
