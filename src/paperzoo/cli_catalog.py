"""The catalogue's commands: finding, comparing, citing, a shelf of one's own, the site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paperzoo.cli_options import Completed, Json, complete_name, example
from paperzoo.errors import PaperZooError

app = typer.Typer(rich_markup_mode=None)
shelf_app = typer.Typer(
    help="Your own shelf: mark papers, tag them, write notes; one local file.",
    rich_markup_mode=None,
    invoke_without_command=True,
)
site_app = typer.Typer(help="The catalogue as a web site.", rich_markup_mode=None, no_args_is_help=True)

Area = Annotated[str | None, typer.Option(help="Only this area, for example detection.")]
Task = Annotated[str | None, typer.Option(help="Only this task, English or Chinese; a part of its name will do.")]
Method = Annotated[str | None, typer.Option(help="Only this mechanism, for example 'contrastive learning'.")]
Year = Annotated[str | None, typer.Option(help="2017, 2015-2018, '>=2020'.")]
Venue = Annotated[str | None, typer.Option(help="Only this venue, for example CVPR.")]
Kind = Annotated[str | None, typer.Option(help="model, method, technique or reading.")]
Status = Annotated[
    str | None,
    typer.Option(
        help="A step that was passed (builds, matches, learns, deploys, reproduces), code, verified, 'not yet'."
    ),
]
Ready = Annotated[str | None, typer.Option("--readiness", help="ready, buildable or 'to watch'.")]
Reading = Annotated[str | None, typer.Option(help="The reading lists' marks: checked, to_check or survey.")]
Parameters = Annotated[str | None, typer.Option(help="The size of a model: '<5M', 1M-10M, '>=100M'.")]
Names = Annotated[list[str], typer.Argument(help="Papers.", autocompletion=complete_name)]


@app.command(
    "list",
    epilog=example(
        "paperzoo list --area detection",
        "paperzoo list --by venue --year '>=2020'",
        "paperzoo list --by readiness --status code",
        "paperzoo list --models 'resnet*'",
    ),
)
def list_(
    by: Annotated[
        str, typer.Option(help="The order: area, task, method, venue, year, kind, reading, readiness or list.")
    ] = "area",
    area: Area = None,
    task: Task = None,
    method: Method = None,
    year: Year = None,
    venue: Venue = None,
    kind: Kind = None,
    status: Status = None,
    readiness: Ready = None,
    reading: Reading = None,
    parameters: Parameters = None,
    models: Annotated[str | None, typer.Option(help="Names of models instead, those that match a pattern.")] = None,
    json: Json = False,
) -> None:
    """List the papers, or the models."""
    from paperzoo import terminal_catalog as terminal

    if models is not None:
        from paperzoo.catalog.search import list_models

        return terminal.names(list_models(models), json)
    from paperzoo.catalog.views import select

    found = select(area, task, year, kind, venue, method, status, readiness, reading, parameters)
    return terminal.paper_list(found, json, by)


@app.command(
    epilog=example(
        'paperzoo search "real-time segmentation"',
        "paperzoo search 小样本",
        "paperzoo search CTR --year '>=2020'",
        "paperzoo search detection --status code --parameters '<50M' --json",
    )
)
def search(
    query: Annotated[list[str], typer.Argument(help="Words, English or Chinese; typing errors are forgiven.")],
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    area: Area = None,
    task: Task = None,
    method: Method = None,
    year: Year = None,
    venue: Venue = None,
    kind: Kind = None,
    status: Status = None,
    readiness: Ready = None,
    reading: Reading = None,
    parameters: Parameters = None,
    json: Json = False,
) -> None:
    """Find papers by words, best first."""
    from paperzoo import terminal_catalog as terminal
    from paperzoo.catalog.search import search as find_papers

    among = None
    filters = (area, task, year, kind, venue, method, status, readiness, reading, parameters)
    if any(filters):
        from paperzoo.catalog.views import select

        among = select(*filters)
    words = " ".join(query)
    found = find_papers(words, limit, among)
    if not found and not json:
        hint = "; without the filters there is more" if among is not None and find_papers(words, 1) else ""
        raise PaperZooError(f"nothing found for '{words}'{hint}; paperzoo list shows everything")
    return terminal.found_list(found, json)


@app.command(epilog=example("paperzoo show fixmatch", "paperzoo show resnet50 --json"))
def show(name: Completed, json: Json = False) -> None:
    """Show a paper: facts, idea, models, status, relations, files to read."""
    from paperzoo import terminal_catalog as terminal
    from paperzoo.catalog.cards import find

    terminal.show(find(name), json)


@app.command(
    epilog=example(
        "paperzoo board COCO",
        "paperzoo board ImageNet --metric top-1",
        "paperzoo board Cityscapes --picture record.png",
    )
)
def board(
    dataset: Annotated[
        list[str] | None,
        typer.Argument(help="A data set, and a metric if you like; without it, all boards are listed."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="The metric; default: the one with the most works.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many rows at most.")] = 25,
    picture: Annotated[Path | None, typer.Option(help="Write a picture of the record over time here (.png).")] = None,
    json: Json = False,
) -> None:
    """Show the leaderboard of a data set: published results in one unit, best first, and who held the record when."""
    from paperzoo import terminal_catalog as terminal
    from paperzoo.catalog.board import everything, find_boards

    if not dataset:
        return terminal.all_boards(everything(), json)
    terminal.board(find_boards(" ".join(dataset), metric), limit, picture, json)


@app.command(epilog=example("paperzoo compare resnet senet wide_resnet", "paperzoo compare fcn retinanet --json"))
def compare(names: Names, json: Json = False) -> None:
    """Compare works side by side: facts, results, sizes, speed, status, mechanism."""
    from paperzoo import terminal_catalog as terminal
    from paperzoo.catalog.cards import find
    from paperzoo.catalog.compare import compare as table

    terminal.comparison(table([find(n) for n in names]), json)


@app.command(
    epilog=example(
        "paperzoo cite adam",
        "paperzoo cite resnet fpn --out references.bib",
        "paperzoo cite --area detection --format csl --out detection.json",
        "paperzoo cite --shelf 'to read'",
    )
)
def cite(
    names: Annotated[list[str] | None, typer.Argument(help="Papers.", autocompletion=complete_name)] = None,
    area: Area = None,
    task: Task = None,
    shelf: Annotated[
        str | None, typer.Option(help="The works of your shelf with this mark or tag; 'all' for all.")
    ] = None,
    format: Annotated[str, typer.Option(help="bibtex, or csl (CSL-JSON).")] = "bibtex",
    out: Annotated[Path | None, typer.Option(help="The file; default: the terminal.")] = None,
    json: Json = False,
) -> None:
    """Cite works as BibTeX or CSL-JSON, one or many, ready for a reference manager."""
    from paperzoo.catalog.cards import find, papers
    from paperzoo.catalog.cite import bibliography, bibtex
    from paperzoo.catalog.views import one_of, select

    form = one_of("format", format, ("bibtex", "csl"))
    found = [find(n) for n in names or []]
    if area or task:
        found += select(area, task)
    if shelf is not None:
        from paperzoo.catalog.shelf import MARKS, entries

        chosen = (
            entries()
            if shelf == "all"
            else entries(shelf)
            if shelf.replace("-", " ") in MARKS
            else entries(with_tag=shelf)
        )
        found += [papers()[e["slug"]] for e in chosen if e["slug"] in papers()]
    found = list({p.slug: p for p in found}.values())
    if not found:
        raise PaperZooError("nothing to cite; name papers, or give --area, --task or --shelf")
    if json:
        from paperzoo.terminal import emit

        return emit({p.slug: bibtex(p) for p in found})
    text = bibliography(found, form)
    if out is None:
        print(text)
    else:
        from paperzoo.engine.files import write_text

        write_text(out, text + "\n")
        print(f"wrote {len(found)} works to {out}")


@app.command(
    "export-catalog", epilog=example("paperzoo export-catalog catalog.json", "paperzoo export-catalog catalog.sqlite")
)
def export_catalog(
    path: Annotated[Path, typer.Argument(help="The file to write: .json, .csv or .sqlite.")],
    format: Annotated[str | None, typer.Option(help="json, csv or sqlite; default: by the file's ending.")] = None,
) -> None:
    """Write the whole catalogue into one file: facts, results, relations, status, notes."""
    from paperzoo.catalog.cards import papers
    from paperzoo.catalog.export import export_catalog as export

    print(f"wrote {len(papers())} works to {export(papers().values(), path, format)}")


@app.command(
    epilog=example(
        "paperzoo new my_paper --facts papers.jsonl", "paperzoo new my_paper --area classification --title 'My Paper'"
    )
)
def new(
    slug: Annotated[str, typer.Argument(help="The folder's name: lower case, digits, underscores.")],
    facts: Annotated[Path | None, typer.Option(help="A JSON-lines file with a line whose slug is this one.")] = None,
    area: Annotated[str | None, typer.Option(help="The area's folder, when there are no facts.")] = None,
    title: Annotated[str | None, typer.Option(help="The paper's title, when there are no facts.")] = None,
    kind: Annotated[str, typer.Option(help="model, method or technique, when there are no facts.")] = "model",
    into: Annotated[Path | None, typer.Option(help="The folder of papers; default: this installation's.")] = None,
) -> None:
    """Write the skeleton of a paper's folder, ready to fill; a work that has only its card gets the code files."""
    from paperzoo.catalog.scaffold import scaffold

    folder = scaffold(slug, facts, area, title, kind, into)
    print(f"wrote {folder}\nfill in card.toml and notes.md, then the code; check with: paperzoo verify {slug}")


# -- the shelf ---------------------------------------------------------------------------------------------------------


@shelf_app.callback(
    epilog=example(
        "paperzoo shelf mark 'to read' resnet fpn",
        "paperzoo shelf tag fixmatch thesis",
        "paperzoo shelf note fixmatch 'try with 40 labels'",
        "paperzoo shelf --tag thesis",
    )
)
def shelf(
    context: typer.Context,
    mark: Annotated[str | None, typer.Option(help="Only this mark: to read, reading, read or to try.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only this tag.")] = None,
    json: Json = False,
) -> None:
    """Show your shelf: marks, tags and notes on papers, kept in one local file."""
    if context.invoked_subcommand is None:
        from paperzoo import terminal_catalog as terminal
        from paperzoo.catalog.shelf import entries

        terminal.shelf(entries(mark, tag), json)


@shelf_app.command(
    "mark", epilog=example("paperzoo shelf mark reading resnet", "paperzoo shelf mark 'to read' fpn retinanet")
)
def shelf_mark(status: Annotated[str, typer.Argument(help="to read, reading, read or to try.")], names: Names) -> None:
    """Put papers on the shelf under a mark."""
    from paperzoo.catalog.shelf import mark

    print(f"{', '.join(mark(names, status))}: {status}")


@shelf_app.command(
    "tag", epilog=example("paperzoo shelf tag resnet thesis backbone", "paperzoo shelf tag resnet -- -thesis")
)
def shelf_tag(
    name: Completed, tags: Annotated[list[str], typer.Argument(help="Words; with a minus in front they are taken off.")]
) -> None:
    """Tag a paper."""
    from paperzoo.catalog.shelf import entries, tag

    slug = tag(name, tags)
    print(f"{slug}: {', '.join(entries(slug=slug)[0]['tags']) or 'no tags'}")


@shelf_app.command("note", epilog=example("paperzoo shelf note resnet 'the shortcut needs no parameters'"))
def shelf_note(name: Completed, text: Annotated[str, typer.Argument(help="The note.")]) -> None:
    """Write a note on a paper; earlier ones stay."""
    from paperzoo.catalog.shelf import note

    print(f"noted on {note(name, text)}")


@shelf_app.command("remove", epilog=example("paperzoo shelf remove resnet"))
def shelf_remove(names: Names) -> None:
    """Take papers off the shelf, with their tags and notes."""
    from paperzoo.catalog.shelf import remove

    print(f"removed {', '.join(remove(names))}")


@shelf_app.command("export", epilog=example("paperzoo shelf export shelf.json"))
def shelf_export(path: Annotated[Path, typer.Argument(help="The JSON file to write.")]) -> None:
    """Write the shelf into a JSON file."""
    from paperzoo.catalog.shelf import export_shelf

    print(f"wrote {export_shelf(path)} works to {path}")


@shelf_app.command("import", epilog=example("paperzoo shelf import shelf.json"))
def shelf_import(path: Annotated[Path, typer.Argument(help="A file that `shelf export` wrote.")]) -> None:
    """Add a shelf's file to yours; tags and notes are united."""
    from paperzoo.catalog.shelf import import_shelf

    print(f"read {import_shelf(path)} works from {path}")


# -- the site ----------------------------------------------------------------------------------------------------------


@site_app.command("build", epilog=example("paperzoo site build", "paperzoo site build --out public --no-train"))
def site_build(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("site"),
    train: Annotated[
        bool, typer.Option(help="Train the small models that run in the browser, those that are not in the cache.")
    ] = True,
    json: Json = False,
) -> None:
    """Write the catalogue as a static web site: plain files, for any web server or to open from disk."""
    from paperzoo import terminal
    from paperzoo.serve.build import build

    terminal.prepare_process()
    with terminal.progress("site", json) as bar:
        summary = build(out, train=train, bar=bar)
    if json:
        return terminal.emit(summary)
    print(
        f"{summary['pages']} pages in {summary['seconds']:.1f} s, {summary['megabytes']:.1f} MB: open {out / 'index.html'}"
    )
