"""Classical denoisers on a recipe's test pictures, at their best: what a trained network has to beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def non_local_means(noisy: Tensor, sigma: float, strength: float = 0.8) -> Tensor:
    """scikit-image's (Buades et al. 2005) with known noise: (C, H, W), sigma in 1/255; `strength` is h / sigma."""
    from skimage.restoration import denoise_nl_means

    array = noisy.permute(1, 2, 0).double().numpy()
    how = {"patch_size": 5, "patch_distance": 6, "sigma": sigma / 255, "h": strength * sigma / 255, "fast_mode": True}
    return (
        torch.from_numpy(denoise_nl_means(array, channel_axis=-1, **how).reshape(array.shape)).permute(2, 0, 1).float()
    )


def total_variation(noisy: Tensor, weight: float) -> Tensor:
    """scikit-image's Chambolle (2004): (C, H, W)."""
    from skimage.restoration import denoise_tv_chambolle

    array = noisy.permute(1, 2, 0).double().numpy()
    found = denoise_tv_chambolle(array, weight=weight, channel_axis=-1)
    return torch.from_numpy(found.reshape(array.shape)).permute(2, 0, 1).float()


def classical_psnr(recipe: Any, denoiser: Callable[[Tensor], Tensor]) -> float:
    """The mean PSNR over the test pictures of an `ImageRestorationRecipe`, as its own is measured."""
    kind, total = recipe.test_degradations()[0], 0.0
    for i in range(len(recipe.test_set)):
        noisy, clean = recipe.test_pair(i, kind)
        total += recipe.measure(denoiser(noisy)[None], noisy[None], clean[None])["psnr"]
    return total / len(recipe.test_set)


def best_classical(recipe: Any, sigma: float) -> dict[str, float]:
    """The best PSNR that each classical denoiser reaches with one setting for all test pictures, at noise of sigma / 255."""
    means = [lambda x, s=s: non_local_means(x, sigma, s) for s in (0.6, 0.8, 1.0)]
    variation = [lambda x, w=w: total_variation(x, w * sigma / 255) for w in (0.9, 1.2, 1.5, 1.8)]
    return {
        "non-local means": max(classical_psnr(recipe, f) for f in means),
        "total variation": max(classical_psnr(recipe, f) for f in variation),
    }
