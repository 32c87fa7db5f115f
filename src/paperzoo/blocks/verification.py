"""Same or different: how well similarities tell pairs apart, and how well probes are found in a gallery.

The protocols of Labeled Faces in the Wild (ten folds), of IJB (true accepts at a rate of false accepts) and of MegaFace
(rank 1 among distractors). Nothing here knows what is compared: faces, voices, signatures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FALSE_ACCEPT_RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def best_threshold(scores: Tensor, same: Tensor) -> float:
    """The threshold t for which "same where score >= t" is right most often.

    Every threshold that makes a difference is tried. It lies in the middle between two neighbouring scores; beyond the
    last one where all pairs, or none, are best called the same. Of equally good ones the highest is taken.

    Args:
        scores: floating point (N,), higher where pairs are more alike.
        same: bool (N,).
    """
    values, order = scores.double().sort(descending=True, stable=True)
    truth = same[order]
    right = torch.cat([truth.new_zeros(1).long(), truth.long().cumsum(0)])  # same pairs among the first k
    correct = right + (~truth).sum() - (torch.arange(len(right), device=right.device) - right)
    cut = torch.cat([truth.new_ones(1), values[:-1] != values[1:], truth.new_ones(1)])  # ties stay together
    best = int(torch.where(cut, correct, -1).argmax())
    if best == 0:
        return float(values[0]) + 1e-6
    if best == len(values):
        return float(values[-1]) - 1e-6
    return float(values[best - 1] + values[best]) / 2


def ten_folds(scores: Tensor, same: Tensor, folds: Tensor) -> tuple[Tensor, Tensor]:
    """The protocol of LFW: for each fold the threshold that is best on all others, and its accuracy on the fold.

    Args:
        scores: floating point (N,); same: bool (N,); folds: int64 (N,), at least two different numbers.

    Returns:
        accuracies and thresholds, float64 (number of folds,), in the order of the folds' numbers.

    Raises:
        ValueError: if there is one fold only.
    """
    numbers = folds.unique().tolist()
    if len(numbers) < 2:
        raise ValueError("one fold leaves nothing to choose its threshold on; at least two are needed")
    accuracies, thresholds = [], []
    for fold in numbers:
        out = folds == fold
        thresholds.append(best_threshold(scores[~out], same[~out]))
        accuracies.append(float(((scores[out].double() >= thresholds[-1]) == same[out]).double().mean()))
    return torch.tensor(accuracies, dtype=torch.float64), torch.tensor(thresholds, dtype=torch.float64)


def accept_rates(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ROC curve, a point for each different score: false accept rates, true accept rates, thresholds, float64.

    It begins at (0, 0) with an infinite threshold. Both kinds of pairs are needed.
    """
    from sklearn.metrics import roc_curve

    rates = roc_curve(same.cpu().numpy(), scores.double().cpu().numpy(), drop_intermediate=False)
    far, tar, thresholds = (torch.from_numpy(x.astype("float64")) for x in rates)
    return far, tar, thresholds


def true_accepts(
    scores: Tensor, same: Tensor, rates: Sequence[float] = FALSE_ACCEPT_RATES
) -> dict[float, tuple[float, float]]:
    """TAR at FAR: for each false accept rate the largest true accept rate that keeps it, and the threshold.

    A rate that the number of different pairs cannot resolve (fewer than 1 / rate of them) is left out.
    """
    far, tar, thresholds = accept_rates(scores, same)
    different = int((~same).sum())
    found = {}
    for rate in rates:
        if different * rate >= 1 - 1e-9:
            last = int((far <= rate + 1e-12).nonzero()[-1])
            found[rate] = (float(tar[last]), float(thresholds[last]))
    return found


def equal_error_rate(scores: Tensor, same: Tensor) -> float:
    """Where the ROC curve, its points joined by lines, has as many false accepts as false rejects."""
    far, tar, _ = accept_rates(scores, same)
    gap = far - (1 - tar)  # rises from -1 to 1
    after = int((gap >= 0).nonzero()[0])
    if after == 0 or gap[after] == 0:
        return float(far[after])
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(far[after - 1] + share * (far[after] - far[after - 1]))


def rank1_in_gallery(probes: Tensor, probe_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """Identification: the share of probes whose most similar gallery entry has their label.

    Args:
        probes: (P, D), gallery: (G, D): embeddings of any length; their cosine is compared.
        probe_labels, gallery_labels: int64 (P,), (G,); distractors have a label that no probe has, for example -1.
    """
    nearest = (F.normalize(probes) @ F.normalize(gallery).T).argmax(1)
    return float((gallery_labels[nearest] == probe_labels).double().mean())


def rank1_among_distractors(embeddings: Tensor, labels: Tensor, distractors: Tensor) -> float:
    """The protocol of MegaFace: every ordered pair of one identity is a probe and its mate, and the mate is hidden among
    all distractors; the share of pairs whose mate is more similar to the probe than every distractor.

    Args:
        embeddings: (N, D); labels: int64 (N,); distractors: (M, D), of identities that are not among the labels.
    """
    embeddings, distractors = F.normalize(embeddings), F.normalize(distractors)
    nearest = torch.cat([(part @ distractors.T).amax(1) for part in embeddings.split(1024)])
    hits = pairs = 0
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        similar = embeddings[mine] @ embeddings[mine].T
        others = ~torch.eye(len(mine), dtype=torch.bool, device=mine.device)
        hits += int(((similar > nearest[mine, None]) & others).sum())
        pairs += len(mine) * (len(mine) - 1)
    return hits / max(1, pairs)
