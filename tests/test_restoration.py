"""The task of restoration: metrics, degradations, problems, the default recipe."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch
from PIL import Image

from paperzoo.engine.loop import one_step
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError, UnknownName
from paperzoo.tasks import restoration
from paperzoo.tasks.restoration import Config, LanczosDownsample, TotalVariationRecipe, pose

TINY = Config(crop=32, steps=20)


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    clean = restoration.as_float(restoration.open_photograph("chelsea")[:, 100:148, 100:148])
    return clean, (clean + 0.1 * torch.randn(clean.shape, generator=rng)).clamp(0, 1)


def test_psnr_and_ssim_are_those_of_scikit_image(images):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    clean, noisy = (x[0].permute(1, 2, 0).numpy() for x in images)
    assert restoration.psnr(images[1], images[0]) == pytest.approx(peak_signal_noise_ratio(clean, noisy), abs=1e-4)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = structural_similarity(clean, noisy, channel_axis=2, **settings)
    assert restoration.ssim(images[1], images[0]) == pytest.approx(expected, abs=1e-3)


def test_luminance_is_that_of_scikit_image(images):
    from skimage.color import rgb2ycbcr

    expected = rgb2ycbcr(images[0][0].permute(1, 2, 0).numpy())[..., 0] / 255
    assert numpy.allclose(restoration.luminance(images[0])[0, 0].numpy(), expected, atol=1e-5)


def test_the_border_is_left_out(images):
    clean, other = images[0], images[0].clone()
    other[..., :4, :] = 0
    assert restoration.psnr(other, clean, border=4) > 80 > restoration.psnr(other, clean)
    with pytest.raises(PaperZooError, match="border"):
        restoration.psnr(other, clean, border=20)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_downsampling_keeps_constants_and_ramps(factor):
    ramp = torch.linspace(0, 1, 96).expand(1, 3, 96, 96)
    small = LanczosDownsample(factor)(ramp)
    assert small.shape == (1, 3, 96 // factor, 96 // factor)
    middle = ramp.unflatten(3, (-1, factor)).mean(4)[0, 0, 0]
    inside = slice(2, -2)
    assert torch.allclose(small[0, 0, 4][inside], middle[inside], atol=1e-5)


def test_noise_has_the_deviation_asked_for():
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    problem = pose(dataclasses.replace(TINY, crop=None), grey, 1)
    assert float((problem.observed - problem.clean).std() * 255) == pytest.approx(25, rel=0.03)


def test_holes_hide_the_share_asked_for_and_super_resolution_shrinks():
    image = restoration.open_photograph("astronaut")
    holes = pose(dataclasses.replace(TINY, crop=64, task="inpaint", missing=0.9), image, 1)
    assert float(holes.operator.mask.mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(holes.observed, holes.operator(holes.clean))
    small = pose(dataclasses.replace(TINY, crop=66, task="super_resolution", factor=4), image, 1)
    assert small.observed.shape[2:] == (16, 16) and small.clean.shape == small.before.shape == (1, 3, 64, 64)
    assert float((small.operator(small.clean) - small.observed).abs().mean()) < 0.02


def test_a_mask_file_must_fit_the_image_and_hide_a_part(tmp_path):
    image = restoration.open_photograph("astronaut")
    path = str(tmp_path / "mask.png")
    Image.new("L", (5, 5)).save(path)
    config = dataclasses.replace(TINY, task="inpaint", mask=path)
    with pytest.raises(DataError, match="5x5"):
        pose(config, image, 1)
    Image.new("L", (32, 32), 255).save(path)
    with pytest.raises(PaperZooError, match="hides nothing"):
        pose(config, image, 1)
    with pytest.raises(PaperZooError, match="--mask"):
        pose(dataclasses.replace(TINY, task="inpaint", degraded=True), image, 1)


def test_unknown_photographs_are_refused(tmp_path):
    with pytest.raises(UnknownName, match="astronaut"):
        restoration.open_photograph("astronout")
    with pytest.raises(DataError):
        restoration.open_photograph(str(tmp_path / "missing.png"))


def test_total_variation_denoises_and_an_image_of_ones_own_is_fitted(tmp_path):
    recipe = TotalVariationRecipe(dataclasses.replace(TINY, prior_weight=0.06, steps=60, crop=48), Runtime())
    assert recipe.evaluate()["psnr_gain"] == pytest.approx(0, abs=1e-4)
    for _ in range(60):
        one_step(recipe, tmp_path)
    assert recipe.evaluate()["psnr_gain"] > 2
    mine, own = recipe.predict(["astronaut", Image.new("RGB", (20, 14), "red")])
    assert mine.psnr_gain > 2 and mine.clean is not None
    assert own.psnr is None and own.image.size == (20, 14)
    assert recipe.draw(None, mine).width > 3 * 256
