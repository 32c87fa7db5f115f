"""DCN V2 against deepctr-torch, torch-rechub, loops over single numbers, and the polynomial theorem."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.recommendation.dcn_v2.model import (
    CrossLayer,
    CrossNetwork,
    LowRankCrossLayer,
    MixtureCrossLayer,
    dcn_mix_parallel,
    dcn_mix_stacked,
    dcn_v2_parallel,
    dcn_v2_stacked,
)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from libraries()
    yield from slow_loops()
    yield from theorem()
    yield Case(
        name="parameters without embeddings at the sizes of the paper's Criteo models, in millions",
        ours=lambda: {
            "stacked": round(without_table(dcn_v2_stacked), 1),
            "parallel": round(without_table(dcn_v2_parallel), 1),
            "mixture": round(without_table(dcn_mix_stacked) - 2 * 4 * 64**2 / 1e6, 1),
        },
        reference=lambda: {"stacked": 3.5, "parallel": 3.5, "mixture": 2.4},
        against="paper, table of Criteo results: 3.5M (DCN-V2), 2.4M (DCN-Mix)",
        note="2 cross layers, MLP 768-768, d = 26 * 39 + 13 = 1027; the mixture counted without its C matrices",
    )


def libraries() -> Iterator[Case]:
    from deepctr_torch.layers import CrossNet, CrossNetMix
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.basic.layers import CrossNetMix as RechubMix
    from torch_rechub.models.ranking.dcn_v2 import DCNv2

    deepctr, rechub = f"deepctr-torch {version('deepctr-torch')}", f"torch-rechub {version('torch-rechub')}"
    for width, layers, batch in ((5, 1, 2), (24, 3, 9), (1027, 2, 4)):
        ours = CrossNetwork(width, layers)
        theirs = CrossNet(width, layers, parameterization="matrix")
        with torch.no_grad():
            for i, layer in enumerate(ours.layers):
                layer.linear.bias.normal_()
                theirs.kernels[i].copy_(layer.linear.weight)
                theirs.bias[i].copy_(layer.linear.bias.unsqueeze(1))
        yield Case(
            f"cross network, full matrices, d={width}, {layers} layers",
            ours.double(),
            theirs.double(),
            (torch.randn(batch, width, dtype=torch.float64),),
            f"{deepctr} CrossNet(matrix)",
            gradients=True,
        )
    for width, layers, rank, experts in ((24, 3, 4, 3), (13, 1, 13, 2)):
        ours = CrossNetwork(width, layers, rank, experts)
        theirs, rechub_mix = CrossNetMix(width, rank, experts, layers), RechubMix(width, layers, rank, experts)
        with torch.no_grad():
            for i, layer in enumerate(ours.layers):
                layer.bias.normal_()
                layer.gate.weight.copy_(ours.layers[0].gate.weight)
                for mine, deepctr_list, rechub_list in (
                    (layer.u, theirs.U_list, rechub_mix.u_list),
                    (layer.v, theirs.V_list, rechub_mix.v_list),
                    (layer.c, theirs.C_list, rechub_mix.c_list),
                    (layer.bias.unsqueeze(1), theirs.bias, rechub_mix.bias),
                ):
                    deepctr_list[i].copy_(mine)
                    rechub_list[i].copy_(mine)
            for k, row in enumerate(ours.layers[0].gate.weight):
                theirs.gating[k].weight.copy_(row[None])
                rechub_mix.gating[k].weight.copy_(row[None])
        for reference, name in ((theirs, deepctr), (rechub_mix, rechub)):
            yield Case(
                f"cross network, {experts} experts of rank {rank}, d={width}, {layers} layers",
                ours.double(),
                reference.double(),
                (torch.randn(6, width, dtype=torch.float64),),
                f"{name} CrossNetMix",
                gradients=True,
                note="both libraries share one gate over all layers, so ours gets the same gate in each",
            )

    class Whole(nn.Module):
        """torch-rechub's DCNv2 with our call: logits from (dense, sparse)."""

        def __init__(self, structure: str, mixture: bool) -> None:
            super().__init__()
            self.fields = [SparseFeature(f"C{i}", n, 4) for i, n in enumerate((5, 7, 3))]
            dense = [DenseFeature(f"I{i}") for i in range(2)]
            for feature in dense:
                feature.embed_dim = 1
            options = {"dims": [8, 6], "dropout": 0.0, "activation": "relu"}
            self.net = DCNv2(self.fields + dense, 2, options, structure, mixture, low_rank=3, num_experts=2)

        def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
            columns = {f"C{i}": sparse[:, i] for i in range(3)} | {f"I{i}": dense[:, i] for i in range(2)}
            return torch.logit(self.net(columns).double()).float()

    for structure, mixture, build in (
        ("stacked", False, dcn_v2_stacked),
        ("parallel", False, dcn_v2_parallel),
        ("stacked", True, dcn_mix_stacked),
        ("parallel", True, dcn_mix_parallel),
    ):
        more = {"rank": 3, "num_experts": 2} if mixture else {}
        ours = build(num_dense=2, field_sizes=(5, 7, 3), embed_dim=4, num_cross_layers=2, hidden=(8, 6), **more).eval()
        theirs = Whole(structure, mixture).eval()
        copy_into_rechub(ours, theirs.net, theirs.fields, structure, mixture)
        yield Case(
            f"{build.__name__}, whole network",
            ours,
            theirs,
            (torch.randn(10, 2), torch.randint(0, 3, (10, 3))),
            f"{rechub} DCNv2",
            gradients=True,
            note=""
            if mixture
            else "torch-rechub adds the bias outside the product, unlike equation 1; biases are zero here",
        )


def copy_into_rechub(ours: nn.Module, theirs: nn.Module, fields: list, structure: str, mixture: bool) -> None:
    """Our weights into torch-rechub's network; batch norms, which the paper does not have, are made the identity."""
    with torch.no_grad():
        for field, rows in zip(fields, ours.embedding.table.weight.split([f.vocab_size for f in fields]), strict=True):
            theirs.embedding.embed_dict[field.name].weight.copy_(rows)
        for i, layer in enumerate(ours.cross.layers):
            if mixture:
                layer.gate.weight.copy_(ours.cross.layers[0].gate.weight)
                layer.bias.normal_()
                for name in "uvc":
                    getattr(theirs.crossnet, f"{name}_list")[i].copy_(getattr(layer, name))
                theirs.crossnet.bias[i].copy_(layer.bias.unsqueeze(1))
            else:
                theirs.crossnet.w[i].weight.copy_(layer.linear.weight)
        if mixture:
            for k, row in enumerate(ours.cross.layers[0].gate.weight):
                theirs.crossnet.gating[k].weight.copy_(row[None])
        deep = theirs.stacked_dnn if structure == "stacked" else theirs.parallel_dnn
        mine = [m for m in ours.deep if isinstance(m, nn.Linear)]
        for a, b in zip(mine, [m for m in deep.mlp if isinstance(m, nn.Linear)], strict=True):
            b.load_state_dict(a.state_dict())
        for norm in (m for m in deep.mlp if isinstance(m, nn.BatchNorm1d)):
            norm.running_var.fill_(1 - norm.eps)
        theirs.linear.fc.load_state_dict(ours.head.state_dict())


def slow_loops() -> Iterator[Case]:
    """The layers written with one number at a time."""
    d, rank, experts = 6, 2, 3
    x0, x = torch.randn(3, d, dtype=torch.float64), torch.randn(3, d, dtype=torch.float64)

    full = CrossLayer(d).double()
    nn.init.normal_(full.linear.bias)

    def full_loop(x0: Tensor, x: Tensor) -> Tensor:
        w, b = full.linear.weight, full.linear.bias
        return torch.stack([
            torch.stack([x0[n, i] * (sum(w[i, j] * x[n, j] for j in range(d)) + b[i]) + x[n, i] for i in range(d)])
            for n in range(len(x))
        ])  # fmt: skip

    low = LowRankCrossLayer(d, rank).double()
    nn.init.normal_(low.u.bias)

    def low_loop(x0: Tensor, x: Tensor) -> Tensor:
        matrix = low.u.weight @ low.v.weight  # U V^T
        return torch.stack([x0[n] * (matrix @ x[n] + low.u.bias) + x[n] for n in range(len(x))])

    mixture = MixtureCrossLayer(d, rank, experts).double()
    nn.init.normal_(mixture.bias)

    def mixture_loop(x0: Tensor, x: Tensor) -> Tensor:
        rows = []
        for n in range(len(x)):
            scores = torch.stack([mixture.gate.weight[k] @ x[n] for k in range(experts)]).exp()
            total = x[n]
            for k in range(experts):
                inner = torch.tanh(mixture.c[k] @ torch.tanh(mixture.v[k].T @ x[n]))
                total = total + scores[k] / scores.sum() * x0[n] * (mixture.u[k] @ inner + mixture.bias)
            rows.append(total)
        return torch.stack(rows)

    for name, layer, loop, equation in (
        ("full matrix", full, full_loop, "equation 1"),
        ("low rank", low, low_loop, "equation 2"),
        ("mixture", mixture, mixture_loop, "equations 3 and 4"),
    ):
        yield Case(f"{name} cross layer", layer, loop, (x0, x), f"{equation}, slow loop", True, rtol=1e-10, atol=1e-11)
    same = LowRankCrossLayer(d, d).double()
    with torch.no_grad():
        same.v.weight.copy_(torch.eye(d))
        same.u.load_state_dict(full.linear.state_dict())
    yield Case("a low-rank layer of full rank is the full layer", same, full, (x0, x), "identity", True, 1e-12, 1e-12)


def theorem() -> Iterator[Case]:
    """Along any line x = t z the network's output is a polynomial in t; L layers give degree L + 1 and no more."""
    for layers in (1, 2, 3):
        network = CrossNetwork(5, layers).double()
        for layer in network.layers:
            nn.init.normal_(layer.linear.bias)
        z = torch.randn(5, dtype=torch.float64)

        def differences(layers: int = layers, network: CrossNetwork = network, z: Tensor = z) -> dict:
            # finite differences over unit steps: order n is zero for every polynomial of degree below n
            values = network(torch.arange(layers + 3, dtype=torch.float64)[:, None] * z)
            orders = [values]
            for _ in range(layers + 2):
                orders.append(orders[-1].diff(dim=0))
            scale = orders[layers + 1].abs().max()
            return {
                "of order L + 2": orders[layers + 2].abs().max() / scale,
                "of order L + 1 vanish": float(scale < 1e-6),
            }

        yield Case(
            f"{layers} cross layers: a polynomial of degree {layers + 1} exactly",
            differences,
            lambda: {"of order L + 2": torch.tensor(0.0), "of order L + 1 vanish": 0.0},
            (),
            "theorem 4.1: an l-layer cross network is a polynomial of degree l + 1",
            atol=1e-8,
        )

    products = CrossNetwork(3, 1).double()
    with torch.no_grad():  # x1 * x2 from W = e1 e2^T - … : x0 * (W x) + x with W picking the second feature
        weight = torch.zeros(3, 3, dtype=torch.float64)
        weight[0, 1] = 1.0
        products.layers[0].linear.weight.copy_(weight)
    x = torch.tensor([[2.0, 3.0, 5.0]], dtype=torch.float64)
    yield Case(
        "worked example: W = e1 e2^T makes x1 x2 + x1 of the first feature and leaves the others",
        products,
        lambda x: torch.stack([x[:, 0] * x[:, 1] + x[:, 0], x[:, 1], x[:, 2]], 1),
        (x,),
        "hand-computed, equation 1",
    )


def without_table(build) -> float:
    with torch.device("meta"):
        model = build()
    return sum(p.numel() for n, p in model.named_parameters() if "table" not in n) / 1e6


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: the cross network at Criteo's width, 1027, for 128 rows a unit of batch."""

    def theirs() -> nn.Module:
        from deepctr_torch.layers import CrossNet

        return CrossNet(1027, 2, parameterization="matrix")

    def rows(batch: int) -> tuple[Tensor]:
        return (torch.randn(128 * batch, 1027),)

    return {"dcn_v2_cross": Pair(lambda: CrossNetwork(1027, 2), theirs, rows, "deepctr-torch:CrossNet")}
