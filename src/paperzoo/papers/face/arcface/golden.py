"""Writes `golden.safetensors`: what the authors' `iresnet.py` answers for weights and pictures that can be written down.

    python -m paperzoo.papers.face.arcface.golden path/to/insightface/recognition/arcface_torch/backbones/iresnet.py

(commit 7fadd420 was used). `parity.py` makes the same weights and pictures by the same rule and compares. All in float64.
"""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
SMALL = 48  # pixels of the training step's pictures; the linear layer is made for the map of 3 x 3


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).reshape(shape)


@torch.no_grad()
def write_weights(model: nn.Module) -> nn.Module:
    """Every parameter and buffer filled with `noise`, by the order of the names; in float64."""
    state = model.double().state_dict()
    for phase, name in enumerate(sorted(state)):
        value = state[name]
        if not value.is_floating_point():
            continue
        values = noise(tuple(value.shape), phase) - 0.5
        if value.ndim > 1:
            value.copy_(values * 3.4 / value[0].numel() ** 0.5)
        elif name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "features.weight")):
            value.copy_(1 + values)
        else:
            value.copy_(0.5 * values)
    return model


def names_and_shapes(model: nn.Module) -> Tensor:
    """A checksum over the names and shapes of the state, in order, and their number: float64 (2,)."""
    text = "\n".join(f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items())
    return torch.tensor([float(zlib.crc32(text.encode())), float(len(model.state_dict()))], dtype=torch.float64)


def pictures(batch: int, size: int) -> Tensor:
    return 2 * noise((batch, 3, size, size), 0.3) - 1


def training_step(model: nn.Module) -> dict[str, Tensor]:
    """Outputs, a loss, for every parameter its gradient's norm and its product with `noise`, and the running statistics' sums."""
    model.train()
    outputs = model(pictures(5, SMALL))
    loss = (outputs * noise(tuple(outputs.shape), 7.0)).sum()
    loss.backward()
    learned = [(n, p.grad) for n, p in sorted(model.named_parameters()) if p.grad is not None]
    gradients = [[float(g.norm()), float((g * (noise(tuple(g.shape), 1.0) - 0.5)).sum())] for _, g in learned]
    running = [float(v.sum()) for n, v in sorted(model.state_dict().items()) if "running" in n]
    return {
        "outputs": outputs.detach(),
        "loss": loss.detach(),
        "gradients": torch.tensor(gradients, dtype=torch.float64),
        "running": torch.tensor(running, dtype=torch.float64),
    }


def answers(make: Callable[[str], nn.Module], make_small: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """`make(name)`: a network of the full size; `make_small()`: iresnet18 for pictures of `SMALL` pixels, 64 features."""
    found = {}
    for name in ("iresnet34", "iresnet100"):
        with torch.device("meta"):
            model = make(name)
        found[f"{name}.state"] = names_and_shapes(model)
    for name, batch in (("iresnet18", 3), ("iresnet50", 1)):
        model = write_weights(make(name)).eval()
        with torch.inference_mode():
            found[f"{name}.eval"] = model(pictures(batch, 112))
    return found | {f"step.{name}": value for name, value in training_step(write_weights(make_small())).items()}


def main(path: str) -> None:
    from safetensors.torch import save_file

    spec = importlib.util.spec_from_file_location("iresnet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def small() -> nn.Module:
        module.IResNet.fc_scale = (SMALL // 16) ** 2
        return module.iresnet18(num_features=64)

    save_file(answers(lambda name: getattr(module, name)(), small), str(FILE))


if __name__ == "__main__":
    main(sys.argv[1])
