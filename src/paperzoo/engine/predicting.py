"""Predicting on many inputs: in small batches, one broken file at a time, with pictures and videos of the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from paperzoo.engine.recipe import Recipe
from paperzoo.engine.streams import Source, VideoWriter, sources
from paperzoo.errors import DataError

BATCH = 16  # pictures that are predicted together


@dataclass
class Prediction:
    """One input's answer: the typed result and where its picture is; or what was wrong with the input."""

    name: str
    result: Any = None
    picture: str | None = None
    error: str | None = None


def predict_all(
    recipe: Recipe,
    inputs: list[str],
    draw: Path | None = None,
    frames: int | None = None,
    on_step: Callable[[str, int, int | None], None] | None = None,
) -> Iterator[Prediction]:
    """Predictions as they are made, in the order of the inputs.

    Args:
        inputs: what `recipe.predict` takes; where that is pictures, also folders, videos, cameras and streams
            (`engine.streams`). A broken file in a folder is told in its `error`; one that was named raises.
        draw: a folder for the pictures; a video becomes a video.
        frames: at most so many of each video, camera or stream.
        on_step: called with (source, done, count or None).
    """
    if not recipe.reads_images:
        for i, (value, result) in enumerate(zip(inputs, recipe.predict(inputs), strict=True)):
            yield Prediction(str(value), result, save(recipe, value, result, draw, i, str(value)))
        return
    number = 0
    alone = all(not Path(text).expanduser().is_dir() for text in inputs)
    for source in grouped(sources(inputs, frames)):
        writer = (
            VideoWriter(draw / f"{safe(Path(source.name).stem)}.mp4", source.rate) if draw and source.moving else None
        )
        done, stream = 0, iter(source.items)
        try:
            while chunk := list(islice(stream, 1 if source.live else BATCH)):
                for (name, value), result in zip(chunk, answers(recipe, chunk, strict=alone), strict=True):
                    if isinstance(result, DataError):
                        yield Prediction(name, error=str(result))
                    elif writer is None:
                        yield Prediction(name, result, save(recipe, value, result, draw, number, name))
                    else:
                        picture = recipe.draw(value, result)
                        if picture is not None:
                            writer.add(picture)
                        yield Prediction(name, result, str(writer.path) if picture is not None else None)
                    number += 1
                done += len(chunk)
                if on_step:
                    on_step(source.name, done, source.count)
        finally:
            if writer is not None:
                writer.close()


def grouped(every: Iterator[Source]) -> Iterator[Source]:
    """Single pictures that follow each other as one source, so that they share batches."""
    kept: list[tuple[str, Any]] = []
    for source in every:
        if source.count == 1 and not source.moving:
            kept += source.items
            continue
        if kept:
            yield Source(kept[0][0], iter(kept), len(kept))
            kept = []
        yield source
    if kept:
        yield Source(kept[0][0], iter(kept), len(kept))


def answers(recipe: Recipe, chunk: list[tuple[str, Any]], strict: bool) -> list:
    """A result for each value; a DataError in the place of one that cannot be read, unless `strict`."""
    values = [value for _, value in chunk]
    try:
        return list(recipe.predict(values))
    except DataError as error:
        if strict:
            raise
        if len(values) == 1:
            return [error]
    return [answer for item in chunk for answer in answers(recipe, [item], strict)]


def save(recipe: Recipe, value: Any, result: Any, draw: Path | None, number: int, name: str) -> str | None:
    picture = recipe.draw(value, result) if draw is not None else None
    if picture is None:
        return None
    draw.mkdir(parents=True, exist_ok=True)
    moving = getattr(picture, "is_animated", False)
    path = draw / f"{number:03d}_{safe(Path(name).stem)}{'.gif' if moving else '.png'}"
    picture.save(path, **({"save_all": True} if moving else {}))
    return str(path)


def safe(name: str) -> str:
    """A name that any file system takes."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:40] or "stream"
