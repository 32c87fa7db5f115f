"""Which configuration, or which two together, is best is decided on cases that were not learned from: five-fold cross-validation (sec. 2.5).

    chosen = cross_validate(Config(data="Task03_Liver"), ["2d", "3d_fullres"], folder="runs/liver")
    mask, confidence = chosen.segment(read_volume("patient.nii.gz"))

Every configuration is trained once a fold; each fold's networks answer for the cases they have not seen. An ensemble is the average of softmax
probabilities. At test time all folds of the chosen configurations are averaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paperzoo.data.volumes import IGNORE, Volume
from paperzoo.engine.loop import Settings, fit
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.medical.nnunet.recipe import FOLDS, Config, NNUNetRecipe, decided, largest_pieces
from paperzoo.tasks.volume_metrics import dice_of, overlap_counts


@dataclass
class Selection:
    """What cross-validation chose.

    names: the configuration, or the two whose probabilities are averaged. scores: mean Dice of every candidate, "2d + 3d_fullres" for two.
    keep_largest: classes of which only the largest piece is kept, because that raised the validation Dice. members: all folds' networks of `names`.
    """

    names: tuple[str, ...]
    scores: dict[str, float]
    keep_largest: list[int]
    members: list[NNUNetRecipe] = field(repr=False, default_factory=list)

    def segment(self, volume: Volume) -> tuple[Tensor, Tensor]:
        """Mask uint8 and confidence float16, (X, Y, Z), of a volume."""
        return decided(averaged([member.soft(volume) for member in self.members]), self.keep_largest)


def averaged(probabilities: Sequence[Tensor]) -> Tensor:
    return sum(probabilities) / len(probabilities)


def scored(mask: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Dice of each structure, (K - 1,), NaN where it is on neither side."""
    return dice_of(overlap_counts(mask, truth.where(truth != IGNORE, IGNORE), classes))[1:]


def cross_validate(
    config: Config,
    names: Sequence[str],
    number: int = FOLDS,
    folder: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Selection:
    """Train every configuration on every fold, and choose.

    Args:
        config: of the runs; configuration and fold are set here.
        names: configurations among 2d, 3d_fullres, 3d_lowres.
        number: folds that are trained, the first so many of five.
        folder: where runs are kept (`<name>/fold_<i>`); a temporary one unless given.
    """
    import tempfile

    if not names or len(set(names)) != len(names):
        raise PaperZooError(f"names are {', '.join(names) or 'empty'}; give one or more different configurations")
    trained: dict[str, list[NNUNetRecipe]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(folder) if folder is not None else Path(temporary)
        for name, k in itertools.product(names, range(number)):
            if progress is not None:
                progress(f"{name}, fold {k}")
            recipe = NNUNetRecipe(replace(config, configuration=name, fold=k), Runtime(seed=k))
            place = root / name / f"fold_{k}"
            place.mkdir(parents=True, exist_ok=True)
            fit(recipe, place, Settings(device="cpu"))
            trained[name].append(recipe)
    return choose(trained)


def choose(trained: dict[str, list[Any]]) -> Selection:
    """The best of every single configuration and every two of them, by the mean Dice over structures and validation cases of all folds."""
    names = list(trained)
    candidates = [(n,) for n in names] + list(itertools.combinations(names, 2))
    tables: dict[tuple[str, ...], list[Tensor]] = {c: [] for c in candidates}
    masks: dict[tuple[str, ...], list[tuple[Tensor, Tensor]]] = {c: [] for c in candidates}
    for k in range(len(trained[names[0]])):
        cases = trained[names[0]][k].validation_set
        classes = len(cases.labels)
        for i in range(len(cases)):
            volume = cases[i]
            soft = {name: trained[name][k].soft(volume) for name in names}
            for candidate in candidates:
                mask, _ = decided(averaged([soft[name] for name in candidate]), [])
                tables[candidate].append(scored(mask, volume.mask, classes))
                masks[candidate].append((mask, volume.mask))
    means = {c: mean_dice(torch.stack(rows)) for c, rows in tables.items()}
    best = max(candidates, key=lambda c: means[c])
    keep = pieces_that_help(masks[best], classes)
    return Selection(
        best, {" + ".join(c): v for c, v in means.items()}, keep, [r for name in best for r in trained[name]]
    )


def mean_dice(rows: Tensor) -> float:
    return float(rows.nanmean(0).nanmean().nan_to_num(0.0))


def pieces_that_help(masks: Sequence[tuple[Tensor, Tensor]], classes: int) -> list[int]:
    """Classes whose mean Dice rises when only their largest piece is kept."""
    kept = []
    for k in range(1, classes):
        before = torch.stack([scored(m, t, classes)[k - 1] for m, t in masks]).nanmean()
        after = torch.stack([scored(largest_pieces(m, [k]), t, classes)[k - 1] for m, t in masks]).nanmean()
        if after > before:
            kept.append(k)
    return kept
