"""SimCLR's reusable parts: the NT-Xent loss, the projection head, the augmentation, LARS, and what features are worth.

Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020 (algorithm 1, sec. 2,
appendix A and B.8). LARS: You et al., 2017, with the differences of SimCLR's released code, which are named below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# The loss (eq. 1)


class NTXent(nn.Module):
    """Normalised temperature-scaled cross entropy over all pairs of a batch of two views.

    l(i, j) = -log( exp(sim(z_i, z_j) / T) / sum_{k != i} exp(sim(z_i, z_k) / T) ), averaged over both orders of every
    positive pair (i, j); sim is the cosine.

    Args:
        temperature: T.
        runtime: with several processes, the object whose `gather` and `rank` bring the other processes' views as
            further negatives. Each process returns the mean over its own rows; the mean over processes is the loss of
            the whole batch, and since gathering is differentiable so are the gradients.
    """

    def __init__(self, temperature: float = 0.5, runtime: Any = None) -> None:
        super().__init__()
        self.temperature, self.runtime = temperature, runtime

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """first and second (B, d), rows of equal index being views of one image -> the loss, a scalar."""
        first, second = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
        count, offset, every_first, every_second = len(first), 0, first, second
        if self.runtime is not None and self.runtime.world > 1:
            every_first, every_second = self.runtime.gather(first), self.runtime.gather(second)
            offset = self.runtime.rank * count
        keys = torch.cat([every_first, every_second])
        own = torch.arange(count, device=first.device) + offset
        itself = torch.cat([own, own + len(every_first)])
        positive = torch.cat([own + len(every_first), own])
        logits = torch.cat([first, second]) @ keys.T / self.temperature
        return F.cross_entropy(logits.scatter(1, itself[:, None], float("-inf")), positive)


class ProjectionHead(nn.Sequential):
    """g: a perceptron that is thrown away after training (sec. 4.2), (B, in_features) -> (B, out_features).

    As in the released code, every layer is followed by batch norm, and the last one has neither bias nor ReLU; the
    paper's text shows only W2 ReLU(W1 h). Weights are drawn from N(0, 0.01^2), as there.
    """

    def __init__(self, in_features: int, out_features: int = 128, layers: int = 2) -> None:
        parts: list[nn.Module] = []
        for i in range(layers):
            last = i == layers - 1
            linear = nn.Linear(in_features, out_features if last else in_features, bias=False)
            nn.init.normal_(linear.weight, std=0.01)
            norm = nn.BatchNorm1d(linear.out_features)
            if last:  # scale but no shift: the code's center=False
                norm.bias.requires_grad_(False)
            parts += [linear, norm] if last else [linear, norm, nn.ReLU(inplace=True)]
        super().__init__(*parts)


# ---------------------------------------------------------------------------------------------------------------------
# Colour distortion and blur (appendix A), for whole batches of float images in [0, 1]


def _jitter(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """One of brightness, contrast, saturation (0, 1, 2) an image, scaled by its factor; kind (B,), factor (B,)."""
    grey = _luminance(images)
    black, mean = torch.zeros_like(grey), grey.mean((2, 3), keepdim=True)
    towards = torch.where(_column(kind == 0), black, torch.where(_column(kind == 1), mean, grey))
    return torch.lerp(towards.expand_as(images), images, _column(factor)).clamp(0, 1)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _luminance(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor([0.2989, 0.587, 0.114], device=images.device)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue of RGB images (B, 3, H, W) in [0, 1] by `turn` (B,) full circles, in HSV space."""
    value, channel = images.max(1)
    chroma = value - images.amin(1)
    red, green, blue = images.unbind(1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    sector = torch.stack([(green - blue) / safe % 6, (blue - red) / safe + 2, (red - green) / safe + 4])
    hue = sector.gather(0, channel[None])[0] / 6 + turn[:, None, None]

    def channel_of(n: int) -> Tensor:
        k = (n + hue * 6) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel_of(5), channel_of(3), channel_of(1)], 1).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Separable blur with a sigma for each image; images (B, C, H, W), sigma (B,). The border counts as black."""
    radius = kernel_size // 2
    x = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-(x**2) / (2 * sigma[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    batch, channels, height, width = images.shape
    kernel = kernel.repeat_interleave(channels, 0)[:, None]
    flat = images.reshape(1, batch * channels, height, width)
    flat = F.conv2d(flat, kernel[:, :, None], padding=(0, radius), groups=batch * channels)
    flat = F.conv2d(flat, kernel[:, :, :, None], padding=(radius, 0), groups=batch * channels)
    return flat.reshape(images.shape)


class ColourDistortion(nn.Module):
    """Colour jitter with probability 0.8, greyscale with 0.2, blur with 0.5 (appendix A).

    Args:
        strength: s; brightness, contrast and saturation vary by 0.8 s, hue by 0.2 s. Paper: 1; on CIFAR 0.5.
        blur: whether to blur, with a kernel of 10 % of the side and sigma in [0.1, 2]. Paper: not on CIFAR.

    The four jitters follow each other in random order. Images of another number of channels than 3 have no hue and no
    saturation; there the two are skipped.
    """

    noise = 12

    def __init__(self, strength: float = 1.0, blur: bool = True) -> None:
        super().__init__()
        self.strength, self.blur = strength, blur

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images (B, C, H, W) float in [0, 1], noise (B, 12) uniform in [0, 1) -> the same shape and range."""
        noise = torch.rand(len(images), self.noise) if noise is None else noise
        noise = noise.to(images.device)
        jittered, coloured = images, images.shape[1] == 3
        order = noise[:, :4].argsort(1)
        amount = 2 * noise[:, 4:8] - 1  # brightness, contrast, saturation, hue
        factor = (1 + 0.8 * self.strength * amount[:, :3]).clamp(min=0)
        turn = 0.2 * self.strength * amount[:, 3]
        for place in range(4):
            kind = order[:, place]
            scaled = _jitter(jittered, kind, factor.gather(1, kind.clamp(max=2)[:, None])[:, 0])
            usable = (kind < 3) if coloured else (kind < 2)
            turned = turn_hue(jittered, turn) if coloured else jittered
            jittered = torch.where(_column(usable), scaled, torch.where(_column(kind == 3), turned, jittered))
        images = torch.where(_column(noise[:, 8] < 0.8), jittered, images)
        if coloured:
            images = torch.where(_column(noise[:, 9] < 0.2), _luminance(images).expand_as(images), images)
        if self.blur:
            size = max(3, images.shape[-2] // 10 // 2 * 2 + 1)
            blurred = gaussian_blur(images, 0.1 + 1.9 * noise[:, 11], size)
            images = torch.where(_column(noise[:, 10] < 0.5), blurred, images)
        return images


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: SGD with momentum whose step for each tensor is trust * |w| / |g + wd w|.

    As SimCLR's code, unlike You et al.: weight decay is part of the gradient *before* its norm is taken, and the
    learning rate multiplies the gradient on its way *into* the momentum. A group with `adapt=False` takes plain steps (trust 1):
    biases and batch norm, which also go without weight decay; `lars_groups` makes the two groups.

    Args:
        trust: eta, the trust coefficient.
        nesterov: look ahead along the momentum.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        nesterov: bool = False,
        adapt: bool = True,
    ) -> None:
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}.items():
            if value < 0:
                raise ValueError(f"{name} is {value}; it must not be negative")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults | {"nesterov": nesterov, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad.add(p, alpha=group["weight_decay"])
                rate = torch.as_tensor(group["lr"], dtype=p.dtype, device=p.device)
                if group["adapt"]:
                    weight_norm, gradient_norm = whole_norm(p), whole_norm(gradient)
                    ratio = group["trust"] * weight_norm / gradient_norm
                    rate = rate * torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                velocity = state["momentum"].mul_(group["momentum"]).add_(gradient * rate)
                p.sub_(velocity * group["momentum"] + gradient * rate if group["nesterov"] else velocity)
        return loss


def whole_norm(tensor: Tensor) -> Tensor:
    """The Euclidean norm of a whole tensor, also of one that is sharded over ranks."""
    norm = torch.linalg.vector_norm(tensor)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def lars_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict]:
    """Parameter groups: matrices and kernels; then vectors (biases, batch norm), neither decayed nor adapted."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """The learning rate's factor: a straight line up to 1 at `warmup`, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


# ---------------------------------------------------------------------------------------------------------------------
# What the features are worth


@torch.inference_mode(False)  # a layer made in inference mode could not learn
def linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, decay: float = 1e-4, iterations: int = 200
) -> nn.Linear:
    """Multinomial logistic regression on frozen features by L-BFGS with an L2 penalty (appendix B.8); features (N, d).

    Returns a layer that takes the *given* features: their standardisation is folded into it.
    """
    features, labels = features.detach().float().clone(), labels.clone()
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    standard = (features - mean) / scale
    layer = nn.Linear(features.shape[1], num_classes).to(features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(standard), labels) + 0.5 * decay * layer.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        layer.weight /= scale
        layer.bias -= layer.weight @ mean
    return layer.requires_grad_(False)


def nearest_neighbours(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Weighted vote of the most similar rows; features (N, d), labels (N,), queries (Q, d) -> classes (Q,) int64.

    A neighbour with cosine s counts exp(s / temperature), the protocol of Wu et al., "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", 2018 (sec. 3.4).
    """
    bank = F.normalize(features.float(), dim=1).T
    answers = []
    for some in queries.float().split(1024):
        similarity, index = (F.normalize(some, dim=1) @ bank).topk(min(neighbours, len(features)), dim=1)
        weights = ((similarity - 1) / temperature).exp()  # 1: a factor that all share, against overflow
        answers.append((F.one_hot(labels[index], num_classes) * weights[..., None]).sum(1).argmax(1))
    return torch.cat(answers)
