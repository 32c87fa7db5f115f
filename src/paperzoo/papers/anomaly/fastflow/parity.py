"""FastFlow against the answers of anomalib and FrEIA (see `golden.py`), the brute-force Jacobian, and its own inverse."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.first_stages import FirstStages
from paperzoo.engine.parity import Case
from paperzoo.papers.anomaly.fastflow import golden, model
from paperzoo.papers.anomaly.padim.parity import Hooked
from paperzoo.papers.classification.resnet.model import resnet18


def cases() -> Iterator[Case]:
    import torchvision
    from safetensors.torch import load_file

    # -- anomalib and FrEIA: the same from the same weights and features
    answers, peer = load_file(str(golden.FILE)), "anomalib 2.7.0, FrEIA 0.2"
    inputs, flows = golden.features(), [_golden_flow(shape[1]) for shape in golden.SHAPES]
    outputs = [flow(x) for flow, x in zip(flows, inputs, strict=True)]
    for level, (flow, x, (z, log_determinant)) in enumerate(zip(flows, inputs, outputs, strict=True)):
        loss = model.flow_loss([z], [log_determinant])
        first = flow.steps[0]
        gradients = torch.autograd.grad(loss, [first.global_scale, first.subnet[0].weight], retain_graph=True)
        ours = {"z": z, "log_determinant": log_determinant, "inverse": flow.inverse(z)}
        ours |= {"gradient.scale": gradients[0], "gradient.kernel": gradients[1]}
        yield Case(f"flow over {x.shape[1]} channels", lambda ours=ours: ours, lambda level=level, ours=ours: {n: answers[f"{level}.{n}"] for n in ours},
                   (), peer)  # fmt: skip
        yield Case(f"x returns from z, {x.shape[1]} channels", lambda y, flow=flow: flow.inverse(flow(y)[0]), lambda y: y, (x,),
                   "the identity")  # fmt: skip
        yield Case(f"z returns from x, {x.shape[1]} channels", lambda y, flow=flow: flow(flow.inverse(y))[0], lambda y: y, (x,),
                   "the identity")  # fmt: skip
    z, log_determinants = zip(*outputs, strict=True)
    yield Case("loss and map", lambda: {"loss": model.flow_loss(z, log_determinants), "map": model.likelihood_map(z, golden.SIZE)},
               lambda: {"loss": answers["loss"], "map": answers["map"]}, (), peer)  # fmt: skip
    official = _official(flows, answers)
    read = model.from_official(official)
    wanted = {f"flows.{i}.{name}": value for i, flow in enumerate(flows) for name, value in flow.state_dict().items()}
    yield Case("a checkpoint's names and permutations", lambda: {n: v for n, v in read.items() if n.startswith("flows.")},
               lambda: wanted, (), peer)  # fmt: skip

    # -- the determinant
    torch.manual_seed(0)
    for channels, side in ((5, 3), (6, 2)):
        flow = _lively(model.Flow2d(channels, steps=3)).double()
        x = torch.randn(2, channels, side, side, dtype=torch.float64)
        yield Case(f"log-determinant, {channels * side**2} dimensions", lambda x, flow=flow: flow(x)[1],
                   lambda x, flow=flow: _brute_force(flow, x), (x,), "slogdet of the whole Jacobian", atol=1e-9)  # fmt: skip
    small = _lively(model.Flow2d(2, steps=2)).double()
    yield Case("the density sums to one", lambda: _mass(small), lambda: torch.tensor(1.0, dtype=torch.float64), (),
               "eq. 1 summed over a grid in the plane", rtol=1e-3)  # fmt: skip

    # -- the network
    tv = f"torchvision {torchvision.__version__.split('+')[0]}"
    for name, size in (("resnet18", 64), ("wide_resnet50_2", 32)):
        reference = getattr(torchvision.models, name)().eval()
        ours = getattr(model, f"fastflow_{name}")(image_size=size, steps=2, hidden_ratio=0.25).eval()
        ours.load_backbone(reference.state_dict())
        for flow in ours.flows:
            _lively(flow)
        with torch.no_grad():
            for value in ours.norms.parameters():
                value.add_(0.3 * torch.randn_like(value))
        x = torch.randn(2, 3, size, size)
        yield Case(f"{name}: image to map", ours, _Literal(reference, ours), (x,), f"{tv}, and the flow's equations in loops over steps",
                   note="layer norms and flows with perturbed weights")  # fmt: skip
    network = model.FastFlow(FirstStages(resnet18()), image_size=32, steps=2).train()
    yield Case("training leaves the backbone alone", lambda: _trained(network), lambda: {"moved": 0.0, "gradients": 0.0}, (),
               "frozen weights and statistics")  # fmt: skip


@torch.no_grad()
def _lively(part: nn.Module) -> nn.Module:
    """Weights away from where they start, so that scales, offsets and couplings matter."""
    for name, value in part.named_parameters():
        amount = 0.5 if "scale" in name else 0.3 if value.ndim == 4 and len(value) == 1 else 1 / value[0].numel() ** 0.5
        value.add_(amount * torch.randn_like(value))
    return part


def _golden_flow(channels: int) -> model.Flow2d:
    flow = model.Flow2d(channels, golden.STEPS, hidden_ratio=golden.RATIO)
    golden.write_weights({name.removeprefix("steps."): value for name, value in flow.named_parameters()})
    for i, step in enumerate(flow.steps):
        step.permutation.copy_(golden.order(channels, i))
        step.inverse_permutation.copy_(step.permutation.argsort())
    return flow


def _official(flows: list[model.Flow2d], answers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under anomalib's names, with its matrices for permutations."""
    state = {"model.feature_extractor.conv1.weight": torch.zeros(1), "model.norms.0.weight": torch.zeros(1)}
    for i, flow in enumerate(flows):
        for j, step in enumerate(flow.steps):
            place = f"model.fast_flow_blocks.{i}.module_list.{j}."
            state |= {place + name: value.detach() for name, value in step.named_parameters()}
            matrix = answers[f"{i}.w_perm.{j}"]
            state |= {place + "w_perm": matrix, place + "w_perm_inv": matrix.transpose(0, 1)}
    return state


def _brute_force(flow: model.Flow2d, x: Tensor) -> Tensor:
    def one(flat: Tensor) -> Tensor:
        return flow(flat.view(1, *x.shape[1:]))[0].flatten()

    return torch.stack([torch.linalg.slogdet(torch.autograd.functional.jacobian(one, row.flatten()))[1] for row in x])


def _mass(flow: model.Flow2d) -> Tensor:
    """The density of a map of two channels and one place, summed over a fine grid."""
    step = 0.05
    axis = torch.arange(-15, 15, step, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)[:, :, None, None]
    with torch.no_grad():
        z, log_determinant = flow(points)
    log_density = -0.5 * z.square().sum((1, 2, 3)) - torch.log(torch.tensor(2 * torch.pi)) + log_determinant
    return log_density.exp().sum() * step**2


def _step_by_equations(step: model.FlowStep, x: Tensor) -> Tensor:
    half = (x.shape[1] + 1) // 2
    first, _, second = step.subnet
    same = first.kernel_size[0] // 2
    hidden = F.conv2d(x[:, :half], first.weight, first.bias, padding=same).clamp_min(0)
    a = F.conv2d(hidden, second.weight, second.bias, padding=same) / 10
    active = x.shape[1] - half
    moved = x[:, half:] * torch.exp(step.clamp * torch.tanh(a[:, :active])) + a[:, active:]
    y = torch.cat([x[:, :half], moved], 1)
    scale = 0.1 * 2 * torch.log1p(torch.exp(0.5 * step.global_scale))
    y = y * scale + step.global_offset
    return torch.stack([y[:, int(c)] for c in step.permutation], 1)


class _Literal(nn.Module):
    def __init__(self, reference: nn.Module, ours: model.FastFlow) -> None:
        super().__init__()
        self.reference, self.ours = reference, [ours]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        network, heat = self.reference, 0.0
        maps = Hooked(network, (network.layer1, network.layer2, network.layer3))(x)
        for flow, norm, y in zip(self.ours[0].flows, self.ours[0].norms, maps, strict=True):
            mean, variance = y.mean((1, 2, 3), keepdim=True), y.var((1, 2, 3), correction=0, keepdim=True)
            y = (y - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
            for step in flow.steps:
                y = _step_by_equations(step, y)
            likely = (-(y**2).sum(1) / (2 * y.shape[1])).exp()[:, None]
            heat = heat - F.interpolate(likely, size=x.shape[-2:], mode="bilinear", align_corners=False)[:, 0] / len(
                maps
            )
        return {"map": heat, "score": heat.flatten(1).max(1).values}


def _trained(network: model.FastFlow) -> dict[str, float]:
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    network.loss(torch.randn(2, 3, 32, 32)).backward()
    moved = sum(float((value - before[name]).abs().sum()) for name, value in network.backbone.state_dict().items())
    reached = sum(parameter.grad is not None for parameter in network.backbone.parameters())
    return {"moved": moved, "gradients": float(reached)}
