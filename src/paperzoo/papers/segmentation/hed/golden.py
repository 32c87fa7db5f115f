"""How golden.safetensors was made: the most used PyTorch port on weights from a rule, so that none are stored.

git clone https://github.com/sniklaus/pytorch-hed FOLDER
python -m paperzoo.papers.segmentation.hed.golden FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).with_name("golden.safetensors")
WATCHED = ("netVggOne.0", "netVggThr.3", "netVggFiv.5", "netScoreOne", "netScoreFou", "netCombine.0")


def pictures() -> Tensor:
    """Two parts of photographs in red, green, blue, 0 … 1: (2, 3, 75, 106)."""
    from paperzoo.data.scenes import photographs

    person, cat = photographs()[2], photographs()[3]
    return torch.stack([person[:, 20:170:2, 80:292:2], cat[:, 40:190:2, 60:272:2]]).float() / 255


def edges() -> Tensor:
    """What counts as edges, bool (2, 75, 106): some rows and columns."""
    drawn = torch.zeros(2, 75, 106, dtype=torch.bool)
    drawn[0, ::9], drawn[1, :, ::14] = True, True
    return drawn


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the rule, for pictures whose values reach 255; a convolution's bias is drawn as a batch norm's is there."""
    from paperzoo.papers.segmentation.hed.parity import by_rule

    made = by_rule(state)
    for name in made:
        if name.endswith("VggOne.0.weight"):
            made[name] = made[name] / 80
        if "Score" in name or "Combine" in name:
            made[name] = made[name] * 2
    return made


def sampled(gradient: Tensor) -> Tensor:
    return gradient.flatten()[:: max(1, gradient.numel() // 50)].contiguous()


def main() -> None:
    import importlib.util

    from safetensors.torch import save_file

    spec = importlib.util.spec_from_file_location("run", Path(sys.argv[1]) / "run.py")
    theirs, sys.argv = importlib.util.module_from_spec(spec), sys.argv[:1]
    spec.loader.exec_module(theirs)
    torch.set_grad_enabled(True)
    torch.nn.Module.load_state_dict, kept = (lambda self, state: None), torch.nn.Module.load_state_dict
    torch.hub.load_state_dict_from_url = lambda **options: {}
    network = theirs.Network()
    torch.nn.Module.load_state_dict = kept
    network.load_state_dict(weights(network.state_dict()))
    backwards = pictures().flip(1)
    with torch.no_grad():
        stored = {"probabilities": network.eval()(backwards)[:, :, ::2, ::2].contiguous()}
    found = network.double()(backwards.double())[:, 0]
    drawn = edges()
    beta = (~drawn).sum((1, 2)) / drawn[0].numel()
    each = [
        -b * p[d].log().sum() - (1 - b) * (1 - p[~d]).log().sum() for b, p, d in zip(beta, found, drawn, strict=True)
    ]
    loss = torch.stack(each).mean()
    loss.backward()
    stored["loss"] = loss.detach()
    for name in WATCHED:
        gradient = network.get_submodule(name).weight.grad
        stored[name] = sampled(gradient.flip(1) if name == "netVggOne.0" else gradient)
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
