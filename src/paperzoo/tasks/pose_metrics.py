"""How poses are scored: object keypoint similarity and COCO's AP over it, MPII's PCKh."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperzoo.data.poses import PoseData
from paperzoo.data.skeletons import Skeleton
from paperzoo.errors import MissingExtra

AP_NAMES = ("AP", "AP50", "AP75", "AP_medium", "AP_large", "AR", "AR50", "AR75", "AR_medium", "AR_large")


def oks(
    found: Tensor, true: Tensor, area: Tensor, sigmas: Sequence[float] | Tensor, counted: Tensor | None = None
) -> Tensor:
    """Object keypoint similarity of every found pose with every true one, in [0, 1].

    The mean over the annotated keypoints of exp(-d^2 / (2 area (2 sigma)^2)); 0 for a true pose without any.

    Args:
        found: (M, K, 2).
        true: (N, K, 2).
        area: (N,) of the true bodies.
        sigmas: K.
        counted: bool (N, K): the keypoints that are annotated; all, if None.

    Returns:
        (M, N).
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    found, true = found.double(), true.double()
    square = (found[:, None] - true[None]).square().sum(-1)  # (M, N, K)
    variance = (2 * sigmas).square()
    similarity = torch.exp(-square / (2 * (area.double()[None, :, None] + np.spacing(1)) * variance))
    if counted is None:
        return similarity.mean(-1)
    counted = counted.double()
    return (similarity * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def oks_nms(keypoints: Tensor, scores: Tensor, area: Tensor, sigmas: Sequence[float], threshold: float) -> list[int]:
    """Of poses that are more alike than `threshold`, the best alone: the kept rows, best first.

    Args:
        keypoints: (N, K, 2).
        scores: (N,).
        area: (N,); two poses are compared at the mean of their areas, as in the released code.
    """
    order = scores.argsort(descending=True, stable=True)
    p, a = keypoints[order].double(), area[order].double()
    variance = (2 * torch.as_tensor(sigmas, dtype=torch.float64)).square()
    square = (p[:, None] - p[None]).square().sum(-1)
    between = (a[:, None] + a[None])[..., None] / 2 + np.spacing(1)
    alike = torch.exp(-square / variance / between / 2).mean(-1) > threshold
    kept = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if kept[i]:
            kept[i + 1 :] &= ~alike[i, i + 1 :]
    return order[kept].tolist()


def oks_ap(found: Sequence[dict[str, Any]], data: PoseData) -> dict[str, float]:
    """COCO's ten numbers, by pycocotools: precision and recall over OKS 0.5 to 0.95, the best 20 poses of an image.

    Args:
        found: one dict a pose: image, the position in `data`; keypoints (K, 2) in its pixels; score.
        data: what is there. People without keypoints and crowds count neither for nor against.

    Returns:
        AP, AP50, …; those that there is nothing to measure for (COCO's -1) are left out.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError:
        raise MissingExtra("pycocotools", "detection", "AP over OKS") from None

    people, skeleton = data.people, data.skeleton
    annotations = []
    table = torch.cat([people.keypoints, people.visible[..., None].float()], -1).flatten(1).tolist()
    counts = (people.visible > 0).sum(1).tolist()
    for row, (image, box) in enumerate(zip(people.image.tolist(), people.boxes.tolist(), strict=True)):
        annotations.append(
            {
                "id": row + 1,
                "image_id": image,
                "category_id": 1,
                "keypoints": table[row],
                "num_keypoints": counts[row],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "area": float(people.area[row]),
                "iscrowd": int(people.crowd[row]),
            }
        )
    truth, results = COCO(), []
    for pose in found:
        points = torch.as_tensor(pose["keypoints"], dtype=torch.float64)
        flat = torch.cat([points, torch.ones(len(points), 1)], -1).flatten().tolist()
        results.append({"image_id": pose["image"], "category_id": 1, "keypoints": flat, "score": float(pose["score"])})
    if not results:
        return dict.fromkeys(AP_NAMES[:3] + AP_NAMES[5:8], 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        images = [{"id": i} for i in range(len(data))]
        truth.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.asarray(skeleton.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(v) for name, v in zip(AP_NAMES, evaluation.stats, strict=True) if v >= 0}


def pckh(
    found: Tensor, true: Tensor, counted: Tensor, head_size: Tensor, skeleton: Skeleton, threshold: float = 0.5
) -> tuple[float, dict[str, float]]:
    """MPII's measure: the share of keypoints no farther from the truth than `threshold` head sizes.

    The head size is 0.6 of the diagonal of the head's box. The mean is over all annotated keypoints of all people at once,
    without pelvis and thorax (`skeleton.not_scored`), as in the table of the official toolkit; hidden keypoints count.

    Args:
        found, true: (N, K, 2).
        counted: bool (N, K): annotated.
        head_size: (N,); people whose head size is not known (nan) or 0 are left out.

    Returns:
        the mean, and the share of each keypoint by name; nan where there is nothing to measure.
    """
    known = head_size > 0
    distance = (found.double() - true.double()).norm(dim=-1)[known] / head_size[known].double()[:, None]
    counted = counted[known]
    right = ((distance <= threshold) & counted).sum(0).double()
    total = counted.sum(0).double()
    scored = torch.tensor([k not in skeleton.not_scored for k in range(len(skeleton))])
    mean = float(right[scored].sum() / total[scored].sum())
    return mean, dict(zip(skeleton.names, (right / total).tolist(), strict=True))
