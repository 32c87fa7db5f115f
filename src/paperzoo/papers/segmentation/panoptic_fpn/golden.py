"""Writes `golden.safetensors`: what mmdet's Panoptic FPN answers for weights and inputs that can be written down.

    python -m paperzoo.papers.segmentation.panoptic_fpn.golden

needs mmdet 3.3.0, mmengine 0.10.7 and mmcv (mmcv-lite 2.1.0 is enough: regions are pooled by torchvision's operator). `parity.py` makes
the same weights and inputs by the same rule, from the names and shapes that are kept in the file, and compares.
"""

from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("golden.safetensors")
THINGS, STUFF, CANVAS, BATCH = 80, 53, (96, 128), 2

# -- what both sides start from ----------------------------------------------------------------------------------------


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Every parameter and buffer by the order of the names, so that no layer's output grows or vanishes."""
    state = {}
    for phase, (name, shape) in enumerate(sorted(shapes.items())):
        values = noise(tuple(shape), phase) - 0.5
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif len(shape) > 1:
            state[name] = values * 3.6 / values[0].numel() ** 0.5
        elif name.endswith(("running_var", "bn1.weight", "bn2.weight", "gn.weight", "downsample.1.weight")):
            state[name] = 1 + values
        elif name.endswith("bn3.weight"):  # residuals add up
            state[name] = 0.3 + 0.3 * values
        else:
            state[name] = 0.2 * values
    return state


def pictures() -> Tensor:
    return 2 * noise((BATCH, 3, *CANVAS)) - 1


def regions() -> Tensor:
    """Image, x1, y1, x2, y2: regions of all levels, one across the border."""
    rows = [
        [0, 3.3, 7.9, 61.2, 40.4],
        [1, 20, 10, 34, 24],
        [0, 0, 0, 128, 96],
        [1, -4, 0, 130, 90],
        [1, 50.5, 60.5, 58, 65],
    ]
    rows += [[0, -200, -150, 320, 300], [1, -400, -300, 620, 700]]
    return torch.tensor(rows)


LABELS = [3, 0, 79, 17, 40, 8, 61]


def scene() -> dict[str, Tensor]:
    """Instances that overlap, and logits of stuff with "other", at the size of an image."""
    height, width = 90, 120
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    masks = []
    for i in range(7):
        middle, radius = (15 + 11 * i, 20 + (37 * i) % 60), 12 + (5 * i) % 13
        masks.append((x - middle[0]) ** 2 + (y - middle[1]) ** 2 < radius**2)
    masks.append(masks[2] & (x % 2 == 0))  # on the third, and less sure: dropped
    scores = torch.tensor([0.9, 0.62, 0.85, 0.97, 0.7, 0.66, 0.75, 0.61])
    logits = noise((STUFF + 1, 6, 8))
    logits = torch.nn.functional.interpolate(logits[None], (height, width), mode="bilinear")[0]
    labels = torch.tensor([1, 5, 5, 79, 0, 33, 12, 6])
    return {"masks": torch.stack(masks), "scores": scores, "labels": labels, "logits": logits}


# -- mmdet -------------------------------------------------------------------------------------------------------------


class Missing(types.ModuleType):
    """In place of mmcv's compiled operators."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


def main() -> None:
    from safetensors.torch import save_file

    operators = Missing("mmcv._ext")
    operators.__spec__ = ModuleSpec("mmcv._ext", None)
    sys.modules.setdefault("mmcv._ext", operators)
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.structures import InstanceData

    register_all_modules()
    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "panoptic_fpn"
    config = Config.fromfile(folder / "panoptic-fpn_r50_fpn_1x_coco.py").model
    config.backbone.init_cfg = None
    for part in ("bbox_roi_extractor", "mask_roi_extractor"):
        config.roi_head[part].roi_layer.use_torchvision = True
    theirs = MODELS.build(config).eval()
    shapes = {name: list(value.shape) for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(weights(shapes))
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        levels = theirs.extract_feat(pictures())
        tensors["semantic"] = theirs.semantic_head(levels)["seg_preds"][:, ::3, ::2, ::2].contiguous()
        objectness, deltas = theirs.rpn_head(levels)
        tensors["objectness"] = torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in objectness], 1)[:, ::5].clone()
        flat = torch.cat([m.permute(0, 2, 3, 1).reshape(BATCH, -1, 4) for m in deltas], 1)
        tensors["deltas"] = flat[:, ::11].clone()
        found = theirs.roi_head._bbox_forward(levels, regions())
        tensors["classes"], tensors["boxes"] = found["cls_score"], found["bbox_pred"][:, ::3].contiguous()
        masks = theirs.roi_head._mask_forward(levels, regions())["mask_preds"]
        tensors["masks"] = masks[torch.arange(len(LABELS)), LABELS][:, ::2, ::2].contiguous()
        given = scene()
        head, instances = theirs.panoptic_fusion_head, InstanceData()
        head.test_cfg.stuff_area_limit = 300
        for name in ("masks", "scores", "labels"):
            setattr(instances, name, given[name])
        instances.bboxes = torch.zeros(len(given["scores"]), 4)
        tensors["merged"] = head.predict([instances], [given["logits"].clone()])[0].sem_seg[0].to(torch.int16)
    save_file(tensors, str(FILE), metadata={"shapes": json.dumps(shapes)})
    print({name: tuple(value.shape) for name, value in tensors.items()}, FILE.stat().st_size)


if __name__ == "__main__":
    main()
