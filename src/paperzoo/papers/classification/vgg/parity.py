"""Parity of VGG with torchvision, in evaluation and training mode, and the receptive-field argument of sec. 2.3."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.vgg import model


def cases() -> Iterator[Case]:
    import torchvision

    against = f"torchvision {torchvision.__version__}"
    torch.manual_seed(0)

    # The published size once, with its 138 million parameters; the others share every line but the plan.
    ours, reference = model.vgg16().eval(), torchvision.models.vgg16(weights=None).eval()
    ours.load_state_dict(reference.state_dict())
    yield Case(
        name="vgg16 224 eval",
        ours=ours,
        reference=reference,
        inputs=(torch.randn(1, 3, 224, 224),),
        against=f"{against} vgg16",
    )
    del ours, reference

    for name, size in (("vgg11", (32, 45)), ("vgg13", (64, 64)), ("vgg19", (33, 70))):
        for suffix in ("", "_bn"):
            ours = _stack_only(getattr(model, name + suffix), num_features=16, pool_size=2).eval()
            reference = getattr(torchvision.models, name + suffix)(
                weights=None, init_weights=False, num_classes=2
            ).features.eval()
            reference.load_state_dict(ours.state_dict())
            x = torch.randn(2, 3, *size)
            if suffix:
                ours.train(), reference.train()
            yield Case(
                name=f"{name}{suffix} conv stack, {'train' if suffix else 'eval'}, {size}",
                ours=ours,
                reference=reference,
                inputs=(x,),
                against=f"{against} {name}{suffix}.features",
                gradients=True,
            )

    # Sec. 2.3: two stacked 3x3 convolutions without a non-linearity between them are one 5x5 convolution.
    first, second = nn.Conv2d(4, 8, 3, bias=False).double(), nn.Conv2d(8, 6, 3, bias=False).double()
    fused = _compose(first.weight, second.weight)
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    yield Case(
        name="two 3x3 see what one 5x5 sees",
        ours=lambda x: second(first(x)),
        reference=lambda x: nn.functional.conv2d(x, fused),
        inputs=(x,),
        against="identity of sec. 2.3",
        rtol=1e-9,
        atol=1e-9,
    )


def _stack_only(build, **options) -> nn.Sequential:
    return build(num_classes=2, **options).features


def _compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The single kernel of conv(second) after conv(first): (D, M, 3, 3) and (M, C, 3, 3) -> (D, C, 5, 5), by loops."""
    out = torch.zeros(second.shape[0], first.shape[1], 5, 5, dtype=first.dtype)
    for i in range(3):
        for j in range(3):
            for k in range(3):
                for m in range(3):
                    out[:, :, i + k, j + m] += second[:, :, i, j] @ first[:, :, k, m]
    return out


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    from torchvision import models

    def images(batch: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 3, 224, 224),)

    return {
        "vgg11_bn": Pair(
            model.vgg11_bn, lambda: models.vgg11_bn(weights=None), images, "torchvision:vgg11_bn", train_batch=2
        )
    }
