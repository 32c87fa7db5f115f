"""SwinIR against spandrel's released network (its outputs on weights from a rule are stored, see `golden.py`), and against the paper."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.blocks.padding import reflect_to_multiple
from paperzoo.engine.parity import Case
from paperzoo.papers.restoration.swinir import golden, model

SOURCE = "spandrel 0.4.2 SwinIR, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    for name, (_, shape) in golden.NETWORKS.items():
        network = getattr(model, name)()
        network.load_state_dict(model.from_official(released(golden.by_rule(network.state_dict()))))
        yield Case(
            f"{name}, {' x '.join(map(str, shape))}",
            network.eval(),
            lambda x, n=name: stored[n],
            (golden.picture(shape, name),),
            SOURCE,
            rtol=1e-3,
            atol=1e-4,
        )

    narrow = narrow_network()
    yield Case(
        "one training step: loss and gradients",
        lambda: golden.loss_and_gradients(narrow),
        lambda: [stored[name] for name in ("loss", *golden.GRADIENTS)],
        (),
        SOURCE,
    )
    yield Case(
        "the released names",
        lambda: [float(zlib.crc32(n.encode())) for n in sorted(released(narrow.state_dict()))],
        lambda: stored["names"].double().tolist(),
        (),
        "spandrel 0.4.2 SwinIR's state",
        rtol=0.0,
        atol=0.0,
    )
    for name, parameters in STATED.items():
        yield Case(f"{name}: parameters", lambda n=name: size(n), lambda p=parameters: p, (), "table 3", rtol=0.0)

    # Attention by its definition: every window, head and pair of pixels by itself, with shifted windows cut at the image's edge.
    torch.manual_seed(0)
    layer = model.SwinLayer(12, 3, 2, 1, 24).double().eval()
    with torch.no_grad():
        layer.attn.relative_position_bias_table.normal_()
    x = torch.randn(2, 6, 9, 12, dtype=torch.float64)
    mask = model.shift_mask(6, 9, 3, 1, x)
    yield Case("a layer with shifted windows", lambda x: layer(x, mask), lambda x: slow_layer(layer, x), (x,),
               "sec. 3.2, one pair of pixels at a time", gradients=True)  # fmt: skip

    for shape in ((1, 3, 5, 9), (2, 1, 12, 7)):
        x = torch.rand(shape)
        down, right = -shape[2] % 4, -shape[3] % 4
        yield Case(f"padding of {shape[2]} x {shape[3]}", lambda x: reflect_to_multiple(x, 4),
                   lambda x, d=down, r=right: F.pad(x, (0, r, 0, d), mode="reflect"), (x,), "torch", rtol=0.0, atol=0.0)  # fmt: skip
    yield Case("padding of 1 x 2, too small to reflect", lambda x: reflect_to_multiple(x, 4),
               lambda x: x[:, :, [0, 0, 0, 0]][:, :, :, [0, 1, 0, 0]], (torch.rand(1, 3, 1, 2),), "worked example")  # fmt: skip
    blank = model.swinir_colour_denoising(depths=(1,), num_heads=(6,)).eval()
    torch.nn.init.zeros_(blank.conv_last.weight)
    torch.nn.init.zeros_(blank.conv_last.bias)
    yield Case("denoising starts from the image", blank, lambda x: x, (torch.rand(1, 3, 11, 8),), "sec. 3.1", atol=1e-6)


# Table 3 gives the lightweight networks 878, 886 and 897 thousand: it leaves out the tables of position biases, 32,400 values.
STATED = {"swinir_light_x2": 878, "swinir_light_x3": 886, "swinir_light_x4": 897}


def size(name: str) -> int:
    """Thousands of parameters, without the tables of position biases."""
    with torch.device("meta"):
        network = getattr(model, name)()
    counted = [p.numel() for name, p in network.named_parameters() if not name.endswith("bias_table")]
    return round(sum(counted) / 1e3)


def narrow_network() -> model.SwinIR:
    """`golden.TRAINED` with the values from the rule."""
    arguments = {name: golden.NARROW[name] for name in ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio")}
    network = model.SwinIR(scale=2, drop_path_rate=0.0, **arguments)
    network.load_state_dict(golden.by_rule(network.state_dict()))
    return network


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with the tables of the authors' files, of which every layer has one and those that shift two."""
    tables = {}
    for name in state:
        if name.endswith("relative_position_bias_table"):
            block = name.removesuffix(".attn.relative_position_bias_table")
            tables[f"{block}.attn.relative_position_index"] = torch.zeros(1, dtype=torch.long)
            if int(block.rpartition(".")[2]) % 2:
                tables[f"{block}.attn_mask"] = torch.zeros(1)
    return {**state, **tables}


def slow_layer(layer: model.SwinLayer, x: Tensor) -> Tensor:
    """A layer pixel by pixel. Shifted windows start `shift` further right and down; at the edges what is left over stands alone."""
    attn, (_, rows, columns, dim) = layer.attn, x.shape
    heads, side, shift = attn.num_heads, layer.window_size, layer.shift
    width = dim // heads
    normed = layer.norm1(x)
    q, k, v = (normed @ w.T + b for w, b in zip(attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True))

    def window(row: int, column: int) -> tuple[int, int]:
        """Which window a pixel is in; windows begin at `shift` and what lies before is a window of its own."""
        return (row - shift) // side, (column - shift) // side

    places = [(a, b) for a in range(rows) for b in range(columns)]
    mixed = torch.zeros_like(x)
    for a, b in places:
        others = [(c, d) for c, d in places if window(c, d) == window(a, b)]
        parts = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            logits = []
            for c, d in others:
                row = (a - c + side - 1) * (2 * side - 1) + (b - d + side - 1)
                bias = attn.relative_position_bias_table[row, head]
                logits.append((q[:, a, b, own] * k[:, c, d, own]).sum(-1) / width**0.5 + bias)
            weights = torch.stack(logits, dim=1).softmax(1)
            parts.append(sum(weights[:, i, None] * v[:, c, d, own] for i, (c, d) in enumerate(others)))
        mixed = mixed.clone()
        mixed[:, a, b] = torch.cat(parts, dim=-1)
    x = x + mixed @ attn.proj.weight.T + attn.proj.bias
    hidden = layer.norm2(x) @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return x + hidden @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias
