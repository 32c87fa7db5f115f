"""What generated images are measured by, against torchmetrics, SciPy and literal versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm, wasserstein_distance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.ssim import MultiScaleStructuralSimilarityIndexMeasure

from paperzoo.tasks import generation_metrics as metrics


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(60, 8, generator=rng), torch.randn(60, 8, generator=rng) * 1.3 + 0.4


def test_the_frechet_distance_is_the_formula(features):
    from scipy.linalg import sqrtm

    a, b = (x.double().numpy() for x in features)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert metrics.frechet_distance(*features) == pytest.approx(expected, rel=1e-4)


def test_the_kernel_distance_is_torchmetrics_over_one_subset(features):
    theirs = KernelInceptionDistance(metrics.Ready(8), subsets=1, subset_size=60)
    theirs.update(features[0], real=True)
    theirs.update(features[1], real=False)
    assert metrics.kernel_distance(*features) == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


def test_the_kernel_distance_is_unbiased_and_takes_unequal_numbers():
    rng = torch.Generator().manual_seed(0)
    values = [metrics.kernel_distance(*torch.randn(50, 4, generator=rng).split([30, 20])) for _ in range(200)]
    assert abs(sum(values) / 200) < 3 * torch.tensor(values).std() / math.sqrt(200)
    assert min(values) < 0 < max(values)


def test_a_laplacian_pyramid_adds_up_to_the_image():
    images = torch.randn(2, 3, 64, 64)
    levels = metrics.laplacian_pyramid(images)
    assert [x.shape[-1] for x in levels] == [64, 32, 16]
    weight = torch.tensor([1.0, 4, 6, 4, 1]) / 8
    image = levels[-1]
    for level in reversed(levels[:-1]):
        large = torch.zeros_like(level)
        large[..., ::2, ::2] = image
        kernel = (weight[:, None] * weight).expand(3, 1, 5, 5)
        image = level + F.conv2d(F.pad(large, (2, 2, 2, 2), "reflect"), kernel, groups=3)
    torch.testing.assert_close(image, images)


def test_patches_are_parts_of_their_images_normalised_by_channel():
    images = torch.rand(4, 3, 16, 16) * torch.tensor([1.0, 5.0, 9.0])[:, None, None]
    found = metrics.descriptors(images, 20, torch.Generator().manual_seed(0)).reshape(80, 3, 7, 7)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3), correction=0), torch.ones(3))


def test_along_one_direction_it_is_scipys_distance():
    rng = torch.Generator().manual_seed(1)
    real, fake = torch.rand(8, 1, 7, 7, generator=rng), torch.rand(8, 1, 7, 7, generator=rng) ** 2
    ours = metrics.sliced_wasserstein(real, fake, patches=8, directions=1)
    again = torch.Generator().manual_seed(0)
    first, second = (metrics.descriptors(x, 1, again) for x in (real, fake))
    axis = F.normalize(torch.randn(49, 1, generator=again), dim=0)
    expected = wasserstein_distance((first @ axis).flatten().numpy(), (second @ axis).flatten().numpy())
    assert ours == {7: pytest.approx(1000 * expected, rel=1e-4)}


def test_more_alike_images_have_smaller_distances():
    rng = torch.Generator().manual_seed(2)
    smooth = F.interpolate(torch.rand(100, 3, 4, 4, generator=rng), 32, mode="bilinear")
    same, noise = smooth.flip(3), torch.rand(100, 3, 32, 32, generator=rng)
    near, far = metrics.sliced_wasserstein(smooth, same), metrics.sliced_wasserstein(smooth, noise)
    assert list(near) == [32, 16] and all(2 * near[k] < far[k] for k in near)


def test_lost_classes_are_counted_and_weighed():
    found, real = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 1, 2, 3])
    assert metrics.covered_classes(found, 4) == 2
    assert metrics.class_divergence(found, real, 4) == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1))
    assert metrics.class_divergence(real, real, 4) == 0.0


def test_diversity_is_relative_to_the_real_images_of_a_class():
    real, classes = torch.tensor([[0.0], [2.0], [10.0], [14.0]]), torch.tensor([0, 0, 1, 1])
    fake = torch.tensor([[1.0], [2.0], [7.0], [7.0]])
    assert metrics.pairwise_distance(torch.tensor([[0.0], [1.0], [3.0]])) == pytest.approx(2.0)
    assert metrics.relative_diversity(fake, classes, real, classes) == pytest.approx((0.5 + 0.0) / 2)
    assert math.isnan(metrics.relative_diversity(fake[:1], classes[:1], real, classes))


def test_similarity_over_scales_is_torchmetrics_where_windows_fit():
    rng = torch.Generator().manual_seed(4)
    first = F.interpolate(torch.rand(3, 3, 24, 24, generator=rng), 192, mode="bilinear")
    second = (first + 0.1 * torch.rand(first.shape, generator=rng)).clamp(0, 1)
    theirs = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
    torch.testing.assert_close(metrics.ms_ssim(first, second), theirs(first, second), rtol=1e-4, atol=1e-5)


def test_similarity_of_small_images():
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(metrics.ms_ssim(images, images), torch.ones(2))
    assert (metrics.ms_ssim(images, torch.rand(2, 3, 32, 32)) < 0.5).all()


def test_bits_for_each_dimension():
    assert metrics.bits_per_dimension(math.log(256) * 12, 12) == pytest.approx(8.0)


def test_parzen_windows_are_scipys_mixture():
    rng = torch.Generator().manual_seed(5)
    samples, points = torch.randn(20, 3, generator=rng), torch.randn(5, 3, generator=rng)
    each = norm.logpdf(points[:, None].numpy(), samples.numpy(), 0.7).sum(-1)
    expected = np.log(np.exp(each).mean(1))
    np.testing.assert_allclose(metrics.parzen_log_likelihood(samples, points, 0.7).numpy(), expected, rtol=1e-5)
    widths = torch.tensor([0.01, 0.5, 30.0])
    assert metrics.parzen_width(samples, points, widths) == pytest.approx(0.5)
