"""The authors' `.weights` files: a header, then all numbers of all layers in the order of their configuration file.

Header: three int32 (major, minor, revision) and the number of images seen, int64 since version 0.2, int32 before. Then float32
for each convolution: with batch norm shift, scale, running mean, running variance and kernel; without, bias and kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from paperzoo.errors import DataError


@dataclass(frozen=True)
class DarknetFile:
    """What a `.weights` file holds: its version, how many images the network had seen, and the numbers, float32 (N,)."""

    path: Path
    version: tuple[int, int, int]
    seen: int
    values: Tensor


def read_darknet_weights(path: str | Path) -> DarknetFile:
    """Read a `.weights` file.

    Raises:
        DataError: if it is missing, shorter than its header, or its length is no whole number of float32.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    if len(content) < 16:
        raise DataError(path, f"has {len(content)} bytes; a .weights file begins with a header of 16 or 20")
    major, minor, revision = np.frombuffer(content, "<i4", 3).tolist()
    if not (0 <= major < 1000 and 0 <= minor < 1000):
        raise DataError(path, f"begins with version {major}.{minor}, so it is no .weights file of Darknet")
    wide = major * 10 + minor >= 2
    seen = int(np.frombuffer(content, "<i8" if wide else "<i4", 1, offset=12)[0])
    rest = content[20 if wide else 16 :]
    if len(rest) % 4:
        raise DataError(
            path, f"{len(rest)} bytes follow the header, which is no whole number of float32: it was cut short"
        )
    return DarknetFile(path, (major, minor, revision), seen, torch.from_numpy(np.frombuffer(rest, "<f4").copy()))


def layers(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module | None]]:
    """A network's convolutions in the order of yolov3.cfg (or darknet53.cfg): names, and the batch norm that follows."""
    from paperzoo.papers.detection.yolov3.model import ConvModule, Darknet

    if isinstance(model, Darknet):
        order = ["conv1", *(f"conv_res_block{k}" for k in range(1, 6)), "fc"]
    else:
        order = ["backbone", "neck.detect1", "bbox_head.convs_bridge.0", "bbox_head.convs_pred.0"]
        for i in (1, 2):
            order += [f"neck.conv{i}", f"neck.detect{i + 1}"]
            order += [f"bbox_head.convs_bridge.{i}", f"bbox_head.convs_pred.{i}"]
    found: list[tuple[str, nn.Module, nn.Module | None]] = []
    for prefix in order:
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            if isinstance(module, ConvModule):
                found.append((name, module.conv, module.bn))
            elif isinstance(module, nn.Linear) or name.startswith("bbox_head.convs_pred"):
                found.append((name, module, None))
    return found


def darknet_state(file: DarknetFile, model: nn.Module) -> dict[str, Tensor]:
    """The file's numbers as a state dict of `Darknet` or `YOLOV3`.

    A file of the first layers alone, as the authors give it to start from (darknet53.conv.74), fits a `Darknet` without head.

    Raises:
        DataError: if the file has too few or too many numbers for the network, naming the layer where it ends.
    """
    state, at, values = {}, 0, file.values
    wanted = sum(p.numel() for _, layer, _ in layers(model) for p in layer.parameters())
    wanted += sum(4 * norm.num_features for *_, norm in layers(model) if norm is not None)
    if len(values) > wanted:
        problem = f"has {len(values):,} numbers, the network takes {wanted:,}: another network or number of classes"
        raise DataError(file.path, problem)
    for name, layer, norm in layers(model):
        if norm is None:
            targets = [(f"{name}.bias", layer.bias)]
        else:
            parts = ("bias", "weight", "running_mean", "running_var")
            targets = [(f"{name}.bn.{part}", getattr(norm, part)) for part in parts]
        targets.append((f"{name}.conv.weight" if norm is not None else f"{name}.weight", layer.weight))
        for key, target in targets:
            if at + target.numel() > len(values):
                problem = f"has {len(values):,} numbers and ends in {key}; the network takes {wanted:,}"
                raise DataError(file.path, problem)
            state[key] = values[at : at + target.numel()].reshape(target.shape).clone()
            at += target.numel()
        if norm is not None:
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return state


def is_darknet_file(path: str | Path | None) -> bool:
    """Whether a file's name is one of Darknet's: yolov3.weights, darknet53.conv.74."""
    return path is not None and re.search(r"\.(weights|conv\.\d+)$", str(path)) is not None


def classes_in(file: DarknetFile, model: nn.Module) -> int:
    """For how many classes the file of a `YOLOV3` like this one is; negative or a fraction's floor where it is of no such network."""
    predictors = [layer for name, layer, norm in layers(model) if norm is None]
    row = sum(layer.in_channels + 1 for layer in predictors)  # what one output channel of each takes
    fixed = sum(p.numel() for name, layer, norm in layers(model) if norm is not None for p in layer.parameters())
    fixed += sum(4 * norm.num_features for *_, norm in layers(model) if norm is not None)
    return (len(file.values) - fixed) // (row * model.bbox_head.priors) - 5


def load_darknet_weights(model: nn.Module, path: str | Path) -> DarknetFile:
    """Fill a `Darknet` or `YOLOV3` from a `.weights` file; returns what was read."""
    file = read_darknet_weights(path)
    model.load_state_dict(darknet_state(file, model))
    return file
