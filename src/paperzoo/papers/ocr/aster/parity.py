"""ASTER against ayumiymk/aster.pytorch (stored answers), scipy's spline, and its equations one text and one step at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.sequence_decoding import sequence_cross_entropy
from paperzoo.engine.parity import Case
from paperzoo.papers.classification.spatial_transformer.technique import output_points
from paperzoo.papers.ocr.aster import golden
from paperzoo.papers.ocr.aster.model import (
    ASTER,
    AttentionHead,
    BidirectionalLSTM,
    BorderSpline,
    ControlPoints,
    aster_l2r_gru,
    aster_tiny,
    border_points,
    from_official,
    reversed_texts,
)

SOURCE = "ayumiymk/aster.pytorch be67004, stored"


def cases() -> Iterator[Case]:
    import scipy

    torch.manual_seed(0)
    for count, margin in ((20, 0.0), (20, 0.05), (6, 0.1)):
        spline = BorderSpline(count, margin)
        moved = border_points(count, 0.02).float().repeat(3, 1, 1) + torch.randn(3, count, 2) * 0.1
        yield Case(f"spline, {count} points, margin {margin}", lambda p, s=spline: s(2 * p - 1, output_points(5, 9, p)) / 2 + 0.5,
                   lambda p, n=count, m=margin: solved(p, n, m, 5, 9), (moved,), "the equations of sec. 3.1.2 solved in float64, coordinates 0 to 1")  # fmt: skip
        yield Case(f"spline, {count} points, margin {margin}, another library", lambda p, s=spline: s(2 * p - 1, output_points(4, 6, p)),
                   lambda p, n=count, m=margin: scipy_spline(p, n, m, 4, 6), (moved,), f"scipy {scipy.__version__} RBFInterpolator")  # fmt: skip
    spline = BorderSpline(20, 0.05)
    yield Case("the spline meets its control points", lambda p: spline(p.flatten(1), spline.control), lambda p: p,
               (torch.randn(2, 20, 2),), "interpolation", atol=2e-4)  # fmt: skip
    fresh = aster_tiny(width=64).eval()
    yield Case("a fresh network straightens nothing", lambda x: fresh.rectify(x)[0], lambda x: x, (smooth(2, 32, 64),),
               "sec. 3.1.1: the first points lie on the border", atol=2e-3, note="inner products of float32 splines, picture up to 2")  # fmt: skip
    locate = ControlPoints(3, 20, 0.0, (4, 4, 4, 4, 4, 4), 8, (32, 64)).eval()
    yield Case("first control points", lambda: locate(torch.randn(2, 3, 32, 64)), lambda: border_points(20, 0.0).float().repeat(2, 1, 1),
               (), "zero weights, a bias on the border")  # fmt: skip

    yield from against_pytorch()
    yield from decoders()

    torch.manual_seed(2)
    layer = BidirectionalLSTM(5, 4, 3)
    yield Case("a layer of LSTMs in both directions", layer, lambda x: slow_bidirectional(layer, x), (torch.randn(2, 6, 5),),
               "gates written out, one text and step at a time", gradients=True)  # fmt: skip


# -- against the PyTorch code --------------------------------------------------------------------------------------------


def against_pytorch() -> Iterator[Case]:
    from safetensors.torch import load_file

    answers = load_file(str(golden.FILE))
    model = golden.write_weights(aster_l2r_gru(max_length=golden.LONGEST - 1)).eval()
    theirs = model.state_dict() | {"tps.inverse_kernel": torch.zeros(23, 23)}  # a checkpoint has its tables
    model.load_state_dict(from_official(theirs))
    yield Case(
        "parameters", lambda: sum(p.numel() for p in model.parameters()), lambda: answers["parameters"], (), SOURCE
    )
    for kind, size in golden.SIZES.items():
        yield Case(f"{kind}: {size[0]} x {size[1]}, everything", lambda k=kind: everything(model, k),
                   lambda k=kind: stored(answers, f"{k}."), (), SOURCE, atol=1e-3,
                   note="their spline is inverted in float32; pictures differ most")  # fmt: skip
    yield Case("gradients through the spline", lambda: gradients(model), lambda: stored(answers, "whole."), (), SOURCE, rtol=5e-3, atol=5e-3,
               note="gradients up to a hundred; bilinear sampling has kinks")  # fmt: skip
    part = nn.Module()  # the network behind the spline, under the same names
    part.encoder, part.decoder = aster_l2r_gru().encoder, aster_l2r_gru().decoder
    golden.write_weights(part).train()
    yield Case("a training step behind the spline: loss and gradients", lambda: training_step(part), lambda: stored(answers, "train."), (),
               SOURCE, rtol=1e-3, atol=1e-3)  # fmt: skip


def stored(answers: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k: v.squeeze() for k, v in answers.items() if k.startswith(prefix)}


@torch.no_grad()
def everything(model: ASTER, kind: str) -> dict[str, Tensor]:
    images, (tokens, lengths) = golden.pictures(kind), golden.texts()
    rectified, points = model.rectify(images)
    features = model.encoder(rectified)
    scores, ids = model(images)[0].softmax(2).max(2)
    found = {
        "points": points, "rectified": rectified[:, :, ::3, ::5], "features": features[:, :, ::16], "greedy": ids,
        "logits": model.decoder.forced(features, tokens), "scores": scores, "beam": model.search(images, 5)[0],
        "loss": model(images, {"tokens": tokens, "lengths": lengths})["left_to_right"],
    }  # fmt: skip
    return {f"{kind}.{name}": value for name, value in found.items()}


def gradients(model: ASTER) -> dict[str, Tensor]:
    tokens, lengths = golden.texts()
    model.zero_grad()
    model(golden.pictures("full"), {"tokens": tokens, "lengths": lengths})["left_to_right"].backward()
    return {f"whole.gradient.{name}": golden.gradient(model, name) for name in golden.LOCATING}


def training_step(part: nn.Module) -> dict[str, Tensor]:
    tokens, lengths = golden.texts()
    part.zero_grad()
    loss = sequence_cross_entropy(
        part.decoder.forced(part.encoder(golden.pictures("rectified")), tokens), tokens, lengths
    )
    loss.backward()
    found = {f"train.gradient.{name}": golden.gradient(part, name) for name in golden.RECOGNISER}
    return found | {"train.loss": loss.detach()}


# -- decoders ------------------------------------------------------------------------------------------------------------


def decoders() -> Iterator[Case]:
    tokens = torch.tensor([[0, 1, 2, 3, 4, 4], [2, 3, 4, 4, 4, 4], [1, 1, 0, 2, 2, 3]])
    lengths = torch.tensor([3, 1, 5])
    for cell in ("lstm", "gru"):
        torch.manual_seed(3)
        head = AttentionHead(3, 7, 6, 5, cell)
        features = torch.randn(3, 4, 7)
        yield Case(f"{cell}: teacher forcing", lambda x, h=head: h.forced(x, tokens), lambda x, h=head: slow_forced(h, x, tokens),
                   (features,), "sec. 3.2.2, one text and step at a time", gradients=True)  # fmt: skip
        yield Case(f"{cell}: greedy", lambda x, h=head: h.greedy(x, 6), lambda x, h=head: slow_greedy(h, x, 6), (features,),
                   "sec. 3.2.2, one text and step at a time")  # fmt: skip
        yield Case(f"{cell}: the best text of a wide beam", lambda x, h=head: h.search(x, 3, 3)[2], lambda x, h=head: best_of_all(h, x, 3, 3),
                   (features,), "three best prefixes in lists")  # fmt: skip
    yield Case("reversed texts", lambda: reversed_texts(tokens, lengths),
               lambda: torch.tensor([[2, 1, 0, 3, 4, 4], [2, 3, 4, 4, 4, 4], [2, 2, 0, 1, 1, 3]]), (), "by hand")  # fmt: skip

    torch.manual_seed(4)
    model = aster_tiny(num_classes=3, max_length=5, width=36).eval()
    for part in (model.decoder, model.decoder_reversed):
        nn.init.normal_(part.decoder.fc.weight, std=2.0)
    images = smooth(4, 32, 48)
    yield Case("losses of both directions", lambda: model(images[:3], {"tokens": tokens, "lengths": lengths}),
               lambda: slow_losses(model, images[:3], tokens, lengths), (), "half of each, summed over a text, one at a time")  # fmt: skip
    yield Case("the more probable direction", lambda x: [t.double() for t in model.decode(model(x))], lambda x: slow_choice(model, x),
               (images,), "sec. 3.2.2, one picture at a time")  # fmt: skip
    yield Case("probabilities stay with their characters", lambda: model.choose(CHOICE), lambda: CHOSEN, (), "by hand")


CHOICE = [
    (torch.tensor([[0, 1, 3], [2, 3, 4]]), torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.4, 1.0]]), torch.tensor([-1.0, -2.0])),
    (torch.tensor([[2, 3, 4], [1, 0, 3]]), torch.tensor([[0.5, 0.4, 1.0], [0.6, 0.7, 0.8]]), torch.tensor([-2.0, -1.0])),
]  # fmt: skip
"""Of three characters, so that 3 is the end and 4 padding: the first text wins in the first picture, the reversed one in the second."""
CHOSEN = (
    torch.tensor([[0, 1, 3], [0, 1, 3]]), torch.tensor([[0.9, 0.8, 0.7], [0.7, 0.6, 0.8]]), torch.tensor([-1.0, -1.0])
)  # fmt: skip


def smooth(count: int, height: int, width: int) -> Tensor:
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    waves = [torch.sin(3 * x + 2 * y + k) + torch.cos((2 + k % 3) * y - 4 * x) for k in range(3 * count)]
    return torch.stack(waves).reshape(count, 3, height, width)


def solved(points: Tensor, count: int, margin: float, height: int, width: int) -> Tensor:
    """T = [C' 0] inv(Delta), p = T [1 p' phi(|p' - c'|)], phi(r) = r^2 log r, a point at a time; x and y from 0 to 1."""
    control, places = (
        border_points(count, margin),
        output_points(height, width, torch.zeros((), dtype=torch.float64)) / 2 + 0.5,
    )
    phi = lambda a, b: 0.0 if (r := float((a - b).norm())) == 0 else r**2 * torch.tensor(r).double().log().item()  # noqa: E731
    delta = torch.zeros(count + 3, count + 3, dtype=torch.float64)
    for i, j in itertools.product(range(count), range(count)):
        delta[i, j] = phi(control[i], control[j])
    delta[:count, count], delta[:count, count + 1 :] = 1, control
    delta[count, :count], delta[count + 1 :, :count] = 1, control.T
    results = []
    for target in points.double():
        weights = torch.linalg.solve(delta, torch.cat([target, torch.zeros(3, 2, dtype=torch.float64)]))
        rows = [torch.tensor([*(phi(p, c) for c in control), 1.0, *p.tolist()], dtype=torch.float64) for p in places]
        results.append(torch.stack(rows) @ weights)
    return torch.stack(results).float()


def scipy_spline(points: Tensor, count: int, margin: float, height: int, width: int) -> Tensor:
    from scipy.interpolate import RBFInterpolator

    places = output_points(height, width, torch.zeros((), dtype=torch.float64)).numpy()
    control = (2 * border_points(count, margin) - 1).numpy()
    found = [
        RBFInterpolator(control, (2 * p.double() - 1).numpy(), kernel="thin_plate_spline", degree=1)(places)
        for p in points
    ]
    return torch.stack([torch.from_numpy(f).float() for f in found])


def slow_step(
    head: AttentionHead, features: Tensor, token: int, hidden: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One text, one step: features (N, C) -> logits (K + 3,), and the state after."""
    unit = head.decoder
    attend, states = unit.attention_unit, unit.state_size
    energies = [
        (attend.wEmbed.weight[0] * torch.tanh(attend.sEmbed.weight @ hidden + attend.sEmbed.bias
         + attend.xEmbed.weight @ h + attend.xEmbed.bias)).sum() + attend.wEmbed.bias[0] for h in features
    ]  # fmt: skip
    weights = torch.stack(energies).exp()
    glimpse = sum(w / weights.sum() * h for w, h in zip(weights, features, strict=True))
    if unit.cell == "lstm":
        one = torch.zeros(head.num_classes + 4)
        one[token] = 1
        rnn = unit.lstm
    else:
        one, rnn = unit.tgt_embedding.weight[token], unit.gru
    x = rnn.weight_ih_l0 @ torch.cat([one, glimpse]) + rnn.bias_ih_l0
    s = rnn.weight_hh_l0 @ hidden + rnn.bias_hh_l0
    if unit.cell == "lstm":
        i, f, g, o = (x + s).split(states)
        memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(memory)
    else:
        (xr, xz, xn), (sr, sz, sn) = x.split(states), s.split(states)
        update = torch.sigmoid(xz + sz)
        hidden = update * hidden + (1 - update) * torch.tanh(xn + torch.sigmoid(xr + sr) * sn)
    return unit.fc.weight @ hidden + unit.fc.bias, hidden, memory


def slow_forced(head: AttentionHead, features: Tensor, tokens: Tensor) -> Tensor:
    texts = []
    for text, row in zip(features, tokens.tolist(), strict=True):
        hidden = memory = torch.zeros(head.decoder.state_size)
        steps = []
        for token in [head.num_classes + 3, *row[:-1]]:
            logits, hidden, memory = slow_step(head, text, token, hidden, memory)
            steps.append(logits)
        texts.append(torch.stack(steps))
    return torch.stack(texts)


def slow_greedy(head: AttentionHead, features: Tensor, count: int) -> Tensor:
    texts = []
    for text in features:
        hidden = memory = torch.zeros(head.decoder.state_size)
        token, steps = head.num_classes + 3, []
        for _ in range(count):
            logits, hidden, memory = slow_step(head, text, token, hidden, memory)
            steps.append(logits)
            token = int(logits.argmax())
        texts.append(torch.stack(steps))
    return torch.stack(texts)


def best_of_all(head: AttentionHead, features: Tensor, count: int, beams: int) -> Tensor:
    """Beam search of one text at a time, with prefixes in a list: the log-probability of the best."""
    end, best = head.num_classes, []
    for text in features:
        zeros = torch.zeros(head.decoder.state_size)
        kept = [([end + 3], 0.0, zeros, zeros)]
        for _ in range(count):
            longer = []
            for tokens, score, hidden, memory in kept:
                if tokens[-1] == end:
                    longer.append((tokens, score, hidden, memory))
                    continue
                logits, h, m = slow_step(head, text, tokens[-1], hidden, memory)
                longer += [([*tokens, i], score + p, h, m) for i, p in enumerate(logits.log_softmax(0).tolist())]
            kept = sorted(longer, key=lambda entry: -entry[1])[:beams]
        best.append(kept[0][1])
    return torch.tensor(best)


def slow_losses(model: ASTER, images: Tensor, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    features, found = model.features(images), {}
    for name, head in (("left_to_right", model.decoder), ("right_to_left", model.decoder_reversed)):
        total = 0.0
        for text, row, n in zip(features, tokens.tolist(), lengths.tolist(), strict=True):
            wanted = [*(row[:n] if name == "left_to_right" else row[:n][::-1]), model.num_classes]
            logits = slow_forced(head, text[None], torch.tensor([wanted]))[0]
            total = total + F.cross_entropy(logits, torch.tensor(wanted), reduction="sum")
        found[name] = total / len(images) / 2
    return found


@torch.no_grad()
def slow_choice(model: ASTER, images: Tensor) -> list[Tensor]:
    end, pad, steps = model.num_classes, model.num_classes + 1, model.max_length + 1
    rows, probabilities, totals = [], [], []
    for text in model.features(images):
        candidates = []
        for head in (model.decoder, model.decoder_reversed):
            log_p = slow_greedy(head, text[None], steps)[0].log_softmax(1)
            tokens, each = log_p.argmax(1).tolist(), log_p.max(1).values.tolist()
            n = tokens.index(end) if end in tokens else steps
            total = sum(each[: n + 1])
            ahead = (tokens[:n], each[:n]) if head is model.decoder else (tokens[:n][::-1], each[:n][::-1])
            closing = ([end], [each[n]]) if n < steps else ([], [])
            candidates.append((total, ahead[0] + closing[0], ahead[1] + closing[1]))
        total, tokens, each = max(candidates, key=lambda c: c[0])
        rows.append(tokens + [pad] * (steps - len(tokens)))
        probabilities.append(torch.cat([torch.tensor(each).exp(), torch.ones(steps - len(each))]))
        totals.append(total)
    return [torch.tensor(rows).double(), torch.stack(probabilities).double(), torch.tensor(totals).double()]


def slow_bidirectional(layer: BidirectionalLSTM, x: Tensor) -> Tensor:
    outputs = []
    for text in x:
        ways = []
        for suffix, order in (("", range(len(text))), ("_reverse", reversed(range(len(text))))):
            w, u, b, c = (
                getattr(layer.rnn, f"{n}_l0{suffix}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            hidden = memory = torch.zeros(u.shape[1])
            seen = {}
            for t in order:
                i, f, g, o = (w @ text[t] + b + u @ hidden + c).chunk(4)
                memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
                hidden = torch.sigmoid(o) * torch.tanh(memory)
                seen[t] = hidden
            ways.append(torch.stack([seen[t] for t in range(len(text))]))
        outputs.append(torch.cat(ways, 1) @ layer.linear.weight.T + layer.linear.bias)
    return torch.stack(outputs)
