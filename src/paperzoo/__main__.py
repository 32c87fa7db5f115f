"""`python -m paperzoo`, and the entry point of the `paperzoo` command.

`paperzoo search` is answered at once, without the machinery that parses options; everything else goes to cli.py.
"""

import sys


def main() -> None:
    if sys.argv[1:2] == ["search"] and quick_search(sys.argv[2:]):
        return
    from paperzoo.cli import main as run

    run()


# option of `paperzoo search` -> the argument of `catalog.views.select`
FILTERS = {f"--{name}": name for name in "area task method year venue kind status reading parameters".split()}
FILTERS["--readiness"] = "readiness_is"


def quick_search(arguments: list[str]) -> bool:
    """Answer `search WORDS`, its filters and --json; False for anything else, and when nothing was found."""
    words, filters, json = [], {}, False
    waiting = iter(arguments)
    for word in waiting:
        name, equals, value = word.partition("=")
        if word == "--json":
            json = True
        elif name in FILTERS:
            value = value if equals else next(waiting, None)
            if not value:
                return False
            filters[FILTERS[name]] = value
        elif word.startswith("-"):
            return False
        else:
            words.append(word)
    if not words:
        return False
    from paperzoo.catalog.search import search
    from paperzoo.errors import PaperZooError
    from paperzoo.terminal_catalog import found_list

    try:
        among = None
        if filters:
            from paperzoo.catalog.views import select

            among = select(**filters)
        found = search(" ".join(words), 20, among)
        if not found:
            return False
        found_list(found, json)
    except PaperZooError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    return True


if __name__ == "__main__":
    main()
