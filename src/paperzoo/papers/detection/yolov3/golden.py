"""Writes `golden.safetensors`: what mmdet's YOLOv3 answers for weights, images and targets that can be written down.

    python -m paperzoo.papers.detection.yolov3.golden

needs mmdet 3.3.0, mmengine 0.10.7 and mmcv (mmcv-lite 2.1.0 is enough: its missing compiled operators are not called). `parity.py`
makes the same weights, images and targets by the same rule and compares.
"""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
CLASSES = 80
CANVASES = {"small": (64, 96), "tall": (160, 128)}
ROWS = slice(0, None, 20)  # of the boxes of an image, those that are compared

# -- what both sides start from ----------------------------------------------------------------------------------------


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


@torch.no_grad()
def write_weights(model: nn.Module) -> nn.Module:
    """Every parameter and buffer filled with `noise`, by the order of the names."""
    state = model.state_dict()
    for phase, name in enumerate(sorted(state)):
        value = state[name]
        if name.endswith("num_batches_tracked"):
            continue
        values = noise(tuple(value.shape), phase) - 0.5
        if value.ndim == 4:
            gain = 0.15 if "convs_pred" in name else 3.6
            value.copy_(values * gain / value[0].numel() ** 0.5)
        elif name.endswith("running_var") or name.endswith("bn.weight"):
            value.copy_(1 + values)
        else:
            value.copy_(values)
    return model


def pictures(batch: int, canvas: tuple[int, int]) -> Tensor:
    return noise((batch, 3, *canvas))


def targets(kind: str) -> list[dict[str, Tensor]]:
    """Objects of one area in the middle of cells of the stride where their prior is, so that rules that differ agree; one image is empty."""
    shapes = {
        "small": [[(12, 20, 15, 20), (52, 36, 20, 15), (68, 44, 10, 30)], [(28, 12, 12, 25)]],
        "medium": [[(24, 24, 40, 60), (72, 40, 60, 40)], [(40, 24, 48, 50)]],
        "large": [[(48, 80, 100, 100), (80, 48, 125, 80)], [(48, 112, 80, 125)]],
    }
    batch = []
    for rows in [*shapes[kind], []]:
        box = torch.tensor([[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in rows]).reshape(-1, 4)
        labels = torch.tensor([(7 * i + 3 * len(rows)) % CLASSES for i in range(len(rows))], dtype=torch.int64)
        batch.append({"boxes": box, "labels": labels})
    return batch


LOSS_CASES = {"small": ("small", "eval"), "medium": ("small", "train"), "large": ("tall", "eval")}


def fingerprint(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each gradient its length and its product with a written-down direction: names -> (2,)."""
    found = {}
    for phase, name in enumerate(sorted(gradients)):
        g = gradients[name].double()
        direction = noise(tuple(g.shape), phase).double() - 0.5
        found[name] = torch.stack([g.norm(), (g * direction).sum()]).float()
    return found


# -- mmdet -------------------------------------------------------------------------------------------------------------


class Missing(types.ModuleType):
    """In place of mmcv's compiled operators."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


class Theirs(nn.Module):
    """mmdet's parts under the names of its detector; with the paper's assignment (one prior an object) instead of the config's."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        from mmdet.models.backbones.darknet import Darknet
        from mmdet.models.dense_heads.yolo_head import YOLOV3Head
        from mmdet.models.necks.yolo_neck import YOLOV3Neck
        from mmengine.config import ConfigDict

        entropy = {"type": "CrossEntropyLoss", "use_sigmoid": True, "reduction": "sum"}
        self.backbone = Darknet(53, norm_eval=False)
        self.neck = YOLOV3Neck(3, [1024, 512, 256], [512, 256, 128])
        self.bbox_head = YOLOV3Head(
            CLASSES,
            [512, 256, 128],
            loss_cls=entropy,
            loss_conf=entropy,
            loss_xy=entropy | {"loss_weight": weight},
            loss_wh={"type": "MSELoss", "loss_weight": weight / 2, "reduction": "sum"},
            train_cfg=ConfigDict(
                assigner={"type": "GridAssigner", "pos_iou_thr": 1.0, "neg_iou_thr": 0.5, "min_pos_iou": 0}
            ),
            test_cfg=ConfigDict(
                nms_pre=10**6,
                score_thr=0.0,
                conf_thr=-1,
                min_bbox_size=0,
                nms={"type": "nms", "iou_threshold": 0.45},
                max_per_img=100,
            ),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.bbox_head(self.neck(self.backbone(images)))[0]


def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, options: dict, class_agnostic: bool = False) -> tuple:
    """mmcv's operator by torchvision's."""
    from torchvision.ops import batched_nms as plain

    keep = plain(boxes, scores, labels, options["iou_threshold"])
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


def main() -> None:
    from safetensors.torch import save_file

    operators = Missing("mmcv._ext")
    operators.__spec__ = ModuleSpec("mmcv._ext", None)
    sys.modules.setdefault("mmcv._ext", operators)
    import mmdet.models.dense_heads.base_dense_head as base
    from mmengine.structures import InstanceData

    base.batched_nms = batched_nms
    tensors: dict[str, Tensor] = {}
    theirs = write_weights(Theirs()).eval()
    for name, canvas in CANVASES.items():
        with torch.no_grad():
            maps = theirs(pictures(2, canvas))
            flat = torch.cat([m.permute(0, 2, 3, 1).reshape(2, -1, 5 + CLASSES) for m in maps], dim=1)
            tensors[f"{name}.raw"] = flat[:, ROWS].clone()
            grids = [tuple(m.shape[-2:]) for m in maps]
            head, coded = theirs.bbox_head, torch.cat([flat[..., :2].sigmoid(), flat[..., 2:4]], dim=-1)
            priors = torch.cat(head.prior_generator.grid_priors(grids, device="cpu"))
            strides = torch.cat(
                [torch.full((3 * h * w, 1), float(s)) for (h, w), s in zip(grids, (32, 16, 8), strict=True)]
            )
            boxes = head.bbox_coder.decode(priors, coded, strides)
            tensors[f"{name}.boxes"] = boxes[:, ROWS].clone()
            metas = [{"img_shape": canvas, "scale_factor": (1.0, 1.0)}] * 2
            found = head.predict_by_feat([m.clone() for m in maps], metas)
        for i, objects in enumerate(found):
            tensors[f"{name}.{i}.found"] = torch.cat(
                [objects.bboxes, objects.scores[:, None], objects.labels[:, None]], dim=1
            )
    for kind, (place, mode) in LOSS_CASES.items():
        canvas, wanted = CANVASES[place], targets(kind)
        box = wanted[0]["boxes"][0]
        share = float((box[2:] - box[:2]).prod()) / (canvas[0] * canvas[1])
        theirs = write_weights(Theirs(2 - share)).train(mode == "train")
        instances = [InstanceData(bboxes=t["boxes"], labels=t["labels"]) for t in wanted]
        images = pictures(len(wanted), canvas)
        losses = theirs.bbox_head.loss_by_feat(theirs(images), instances, [{}] * len(wanted))
        values = {name: sum(parts) / len(wanted) for name, parts in losses.items()}
        tensors[f"{kind}.losses"] = torch.stack([values[f"loss_{n}"] for n in ("cls", "conf", "xy", "wh")]).detach()
        names = dict(theirs.named_parameters())
        gradients = torch.autograd.grad(sum(values.values()), list(names.values()))
        prints = fingerprint(dict(zip(names, gradients, strict=True)))
        tensors[f"{kind}.gradients"] = torch.stack([prints[n] for n in sorted(prints)])
    save_file({name: t.float().contiguous() for name, t in tensors.items()}, str(FILE))
    print(FILE, FILE.stat().st_size, {n: tuple(t.shape) for n, t in tensors.items()})


if __name__ == "__main__":
    main()
