"""Where Fast R-CNN's regions come from: windows of a grid, shaken true boxes, or files of selective search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from paperzoo.blocks.boxes import AnchorGenerator
from paperzoo.errors import DataError


def as_rows(targets: Sequence[dict[str, Tensor]]) -> Tensor:
    """The boxes of each image as rows of one tensor (B, most, 4), filled up with empty boxes."""
    return pad_sequence([t["boxes"] for t in targets], batch_first=True)


def anchors_of(anchors: AnchorGenerator, canvas: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """All anchors of a canvas; made anew in a program that is traced, whose tensors must not be kept."""
    return anchors._make(*canvas).to(device) if torch.compiler.is_compiling() else anchors(*canvas, device=device)


def grid_windows(windows: AnchorGenerator, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """All windows (W, 4) of a canvas, cut to it."""
    if torch.device(device).type == "meta":  # shapes alone
        return torch.empty(sum(windows.counts(height, width)), 4, device=device)
    made = anchors_of(windows, (height, width), device)
    limit = made.new_tensor([width, height]).repeat(2)
    return made.clamp(min=0).minimum(limit)


def jittered(boxes: Tensor, copies: int, shift: float = 0.2, stretch: float = 0.3) -> Tensor:
    """Random neighbours of boxes: (B, N, 4) -> (B, N * copies, 4). Empty boxes stay empty.

    Args:
        shift: centres move by at most this part of width and height.
        stretch: the logarithms of width and height change by at most this.
    """
    size = (boxes[..., 2:] - boxes[..., :2]).repeat_interleave(copies, 1)
    centre = (0.5 * (boxes[..., 2:] + boxes[..., :2])).repeat_interleave(copies, 1)
    centre = centre + size * shift * (2 * torch.rand_like(size) - 1)
    half = 0.5 * size * (stretch * (2 * torch.rand_like(size) - 1)).exp()
    return torch.cat([centre - half, centre + half], dim=-1)


def read_proposals(path: str | Path, names: Sequence[str]) -> list[Tensor]:
    """Regions of each image, (P_i, 4) float32 x1 y1 x2 y2, x2 and y2 exclusive, best first.

    Args:
        path: a `.mat` file of selective search as R-CNN and Fast R-CNN publish it ("boxes": a cell an image, in the order
            of the image set, with y1 x1 y2 x2 counted from 1), or a `.json` file: {"image name": [[x1, y1, x2, y2], …]}.
        names: the images' names without suffix, in the data's order.

    Raises:
        DataError: naming the file, if it cannot be read or belongs to other images.
    """
    path = Path(path).expanduser()
    try:
        if path.suffix == ".mat":
            from scipy.io import loadmat

            with path.open("rb") as file:
                cells = loadmat(file)["boxes"].ravel()
            if len(cells) != len(names):
                raise DataError(path, f"has regions of {len(cells)} images; the data has {len(names)}")
            made = [np.asarray(c, np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]] - (1, 1, 0, 0) for c in cells]
        elif path.suffix == ".json":
            content = json.loads(path.read_bytes())
            made = [np.asarray(content[name], np.float32).reshape(-1, 4) for name in names]
        else:
            raise DataError(path, "is no .mat and no .json file")
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror or error}") from None
    except KeyError as error:
        raise DataError(path, f"has no entry {error}") from None
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(path, f"holds no boxes of four numbers: {error}") from None
    return [torch.from_numpy(np.ascontiguousarray(m, dtype=np.float32)) for m in made]
