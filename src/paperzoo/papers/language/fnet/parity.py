"""FNet against transformers (every head, weights copied, gradients) and the Fourier transform against its definition."""

from __future__ import annotations

import cmath
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.language.fnet import model as fnet

SMALL = dict(vocab_size=97, embed_dim=24, depth=3, hidden_dim=40, max_length=16, num_types=4, pad_id=3)


class Outputs(nn.Module):
    """A network of transformers, answering with the tensors that ours answers with; its parameters keep their names."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        found = self.network(inputs[0], token_type_ids=inputs[1])
        values = tuple(found[name] for name in self.names)
        return values if len(values) > 1 else values[0]

    def named_parameters(self, *arguments, **options):
        return self.network.named_parameters(*arguments, **options)


def reference(kind: str, **changes) -> nn.Module:
    """A network of transformers with random weights everywhere, norms and biases included."""
    import transformers

    sizes = {"embed_dim": "hidden_size", "depth": "num_hidden_layers", "hidden_dim": "intermediate_size"}
    sizes |= {"max_length": "max_position_embeddings", "num_types": "type_vocab_size", "pad_id": "pad_token_id"}
    config = {sizes.get(name, name): value for name, value in SMALL.items()}
    network = getattr(transformers, kind)(transformers.FNetConfig(**(config | changes)))
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, *((0.5, 1.5) if "LayerNorm.weight" in name else (-0.2, 0.2)))
    return network


@torch.no_grad()
def cases() -> Iterator[Case]:
    import transformers

    torch.manual_seed(0)
    peer = f"transformers {transformers.__version__}"
    ids, types = torch.randint(4, 97, (3, 12)), torch.randint(0, 4, (3, 12))
    ids[1, 8:] = 3  # padding, which is mixed like any token
    states = ("last_hidden_state", "pooler_output")
    pairs = [
        ("FNetModel", fnet.FNetModel, states, {}),
        ("FNetForMaskedLM", fnet.FNetForMaskedLM, ("logits",), {}),
        ("FNetForPreTraining", fnet.FNetForPreTraining, ("prediction_logits", "seq_relationship_logits"), {}),
        ("FNetForNextSentencePrediction", fnet.FNetForNextSentencePrediction, ("logits",), {}),
        ("FNetForSequenceClassification", fnet.FNetForSequenceClassification, ("logits",), {"num_labels": 5}),
    ]
    for kind, ours, names, changes in pairs:
        theirs = reference(kind, hidden_dropout_prob=0.0, **changes)
        network = ours(drop_rate=0.0, **SMALL, **({"num_classes": 5} if changes else {}))
        network.load_state_dict(fnet.from_official(theirs.state_dict()))
        for mode in ("eval", "train"):
            both = [getattr(net, mode)() for net in (network, Outputs(theirs, names))]
            yield Case(f"{kind}, {mode}", *both, (ids, types), f"{peer} {kind}", gradients=True, atol=1e-4)
    file = {f"fnet.embeddings.{name}": torch.arange(16)[None] for name in ("position_ids", "token_type_ids")}
    theirs = reference("FNetForPreTraining")
    network = fnet.FNetForPreTraining(**SMALL).eval()
    network.load_state_dict(fnet.from_official(theirs.state_dict() | file))
    both = [network, Outputs(theirs.eval(), ("prediction_logits", "seq_relationship_logits"))]
    yield Case("a file with constant buffers", *both, (ids, types), f"{peer}, as older versions saved")
    at = torch.tensor([[0, 3], [5, 5], [11, 2]])
    slow = lambda i, t: (network(i, t)[0][torch.arange(3)[:, None], at], network(i, t)[1])  # noqa: E731
    yield Case("words at some positions", lambda i, t: network(i, t, at), slow, (ids, types), "those of all positions")
    theirs = reference("FNetModel", use_tpu_fourier_optimizations=True, tpu_short_seq_length=12)
    network = fnet.FNetModel(**SMALL, mixing="matmul").eval()
    network.load_state_dict({k: v for k, v in theirs.state_dict().items() if ".dft_mat" not in k})
    both = [network, Outputs(theirs.eval(), states)]
    yield Case("matrix products", *both, (ids, types), f"{peer} with its TPU path", gradients=True, atol=1e-4)

    base = fnet.fnet_base(vocab_size=200, max_length=64).eval()
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072, "vocab_size": 200}
    theirs = reference("FNetModel", **sizes, max_position_embeddings=64)
    base.load_state_dict(theirs.state_dict())
    both = [base, Outputs(theirs.eval(), states)]
    yield Case("fnet_base, all layers", *both, (ids, types), f"{peer} FNetModel", atol=1e-4)

    x = torch.randn(2, 7, 6)
    yield Case("the transform", fnet.fourier_mixing, fourier_written_out, (x,), "the double sum of its definition")
    by_products = lambda z: fnet.fourier_mixing_matmul(z, fnet.dft_matrices(60), fnet.dft_matrices(50)) / 50  # noqa: E731
    longer = torch.randn(1, 60, 50)
    by_fft = lambda z: fnet.fourier_mixing(z) / 50  # noqa: E731
    yield Case("two ways to mix", by_products, by_fft, (longer,), "FFT", gradients=True)
    once = lambda z: fnet.fourier_mixing(z).sum()  # noqa: E731
    yield Case(
        "the sum of the transform is T C x_00", once, lambda z: 42 * z[:, 0, 0].sum(), (x,), "an identity", atol=1e-4
    )


def fourier_written_out(x: Tensor) -> Tensor:
    """Equation 1 over both axes, one term after the other."""
    out = torch.zeros_like(x)
    _, t, c = x.shape
    for k in range(t):
        for m in range(c):
            for n in range(t):
                for j in range(c):
                    out[:, k, m] += x[:, n, j] * cmath.exp(-2j * cmath.pi * (k * n / t + m * j / c)).real
    return out


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: 128 tokens to their last states and the pooled one."""

    def tokens(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randint(4, 32_000, (batch, 128)), torch.zeros(batch, 128, dtype=torch.int64)

    def theirs() -> nn.Module:
        import transformers

        return Outputs(transformers.FNetModel(transformers.FNetConfig()), ("last_hidden_state", "pooler_output"))

    return {"fnet_base": Pair(fnet.fnet_base, theirs, tokens, "transformers:FNetModel", train_batch=2)}
