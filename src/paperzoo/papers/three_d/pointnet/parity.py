"""PointNet against figure 2 written out from the paper, the PyTorch port's networks written out channel by channel, and table 6."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.three_d.pointnet import model as pointnet

PORT = "the PyTorch port's layers, channels first"
WIDE = {"dtype": torch.float64}  # lively alignment matrices make large numbers, whose rounding would hide little


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from published()
    yield from port()
    yield from identities()
    for name, millions, work in (("pointnet_cls", 3.5, 440), ("pointnet_vanilla", 0.8, 148)):
        yield Case(f"{name}: cost", lambda n=name, m=millions, w=work: [a / b for a, b in zip(cost(n), (m, w), strict=True)],
                   lambda: [1.0, 1.0], (), "table 6: parameters, multiply-adds at 1,024 points, as shares", rtol=0.03, atol=0)  # fmt: skip


def lively(network: nn.Module) -> nn.Module:
    """As after some training: alignment networks that turn, norms that do something."""
    for name, p in network.named_parameters():
        if "bn" in name:
            nn.init.uniform_(p, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(p, std=0.2)
        elif p.ndim == 2:  # kept in size from layer to layer, or a bias would be all that is compared
            nn.init.kaiming_normal_(p) if p.any() else nn.init.normal_(p, std=0.02)
    for name, b in network.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(b, std=0.2)
        elif name.endswith("running_var"):
            nn.init.uniform_(b, 0.5, 1.5)
    return network


# -- written out ---------------------------------------------------------------------------------------------------------


class Written:
    """Layers by name, from a state; channels first, as (B, C, N), one set function after the other."""

    def __init__(self, network: nn.Module, training: bool = False) -> None:
        self.w, self.training = dict(network.named_parameters()) | dict(network.named_buffers()), training

    def norm(self, x: Tensor, name: str) -> Tensor:
        axes = (0, 2) if x.ndim == 3 else (0,)
        shape = (1, -1, 1) if x.ndim == 3 else (1, -1)
        if self.training:
            mean, variance = x.mean(axes), x.var(axes, unbiased=False)
        else:
            mean, variance = self.w[f"{name}.running_mean"], self.w[f"{name}.running_var"]
        x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
        return x * self.w[f"{name}.weight"].view(shape) + self.w[f"{name}.bias"].view(shape)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return F.conv1d(x, weight[:, :, None], bias) if x.ndim == 3 else F.linear(x, weight, bias)

    def block(self, x: Tensor, layer: str, norm: str) -> Tensor:
        return F.relu(self.norm(self.linear(x, layer), norm))

    def tnet(self, x: Tensor, at: str, depth: int = 3) -> Tensor:
        for i in range(1, depth + 1):
            x = self.block(x, f"{at}.conv{i}", f"{at}.bn{i}")
        x = x.max(2)[0]
        for j in (1, 2):
            x = self.block(x, f"{at}.fc{j}", f"{at}.bn{depth + j}")
        x = self.linear(x, f"{at}.fc3")
        k = int(x.shape[1] ** 0.5)
        return (x + torch.eye(k, dtype=x.dtype).flatten()).view(-1, k, k)

    def turn(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Each point as a row vector times its cloud's matrix."""
        k = matrix.shape[1]
        return torch.cat([torch.einsum("bin,bij->bjn", x[:, :k], matrix), x[:, k:]], 1)

    def encoder(self, x: Tensor, before: int, after: int, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
        x = self.turn(x, self.tnet(x, "feat.stn"))
        for i in range(1, before + 1):
            x = self.block(x, f"feat.conv{i}", f"feat.bn{i}")
        matrix = self.tnet(x, "feat.fstn")
        local = x = self.turn(x, matrix)
        for i in range(before + 1, before + after + 1):
            x = self.norm(self.linear(x, f"feat.conv{i}"), f"feat.bn{i}")
            x = F.relu(x) if relu or i < before + after else x
        return x.max(2)[0], local, matrix


def result(network: nn.Module, logits: Tensor, matrix: Tensor) -> Tensor | dict[str, Tensor]:
    return {"out": logits, "transform": matrix} if network.training else logits


def classifier(network: nn.Module, before: int, after: int, relu: bool) -> Callable:
    def forward(x: Tensor) -> Tensor | dict[str, Tensor]:
        net = Written(network, network.training)
        found, _, matrix = net.encoder(x.transpose(1, 2), before, after, relu)
        found = net.block(net.block(found, "fc1", "bn1"), "fc2", "bn2")
        return result(network, net.linear(found, "fc3"), matrix)

    return forward


def segmenter(network: nn.Module, before: int, after: int, relu: bool, depth: int) -> Callable:
    def forward(x: Tensor) -> Tensor | dict[str, Tensor]:
        net = Written(network, network.training)
        found, local, matrix = net.encoder(x.transpose(1, 2), before, after, relu)
        y = torch.cat([found[:, :, None].expand(-1, -1, x.shape[1]), local], 1)
        for i in range(1, depth + 1):
            y = net.block(y, f"conv{i}", f"bn{i}")
        return result(network, net.linear(y, f"conv{depth + 1}").transpose(1, 2), matrix)

    return forward


def part_segmenter(network: nn.Module, tnet_depth: int, relu: bool, categories: int) -> Callable:
    def forward(x: Tensor, category: Tensor) -> Tensor | dict[str, Tensor]:
        net = Written(network, network.training)
        y = x.transpose(1, 2)
        y = net.turn(y, net.tnet(y, "stn"))
        outs = []
        for i in (1, 2, 3):
            y = net.block(y, f"conv{i}", f"bn{i}")
            outs.append(y)
        matrix = net.tnet(y, "fstn", tnet_depth)
        outs.append(net.block(net.turn(y, matrix), "conv4", "bn4"))
        last = net.norm(net.linear(outs[-1], "conv5"), "bn5")
        outs.append(F.relu(last) if relu else last)
        shared = torch.cat([outs[-1].max(2)[0], F.one_hot(category, categories).to(x)], 1)
        y = torch.cat([shared[:, :, None].expand(-1, -1, x.shape[1]), *outs], 1)
        for i in (1, 2, 3):
            y = net.block(y, f"convs{i}", f"bns{i}")
        return result(network, net.linear(y, "convs4").transpose(1, 2), matrix)

    return forward


def published() -> Iterator[Case]:
    figure = "figure 2 written out, channels first"
    small = {"num_classes": 5, "drop_rate": 0.0}
    for channels, shape in ((3, (2, 40)), (6, (3, 33))):
        net = lively(pointnet.pointnet_cls(**small, in_channels=channels)).double().eval()
        yield Case(f"pointnet_cls, {channels} channels, {shape}", net, classifier(net, 2, 3, True),
                   (torch.randn(*shape, channels, **WIDE),), figure)  # fmt: skip
    net = lively(pointnet.pointnet_cls(**small)).double().train()
    x = torch.randn(6, 24, 3, **WIDE)
    yield Case("pointnet_cls, a training step", loss_of(net, net), loss_of(net, classifier(net, 2, 3, True)), (x,),
               f"{figure}, with eq. (2)")  # fmt: skip
    net = lively(pointnet.pointnet_seg(7)).double().eval()
    yield Case("pointnet_seg", net, segmenter(net, 2, 3, True, 4), (torch.randn(2, 50, 9, **WIDE),), figure)
    net = lively(pointnet.pointnet_part_seg(6, 3, 4)).double().eval()
    yield Case("pointnet_part_seg", net, part_segmenter(net, 2, True, 4),
               (torch.randn(3, 30, 3, **WIDE), torch.tensor([0, 3, 1])), "supplement's figure written out")  # fmt: skip


def loss_of(network: nn.Module, forward: Callable) -> Callable:
    """Loss of a training step with eq. (2) written out, and every parameter's gradient."""

    def step(x: Tensor) -> dict:
        output = forward(x)
        matrix = output["transform"]
        away = torch.eye(matrix.shape[1], dtype=x.dtype) - matrix @ matrix.mT
        regular = torch.stack([(m * m).sum() for m in away]).mean()
        if forward is network:
            regular = pointnet.orthogonality(matrix)
        loss = F.cross_entropy(output["out"], torch.arange(len(x)) % 5) + 0.001 * regular
        names, parameters = zip(*network.named_parameters(), strict=True)
        return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}

    return step


def port() -> Iterator[Case]:
    for channels in (3, 6):
        net = lively(pointnet.pointnet_cls_port(5, channels, 0.0)).double().eval()
        yield Case(f"pointnet_cls_port, {channels} channels", reloaded(net, lambda c=channels: pointnet.pointnet_cls_port(5, c)),
                   classifier(net, 1, 2, False), (torch.randn(2, 40, channels, **WIDE),), PORT)  # fmt: skip
    net = lively(pointnet.pointnet_sem_seg_port(7)).double().eval()
    yield Case("pointnet_sem_seg_port", reloaded(net, lambda: pointnet.pointnet_sem_seg_port(7)),
               segmenter(net, 1, 2, False, 3), (torch.randn(2, 40, 9, **WIDE),), PORT)  # fmt: skip
    net = lively(pointnet.pointnet_part_seg_port(6, 6, 4)).train()
    inputs = (torch.randn(4, 30, 6, **WIDE), torch.tensor([0, 3, 1, 2]))
    net = net.double()
    yield Case("pointnet_part_seg_port, training", net, part_segmenter(net, 3, False, 4), inputs, PORT, gradients=True)


def reloaded(network: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """Loaded from a file as the port writes it: kernels with an axis more where it convolves."""
    state = {k: v[:, :, None] if k.endswith("weight") and "conv" in k else v for k, v in network.state_dict().items()}
    fresh = make().double().eval()
    fresh.load_state_dict(pointnet.from_official(state))
    return fresh


def identities() -> Iterator[Case]:
    net = lively(pointnet.pointnet_cls(5)).eval()
    x = torch.randn(2, 60, 3)
    order = torch.randperm(60)
    yield Case("the order of points does not matter", net, lambda x: net(x[:, order]), (x,), "sec. 4.2, eq. (1)")
    yield Case("points that come twice do not matter", net, lambda x: net(torch.cat([x, x[:, :20]], 1)), (x,),
               "eq. (1)")  # fmt: skip

    def from_critical(x: Tensor) -> list[Tensor]:
        encoder = net.feat
        local = encoder.local(x)[0]  # the alignment networks see all points, as theorem 2's h is fixed
        kept = pointnet.critical_points(encoder, x)
        return [F.relu(encoder.before_maximum(a[k][None]).amax(1)[0]) for a, k in zip(local, kept, strict=True)]

    yield Case("the critical points alone give the same feature", lambda x: list(net.feat(x)[0]), from_critical, (x,),
               "theorem 2")  # fmt: skip
    q = torch.linalg.qr(torch.randn(3, 8, 8))[0]
    yield Case("eq. (2) of orthogonal and of doubled matrices",
               lambda: [pointnet.orthogonality(q), pointnet.orthogonality(2 * torch.eye(4)[None])],
               lambda: [0.0, 4 * 9.0], (), "||I - 4 I||^2 = 9 k")  # fmt: skip


def cost(name: str) -> list[float]:
    """Millions of parameters, and of multiply-adds of one cloud of 1,024 points."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = getattr(pointnet, name)().eval()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            net(torch.empty(1, 1024, 3))
    return [sum(p.numel() for p in net.parameters()) / 1e6, counter.get_total_flops() / 2e6]


# -- speed ---------------------------------------------------------------------------------------------------------------


class PortTNet(nn.Module):
    """The port's layers as modules, for `pairs`."""

    def __init__(self, channels: int, k: int) -> None:
        super().__init__()
        self.k = k
        widths = (channels, 64, 128, 1024)
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in ((1024, 512), (512, 256), (256, k * k)))
        self.norms = nn.ModuleList(nn.BatchNorm1d(w) for w in (64, 128, 1024, 512, 256))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms[:3], strict=True):
            x = F.relu(norm(conv(x)))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 1024)
        for fc, norm in zip(self.fcs[:2], self.norms[3:], strict=True):
            x = F.relu(norm(fc(x)))
        eye = torch.eye(self.k, device=x.device).flatten().repeat(len(x), 1)
        return (self.fcs[2](x) + eye).view(-1, self.k, self.k)


class PortClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stn, self.fstn = PortTNet(3, 3), PortTNet(64, 64)
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in ((3, 64), (64, 128), (128, 1024)))
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in ((1024, 512), (512, 256), (256, 40)))
        self.norms = nn.ModuleList(nn.BatchNorm1d(w) for w in (64, 128, 1024, 512, 256))
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(2, 1)
        x = torch.bmm(x.transpose(2, 1), self.stn(x)).transpose(2, 1)
        x = F.relu(self.norms[0](self.convs[0](x)))
        x = torch.bmm(x.transpose(2, 1), self.fstn(x)).transpose(2, 1)
        x = self.norms[2](self.convs[2](F.relu(self.norms[1](self.convs[1](x)))))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 1024)
        x = F.relu(self.norms[3](self.fcs[0](x)))
        x = F.relu(self.norms[4](self.drop(self.fcs[1](x))))
        return F.log_softmax(self.fcs[2](x), 1)


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    return {
        "pointnet_cls_port": Pair(
            lambda: pointnet.pointnet_cls_port(40, 3),
            PortClassifier,
            lambda batch: (torch.randn(batch, 1024, 3),),
            "the PyTorch port's layers",
            train_batch=8,
        )
    }
