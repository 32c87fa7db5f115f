"""What generated images are measured by.

Features come from a named network: Inception-v3, whose weights are a download, or a `Judge`: a small convolutional
classifier of 64 features that is trained, always in the same way, on the training images of the data set itself (300
steps, about two seconds), and kept for the life of the process. Distances are comparable only between runs with the same
features and data.

    Fréchet inception distance   mean and covariance of features (torchmetrics)
    kernel inception distance    `kernel_distance`: no assumption on the features' shape, unbiased in small samples
    sliced Wasserstein distance  `sliced_wasserstein`: patches of pixels at each scale; no network
    mode collapse                `covered_classes`, `class_divergence`, `pairwise_distance`, `ms_ssim`
    likelihood                   `bits_per_dimension`, and by Parzen windows, where a model has none, `parzen_log_likelihood`
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms import v2

from paperzoo.data.images import Images, open_images
from paperzoo.errors import DataError, MissingExtra

JUDGE_SIZE, JUDGE_STEPS, JUDGE_BATCH = 32, 300, 64


# -- features --------------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """A small classifier whose 64 penultimate features measure images: (B, 3, H, W) in [-1, 1] -> (B, 64)."""

    num_features = 64

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        side = JUDGE_SIZE // 8
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * side * side, self.num_features), nn.ReLU())
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (JUDGE_SIZE, JUDGE_SIZE):
            images = F.interpolate(images, (JUDGE_SIZE, JUDGE_SIZE), mode="bilinear", antialias=True)
        return self.body(images)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes)."""
        return self.head(self(images))


class Ready(nn.Identity):
    """Features that are there already, for a metric that asks for a network: (B, num_features) -> the same."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


@functools.cache
def judge(data: str) -> Judge:
    """The judge of a data set, trained on its training images on the CPU: deterministic, once a process."""
    images = open_images(data, "train").with_transform(to_range(JUDGE_SIZE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or the order of sums, and with it every bit, would depend on the number of threads
    try:
        return train_judge(images)
    finally:
        torch.set_num_threads(threads)


def train_judge(images: Images) -> Judge:
    """`JUDGE_STEPS` steps of AdamW, whatever context this is called in."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        network = Judge(len(images.labels)).train()
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=JUDGE_STEPS)
        for _ in range(JUDGE_STEPS):
            pixels, labels = readable(images, torch.randint(len(images), (JUDGE_BATCH,)).tolist())
            loss = F.cross_entropy(network.logits(pixels), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return network.eval().requires_grad_(False)


def readable(images: Images, rows: list[int]) -> tuple[Tensor, Tensor]:
    """The samples of these rows as a batch, without those whose file cannot be read."""
    samples = []
    for row in rows:
        try:
            samples.append(images[row])
        except DataError as error:
            problem = error
    if not samples:
        raise problem
    pixels, labels = zip(*samples, strict=True)
    return torch.stack(pixels), torch.tensor(labels)


def to_range(size: int, flip: bool = False) -> v2.Compose:
    """The transform from uint8 (3, H, W) to float32 (3, size, size) in [-1, 1]: the central square, resized."""
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    resize = [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
    return v2.Compose([*resize, *mirror, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])


def inception_distance() -> FrechetInceptionDistance:
    """The distance on the 2048 features of Inception-v3, as papers report it. Its weights are downloaded once.

    Raises:
        MissingExtra: if torch-fidelity, which brings the network, is not installed.
    """
    try:
        return FrechetInceptionDistance(feature=2048, normalize=True, reset_real_features=False)
    except ModuleNotFoundError:
        raise MissingExtra("torch-fidelity", "fid", "the Fréchet distance on Inception features") from None


# -- distances -------------------------------------------------------------------------------------------------------


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Of features (N, D) and (M, D): |mean difference|² + tr(C + C' - 2 (C C')^½) (Heusel et al. 2017, arXiv 1706.08500)."""
    metric = FrechetInceptionDistance(Ready(real.shape[1])).to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy of features (N, D) and (M, D) under (x.y / D + 1)³.

    The kernel inception distance of Bińkowski et al. 2018 (arXiv 1801.01401). Papers
    average it over random subsets; here all pairs are used once, which is what those averages estimate. It may be slightly
    negative where the two sets are alike.
    """
    real, fake = real.double(), fake.double()

    def total(a: Tensor, b: Tensor) -> Tensor:
        return sum(
            ((rows @ b.T / a.shape[1] + 1) ** 3).sum() for rows in a.split(1024)
        )  # all at once would fill the memory

    def among(x: Tensor) -> Tensor:
        itself = (x.square().sum(1) / x.shape[1] + 1) ** 3
        return (total(x, x) - itself.sum()) / (len(x) * (len(x) - 1))

    return float(among(real) + among(fake) - 2 * total(real, fake) / (len(real) * len(fake)))


def laplacian_pyramid(images: Tensor, smallest: int = 16) -> list[Tensor]:
    """(B, C, S, S) -> one map a scale, from the full size to the last that is not below `smallest`: details, then the rest."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
    channels = images.shape[1]
    weight = (row[:, None] * row).expand(channels, 1, 5, 5)

    def smooth(x: Tensor, gain: float = 1.0) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), gain * weight, groups=channels)

    levels = []
    while min(images.shape[-2:]) >= 2 * smallest:
        small = smooth(images)[..., ::2, ::2]
        large = torch.zeros_like(images)
        large[..., ::2, ::2] = small
        levels.append(images - smooth(large, 4.0))
        images = small
    return [*levels, images]


def descriptors(images: Tensor, per_image: int, rng: torch.Generator, side: int = 7) -> Tensor:
    """Random patches (B * per_image, C * side * side), at most as large as the image, each channel with mean 0 and deviation 1 over all."""
    side = min(side, *images.shape[-2:])
    windows = images.unfold(2, side, 1).unfold(3, side, 1)  # (B, C, H', W', side, side), a view
    rows = torch.arange(len(images)).repeat_interleave(per_image)
    y, x = (torch.randint(windows.shape[axis], (len(rows),), generator=rng) for axis in (2, 3))
    found = windows[rows, :, y, x]
    found = found - found.mean((0, 2, 3), keepdim=True)
    return (found / found.std((0, 2, 3), correction=0, keepdim=True).clamp(min=1e-8)).flatten(1)


def sliced_wasserstein(
    real: Tensor, fake: Tensor, patches: int = 4096, directions: int = 64, smallest: int = 16
) -> dict[int, float]:
    """The sliced Wasserstein distance of images (N, C, S, S) and (M, C, S, S) by scale, times 1000, as PGGAN reports it.

    Sec. 5 of Karras et al. 2018 (arXiv 1710.10196): patches of 7 x 7 pixels from each level of a Laplacian pyramid, seen along
    random directions; along each one sorted values are compared. The paper takes 2^21 patches of 16,384 images and 512 directions.

    Returns:
        scale in pixels -> distance; always the same patches and directions.
    """
    count = min(len(real), len(fake))
    rng = torch.Generator().manual_seed(0)
    distances = {}
    evenly = (
        torch.linspace(0, len(x) - 1, count).round().long() for x in (real, fake)
    )  # not the first: classes may be in order
    some = (x.float().cpu()[rows] for x, rows in zip((real, fake), evenly, strict=True))
    for a, b in zip(*(laplacian_pyramid(x, smallest) for x in some), strict=True):
        each = max(1, patches // count)
        first, second = descriptors(a, each, rng), descriptors(b, each, rng)
        axes = F.normalize(torch.randn(first.shape[1], directions, generator=rng), dim=0)
        gap = (first @ axes).sort(0).values - (second @ axes).sort(0).values
        distances[a.shape[-1]] = 1000 * float(gap.abs().mean())
    return distances


# -- mode collapse ---------------------------------------------------------------------------------------------------


def covered_classes(found: Tensor, num_classes: int) -> int:
    """How many classes occur among the classes (N,) that a classifier gives generated images."""
    return int((found.bincount(minlength=num_classes) > 0).sum())


def class_divergence(found: Tensor, real: Tensor, num_classes: int) -> float:
    """The Kullback-Leibler divergence, in nats, of the classes (N,) found in generated images from those (M,) in real ones.

    As VEEGAN measures lost modes (Srivastava et al. 2017, arXiv 1705.07761, sec. 5.2); 0 is best.
    """
    p, q = (x.bincount(minlength=num_classes).double() / len(x) for x in (found, real))
    return float(torch.where(p > 0, p * (p / q.clamp(min=1e-12)).clamp(min=1e-300).log(), 0.0).sum())


def pairwise_distance(features: Tensor) -> float:
    """The mean Euclidean distance between two different rows of (N, D), N of 2 or more; 0 where all are the same."""
    return float(F.pdist(features.double()).mean())


def relative_diversity(fake: Tensor, fake_classes: Tensor, real: Tensor, real_classes: Tensor) -> float:
    """How far apart generated images of one class are, as a share of how far real ones are: 1 is as diverse, 0 is collapse.

    Features (N, D) and (M, D), classes (N,) and (M,); averaged over the classes that have two images on both sides.
    """
    shares = []
    for k in real_classes.unique().tolist():
        ours, theirs = fake[fake_classes == k], real[real_classes == k]
        if len(ours) > 1 and len(theirs) > 1:
            shares.append(pairwise_distance(ours) / max(pairwise_distance(theirs), 1e-12))
    return sum(shares) / len(shares) if shares else math.nan


SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """Multi-scale structural similarity of pairs of images (B, C, H, W) in [0, 1] -> (B,); 1 for equal ones.

    Wang, Simoncelli and Bovik 2003: five scales, Gaussian windows of 11 pixels, sigma 1.5. Where a map is smaller the window
    and its sigma shrink with it, as in the code that generative models were measured with.
    """
    result = torch.ones(len(first), dtype=first.dtype, device=first.device)
    for i, weight in enumerate(SCALES):
        similarity, contrast = structure(first, second)
        last = i == len(SCALES) - 1
        result = result * (similarity if last else contrast).relu() ** weight
        if not last:
            first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
    return result


def structure(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Structural similarity (B,) and its contrast term alone (B,), averaged over channels and valid positions."""
    size = min(11, *first.shape[-2:])
    at = torch.arange(size, dtype=first.dtype, device=first.device) - (size - 1) / 2
    row = (-0.5 * (at / (1.5 * size / 11)) ** 2).exp()
    row = row / row.sum()
    channels = first.shape[1]
    window = (row[:, None] * row).expand(channels, 1, size, size)
    maps = torch.cat([first, second, first * first, second * second, first * second])
    a, b, aa, bb, ab = F.conv2d(maps, window, groups=channels).chunk(5)
    contrast = (2 * (ab - a * b) + 0.03**2) / (aa - a * a + bb - b * b + 0.03**2)
    similarity = contrast * (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    return similarity.mean((1, 2, 3)), contrast.mean((1, 2, 3))


# -- likelihood ------------------------------------------------------------------------------------------------------


def bits_per_dimension(nats: float, dimensions: int) -> float:
    """From a negative log-likelihood in nats an image to bits for each of its `dimensions` = C * H * W values."""
    return nats / dimensions / math.log(2)


def parzen_log_likelihood(samples: Tensor, points: Tensor, sigma: float) -> Tensor:
    """log of the mean Gaussian of width `sigma` around the samples (N, D) at the points (M, D): nats (M,), in float64.

    Breuleux, Bengio and Vincent 2011, as the papers on adversarial networks use it. A weak measure: it depends on sigma, and
    needs very many samples in high dimensions.
    """
    samples, dimensions = samples.double(), samples.shape[1]
    constant = math.log(len(samples)) + dimensions * math.log(sigma * math.sqrt(2 * math.pi))
    rows = [(-0.5 * torch.cdist(p, samples).square() / sigma**2).logsumexp(1) for p in points.double().split(256)]
    return torch.cat(rows) - constant


def parzen_width(samples: Tensor, held_out: Tensor, widths: Tensor) -> float:
    """The width among `widths` (K,) under which the mean log-likelihood of the held-out points (M, D) is largest."""
    values = torch.stack([parzen_log_likelihood(samples, held_out, float(s)).mean() for s in widths])
    return float(widths[values.argmax()])
