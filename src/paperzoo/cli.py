"""The command line: one thin function a command. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from paperzoo import cli_catalog, cli_serve
from paperzoo.cli_options import FREE, Completed, Device, Json, Source, complete_name, example
from paperzoo.errors import PaperZooError

app = typer.Typer(
    name="paperzoo",
    help="Papers that run: find a paper, read it, run it, train it on your data, check it, export it.",
    epilog="Start with: paperzoo run wide_resnet",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        import paperzoo

        print(f"paperzoo {paperzoo.__version__}")
        raise typer.Exit


app.add_typer(cli_catalog.app)
app.add_typer(cli_catalog.shelf_app, name="shelf")
app.add_typer(cli_catalog.site_app, name="site")
app.add_typer(cli_serve.app)


# -- runs --------------------------------------------------------------------------------------------------------------

Data = Annotated[str | None, typer.Option(help="An embedded set's name, or a path to your data.")]
Preset = Annotated[
    str, typer.Option(help="embedded (seconds), published (the paper's own), or another one of the paper.")
]
Out = Annotated[Path | None, typer.Option(help="The run's folder; default runs/<name>/<time>.")]


@app.command(
    context_settings=FREE,
    epilog=example("paperzoo run wide_resnet", "paperzoo run fixmatch --steps 500 --seed 1"),
)
def run(
    context: typer.Context,
    name: Completed,
    preset: Preset = "embedded",
    data: Data = None,
    out: Out = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Every random number follows from it.")] = 0,
    json: Json = False,
) -> None:
    """Run a paper end to end: train, evaluate, predict, export, report. Any field of its config is an option too."""
    from paperzoo import terminal

    terminal.prepare_process()
    from paperzoo.engine.run import run as run_paper

    arguments = start_arguments(context, preset, data, out, {"device": device, "seed": seed})
    with terminal.progress(name, json) as bar:
        result = run_paper(name, on_stage=bar.stage, on_step=bar.step, **arguments)
    terminal.finished(result, json)


@app.command(
    context_settings=FREE,
    epilog=example(
        "paperzoo train wide_resnet --data path/to/imagefolder",
        "paperzoo train wide_resnet28_10 --preset published --learning-rate 0.05",
        "paperzoo train resnet --data labels.csv --steps 2000 --precision bf16 --loggers csv,tensorboard",
        "paperzoo train simclr --processes 2",
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m paperzoo train resnet …",
    ),
)
def train(
    context: typer.Context,
    name: Completed,
    data: Data = None,
    preset: Preset = "embedded",
    out: Out = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Every random number follows from it.")] = 0,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients are averaged before an update.")] = 1,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a better result.")
    ] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Evaluate every so many steps.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Write a checkpoint every so many steps.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Log every so many steps.")] = None,
    loggers: Annotated[str, typer.Option(help="csv, tensorboard, mlflow, wandb; several with commas.")] = "csv",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Shard the network over the processes (FSDP2).")] = False,
    processes: Annotated[int, typer.Option(help="Processes on this machine, started with torchrun.")] = 1,
    json: Json = False,
) -> None:
    """Train a paper's recipe, on your data or an embedded set. Any field of its config is an option too."""
    from paperzoo import terminal

    if processes > 1:
        raise typer.Exit(launch(processes))
    terminal.prepare_process()
    from paperzoo.engine.run import train as train_paper

    settings = {
        "device": device,
        "seed": seed,
        "precision": precision,
        "accumulate": accumulate,
        "patience": patience,
        "evaluate_every": evaluate_every,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
        "loggers": [part.strip() for part in loggers.split(",")],
        "compile": compile,
        "shard": shard,
    }
    arguments = start_arguments(context, preset, data, out, settings)
    with terminal.progress(name, json) as bar:
        bar.stage("train")
        result = train_paper(name, on_step=bar.step, **arguments)
    terminal.finished(result, json)


@app.command(epilog=example("paperzoo resume runs/wide_resnet/2026-01-31_12-00-00"))
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of a run that was stopped or killed.")],
    device: Annotated[str | None, typer.Option(help="Another device than before.")] = None,
    processes: Annotated[int, typer.Option(help="Processes on this machine, started with torchrun.")] = 1,
    json: Json = False,
) -> None:
    """Go on with a run that was stopped; it ends with the same weights as one that was not."""
    from paperzoo import terminal

    if processes > 1:
        raise typer.Exit(launch(processes))
    terminal.prepare_process()
    from paperzoo.engine.run import resume as resume_run

    with terminal.progress(str(folder), json) as bar:
        bar.stage("train")
        result = resume_run(folder, on_step=bar.step, **({"device": device} if device else {}))
    terminal.finished(result, json)


@app.command(
    context_settings=FREE,
    epilog=example("paperzoo evaluate wide_resnet", "paperzoo evaluate runs/… --data path/to/imagefolder"),
)
def evaluate(
    context: typer.Context,
    source: Source,
    data: Data = None,
    weights: Annotated[str | None, typer.Option(help="Other weights for the network.")] = None,
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Evaluate a finished run, on the data it was trained on or on other data."""
    from paperzoo import terminal

    terminal.prepare_process()
    from paperzoo.engine.run import load

    changes = free_options(context) | ({"data": data} if data else {})
    recipe = load(source, device=device, weights=weights, **changes)
    terminal.metrics(recipe.evaluate(split), json)


@app.command(
    epilog=example(
        "paperzoo predict wide_resnet digit.png",
        "paperzoo predict runs/… *.jpg --draw pictures/",
        "paperzoo predict retinanet holiday/ film.mp4 --draw out/",
        "paperzoo predict retinanet camera:0 --frames 100 --draw out/",
        "paperzoo predict fnet 'a sentence' --json",
        "paperzoo predict swinir photo.png --scale 4 --weights swinir_x4.pth --draw out/",
    )
)
def predict(
    source: Source,
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files or text, as the paper's task takes them; for pictures also folders, videos, camera:0, rtsp://…"
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(help="Other weights for the network; a paper's name with weights needs no run."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Without a run: whose settings the weights are for.  [default: published]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Without a run: which model the weights are for.")] = None,
    scale: Annotated[
        int | None, typer.Option(min=2, help="Without a run: by how much pictures are enlarged, where the paper does.")
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(help="Write a picture of every result into this folder; a video becomes a video.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="At most so many frames of each video, camera or stream.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Predict on files or text with a finished run; on folders, videos and cameras where the task takes pictures."""
    from paperzoo import terminal

    terminal.prepare_process()
    from paperzoo.engine.given import has_run, load_given
    from paperzoo.engine.run import load

    named = {"preset": preset, "model": model, "scale": scale}
    given = {option: value for option, value in named.items() if value is not None}
    if given and weights is None:
        raise PaperZooError(f"--{next(iter(given))} says what given weights are for; name their file with --weights")
    if given or (weights is not None and not has_run(source)):
        chosen = {"preset_name": given.pop("preset")} if "preset" in given else {}
        recipe = load_given(source, weights, device, **chosen, **given)
    else:
        recipe = load(source, device=device, weights=weights)
    raise typer.Exit(terminal.predictions(recipe, inputs, draw, frames, json))


@app.command(epilog=example("paperzoo export wide_resnet", "paperzoo export runs/… --format torch --out model.pt2"))
def export(
    source: Source,
    format: Annotated[str, typer.Option(help="onnx, or torch for a torch.export program.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file; default: in the run's folder.")] = None,
    weights: Annotated[str | None, typer.Option(help="Other weights for the network.")] = None,
    fixed_size: Annotated[
        bool,
        typer.Option(
            "--fixed-size", help="Only the batch may differ; else other sizes may, too, where the network takes them."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Export a finished run's network, and check the export against it at several batches and sizes."""
    from paperzoo import terminal

    terminal.prepare_process()
    from paperzoo.engine.export import export as export_network
    from paperzoo.engine.run import load, run_folder

    path = out or run_folder(source) / ("model.onnx" if format == "onnx" else "model.pt2")
    recipe = load(source, device="cpu", weights=weights)
    terminal.exported(export_network(recipe, path, format, any_size=False if fixed_size else None), json)


@app.command(
    epilog=example(
        "paperzoo optimize wide_resnet",
        "paperzoo optimize runs/… --precision int8 --calibrate path/to/imagefolder --max-drop 0.005",
        "paperzoo optimize retinanet --target openvino --out deploy/retinanet",
    )
)
def optimize(
    source: Source,
    weights: Annotated[str | None, typer.Option(help="Other weights for the network.")] = None,
    target: Annotated[
        str, typer.Option(help="auto (the fastest that is installed), onnxruntime, openvino, inductor or tensorrt.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or int8.")] = "fp32",
    calibrate: Annotated[
        str | None, typer.Option(help="Data for int8 ranges, as for train --data; default: the run's own.")
    ] = None,
    max_drop: Annotated[float, typer.Option(help="The share of the task's metric that int8 may cost.")] = 0.01,
    min_same: Annotated[float, typer.Option(help="The share of the answers that int8 must leave as they are.")] = 0.99,
    ranges: Annotated[
        str, typer.Option(help="How int8 ranges are found: minmax, entropy or percentile.")
    ] = "percentile",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Take images of other sizes, too.")] = False,
    tune_steps: Annotated[int, typer.Option(help="Steps of quantisation-aware training before int8.")] = 0,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of each measurement.")] = 7,
    out: Annotated[Path | None, typer.Option(help="The folder; default: deploy in the run's folder.")] = None,
    json: Json = False,
) -> None:
    """Write a deployable folder: the fastest program of a finished run's network, with its speed and its cost."""
    from paperzoo import terminal

    terminal.prepare_process()
    from paperzoo.engine.optimize import optimize as optimize_run

    with terminal.progress(str(source), json) as bar:
        result = optimize_run(
            source,
            out,
            weights,
            target,
            precision,
            calibrate,
            max_drop,
            min_same,
            ranges,
            dynamic,
            rounds,
            tune_steps,
            on_stage=bar.stage,
            on_step=bar.step,
        )
    terminal.optimised(result, json)


# -- proof -------------------------------------------------------------------------------------------------------------


@app.command(
    epilog=example(
        "paperzoo verify fixmatch", "paperzoo verify resnet --step builds --step matches", "paperzoo verify --all"
    )
)
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Papers.", autocompletion=complete_name)] = None,
    all: Annotated[bool, typer.Option("--all", help="Every paper; writes STATUS.md.")] = False,
    step: Annotated[
        list[str] | None, typer.Option(help="Only this step: builds, matches, learns, deploys or reproduces.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Record this finished run, on the paper's own data, as the paper's reproduction."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Papers at a time.")] = 1,
    write: Annotated[
        bool, typer.Option("--write", help="Write STATUS.md also when only some papers are verified.")
    ] = False,
    json: Json = False,
) -> None:
    """Climb the ladder of verification: builds, matches, learns, deploys, reproduces."""
    from paperzoo import terminal

    if record is not None:
        if not names or len(names) != 1:
            raise PaperZooError("--record needs the name of one paper")
        from paperzoo.catalog.cards import find
        from paperzoo.engine.verify import record as record_run

        print(f"wrote {record_run(find(names[0]), record)}")
        return
    if not names and not all:
        raise PaperZooError("name the papers to verify, or give --all")
    terminal.prepare_process()
    raise typer.Exit(terminal.verify(names or [], all, step or [], json, processes, write))


@app.command(
    epilog=example(
        "paperzoo bench resnet50",
        "paperzoo bench resnet50 --against torchvision:resnet50",
        "paperzoo bench fnet_base --against auto --json",
    )
)
def bench(
    name: Annotated[str, typer.Argument(help="A model.", autocompletion=complete_name)],
    against: Annotated[
        str | None, typer.Option(help="package:name of a reference, or auto for the one that is known.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of each measurement.")] = 15,
    threads: Annotated[int | None, typer.Option(help="Threads; default: as torch chooses.")] = None,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write the JSON here.")] = None,
    json: Json = False,
) -> None:
    """Measure inference at batch 1 and 8 and a training step: time and memory, against a reference."""
    from paperzoo import terminal
    from paperzoo.engine.bench import bench as measure

    terminal.benchmark(measure(name, against, rounds=rounds, threads=threads, device=device, out=out), json)


# -- helpers -----------------------------------------------------------------------------------------------------------


def free_options(context: typer.Context) -> dict[str, str]:
    """--learning-rate 0.1 and --learning-rate=0.1 among what no option took: the fields of the paper's config."""
    changes: dict[str, str] = {}
    words = list(context.args)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise PaperZooError(f"'{word}' is not expected here; fields of the config are written --field value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words or (words[0].startswith("--") and not words[0][2:3].isdigit()):
                raise PaperZooError(f"--{name} needs a value (for a switch: true or false)")
            value = words.pop(0)
        changes[name.replace("-", "_")] = value
    return changes


def start_arguments(context: typer.Context, preset: str, data: str | None, out: Path | None, settings: dict) -> dict:
    from paperzoo.engine.configure import configure
    from paperzoo.engine.loop import Settings

    changes = free_options(context)
    return {
        "preset_name": preset,
        "data": data,
        "folder": out,
        "changes": changes,
        "settings": configure(Settings(), settings, "option"),
    }


def launch(processes: int) -> int:
    """This very command again under torchrun, without --processes."""
    import subprocess

    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word == "--processes":
            skip = not skip and word == "--processes"
        elif not word.startswith("--processes="):
            words.append(word)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.call([*command, "-m", "paperzoo", *words])


def main() -> None:
    """The entry point: mistakes become one line and exit code 2, a closed pipe ends quietly."""
    try:
        app()
    except PaperZooError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
