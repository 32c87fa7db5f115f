"""How depth maps are compared: which pixels count, how a prediction without a scale is brought to one, and the field's metrics.

The protocol is that of Eigen et al. (2014) as later papers use it: pixels whose true depth lies strictly between `min_depth` and `max_depth` and
inside the crop; the prediction aligned, then held between the same two; every metric for each image, then the mean over images (or once over
all pixels of all images, as some NYU results are).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

Crop = Literal["none", "eigen", "garg", "nyu"]
Alignment = Literal["none", "median", "scale", "affine", "affine_inverse"]

CROPS = {  # rows and columns as parts of the height and width
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),  # KITTI, Eigen et al. 2014
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),  # KITTI, Garg et al. 2016; most papers' "Eigen crop"
    "nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640),  # NYU, Eigen et al. 2014
}
NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3", "ordinal_error")
PAIRS = 1000  # of pixels, for the order metric
TELL_APART = 1.02  # pairs whose depths differ by less are not ordered


def counted(truth: Tensor, crop: Crop, min_depth: float, max_depth: float) -> Tensor:
    """Which pixels of a true depth map (H, W) count: bool (H, W)."""
    mask = (truth > min_depth) & (truth < max_depth)
    if crop != "none":
        height, width = truth.shape
        top, bottom, left, right = CROPS[crop]
        inside = torch.zeros_like(mask)
        # a whole number of pixels that rounding has put just below itself stays whole
        rows, columns = (
            (int(top * height + 1e-6), int(bottom * height + 1e-6)),
            (int(left * width + 1e-6), int(right * width + 1e-6)),
        )
        inside[slice(*rows), slice(*columns)] = True
        mask &= inside
    return mask


def median(values: Tensor) -> Tensor:
    """The middle value, the mean of the middle two of an even number (torch's own takes the lower one)."""
    ordered = values.flatten().sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def fit_line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(s, t) with s x + t nearest to y in the sense of least squares; s = 0 where all x are equal."""
    away = x - x.mean()
    spread = away.square().sum()
    slope = torch.where(spread > 0, (away * (y - y.mean())).sum() / spread.clamp(min=1e-12), 0.0)
    return slope, y.mean() - slope * x.mean()


def align(prediction: Tensor, truth: Tensor, how: Alignment) -> Tensor:
    """Predicted depths (N,), brought to the scale of the true ones (N,), both positive.

    "median": times the ratio of medians, for an unknown scale (self-supervised depth). "scale": times the factor of least squares.
    "affine": a factor and a shift of least squares. "affine_inverse": the same of 1 / depth, for relative disparities (MiDaS).
    """
    if how == "none":
        return prediction
    if how == "median":
        return prediction * (median(truth) / median(prediction))
    if how == "scale":
        return prediction * ((prediction * truth).sum() / prediction.square().sum())
    if how == "affine":
        slope, shift = fit_line(prediction, truth)
        return slope * prediction + shift
    slope, shift = fit_line(1 / prediction, 1 / truth)
    return 1 / (slope / prediction + shift).clamp(min=1e-6)


def errors(prediction: Tensor, truth: Tensor) -> Tensor:
    """The metrics of `NAMES` but for the last, as sums over pixels: float64 (11,) with their number and the sum of log errors at the end."""
    prediction, truth = prediction.double(), truth.double()
    apart, log_apart = prediction - truth, prediction.log() - truth.log()
    ratio = torch.maximum(prediction / truth, truth / prediction)
    parts = [
        (apart.abs() / truth).sum(),
        (apart.square() / truth).sum(),
        apart.square().sum(),
        log_apart.square().sum(),
        (prediction.log10() - truth.log10()).abs().sum(),
        log_apart.square().sum(),
        *((ratio < 1.25**k).double().sum() for k in (1, 2, 3)),
        log_apart.sum(),
        prediction.new_tensor(float(len(truth))),
    ]
    return torch.stack(parts)


def finish(sums: Tensor) -> Tensor:
    """Metrics (9,) in the order of `NAMES` from the sums of `errors`."""
    count = sums[10].clamp(min=1)
    values = sums[:9] / count
    values[2:4] = values[2:4].sqrt()
    values[5] = (values[5] - (sums[9] / count).square()).clamp(min=0).sqrt() * 100
    return values


def wrongly_ordered(prediction: Tensor, truth: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of random pairs of pixels whose true depths differ by more than 2%: (how many are in the wrong order, how many there are)."""
    rng = torch.Generator().manual_seed(seed)
    one, other = (torch.randint(len(truth), (PAIRS,), generator=rng).to(truth.device) for _ in range(2))
    ratio = truth[one] / truth[other]
    clear = (ratio > TELL_APART) | (ratio < 1 / TELL_APART)
    wrong = ((prediction[one] > prediction[other]) != (ratio > 1)) | (prediction[one] == prediction[other])
    return (wrong & clear).sum(), clear.sum()


class DepthMetrics(Metric):
    """Collects predicted and true depth maps of any sizes; `compute` gives the metrics by name.

    abs_rel, sq_rel, rmse (metres), rmse_log, log10; silog: the deviation of the log error, times 100, which does not depend on the scale;
    delta1, delta2, delta3: shares of pixels within 1.25, 1.25^2, 1.25^3; ordinal_error: the share of pairs in the wrong order.

    Args:
        crop, alignment, min_depth, max_depth: see the module's docstring and `align`.
        average: "images": the mean of each image's metrics; "pixels": all pixels of the set together.
    """

    full_state_update = False

    def __init__(
        self,
        crop: Crop = "none",
        alignment: Alignment = "none",
        min_depth: float = 1e-3,
        max_depth: float = 80.0,
        average: Literal["images", "pixels"] = "images",
    ) -> None:
        super().__init__()
        self.crop, self.alignment, self.average = crop, alignment, average
        self.min_depth, self.max_depth = min_depth, max_depth
        self.add_state("sums", torch.zeros(11, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("order", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Depths float32 (H, W) each; 0 in `truth` is unknown. An image without any known depth counts for nothing."""
        mask = counted(truth, self.crop, self.min_depth, self.max_depth)
        if not bool(mask.any()):
            return
        true, found = truth[mask], prediction[mask].clamp(min=1e-6)
        wrong, pairs = wrongly_ordered(found, true)
        found = align(found.double(), true.double(), self.alignment).clamp(self.min_depth, self.max_depth)
        sums = errors(found, true)
        if self.average == "images":
            self.sums[:9] += finish(sums)
            self.order[0] += wrong / pairs.clamp(min=1)
        else:
            self.sums += sums
            self.order += torch.stack([wrong, pairs])
        self.images += 1

    def compute(self) -> dict[str, float]:
        """The metrics; empty where no image had known depth."""
        if self.images == 0:
            return {}
        if self.average == "images":
            values, order = self.sums[:9] / self.images, self.order[0] / self.images
        else:
            values, order = finish(self.sums), self.order[0] / self.order[1].clamp(min=1)
        return dict(zip(NAMES, [*values.tolist(), float(order)], strict=True))
