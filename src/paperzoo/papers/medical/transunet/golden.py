"""Writes golden.safetensors: what github.com/Beckschen/TransUNet (networks/ at 02ef001) answers for weights and images that follow from a rule.

    python -m paperzoo.papers.medical.transunet.golden DIR        (DIR holds the repository)

Its configuration is a plain object here in place of ml_collections. The network is narrow where its code allows it.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

SIZE, CLASSES, TOKENS, HEADS, HIDDEN, DEPTH = 64, 3, 48, 4, 80, 2
HEAD, WIDTHS = 512, (24, 16, 12, 8)


def rule(shape: tuple[int, ...], number: int) -> Tensor:
    """Values in -1 … 1 that look random and follow from their place, float64."""
    count = torch.Size(shape).numel()
    return (
        torch.sin(torch.arange(count, dtype=torch.float64) * (1.37 + 0.11 * number) + number).mul(7.0).sin().view(shape)
    )


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's values by its name among the authors': at the scale of its fan-in, norms near one."""
    number = sum(ord(c) * (i % 7 + 1) for i, c in enumerate(name)) % 97
    out = rule(shape, number)
    if len(shape) > 1 and "position" not in name:
        return out * 1.7 / out[0].numel() ** 0.5
    return 1 + 0.4 * out if name.endswith("weight") else 0.2 * out


def image(batch: int = 2) -> Tensor:
    return rule((batch, 1, SIZE, SIZE), 90)


def arrays() -> dict[str, Tensor]:
    """Weights of a hybrid encoder under the names of the JAX file, of the narrow network."""
    made: dict[str, Tensor] = {"conv_root/kernel": rule((7, 7, 3, 64), 1) * 0.1}

    def norm(name: str, channels: int, lead: int = 3) -> None:
        shape = (1,) * lead + (channels,)
        made[f"{name}/scale"], made[f"{name}/bias"] = 1 + 0.3 * rule(shape, len(made)), 0.1 * rule(shape, len(made) + 1)

    norm("gn_root", 64)
    before = 64
    for level in (1, 2, 3):
        middle = 64 * 2 ** (level - 1)
        unit = f"block{level}/unit1"
        for conv, shape in (
            ("conv1", (1, 1, before, middle)),
            ("conv2", (3, 3, middle, middle)),
            ("conv3", (1, 1, middle, 4 * middle)),
            ("conv_proj", (1, 1, before, 4 * middle)),
        ):
            made[f"{unit}/{conv}/kernel"] = rule(shape, len(made)) * 0.1
        for gn, channels in (("gn1", middle), ("gn2", middle), ("gn3", 4 * middle), ("gn_proj", 4 * middle)):
            norm(f"{unit}/{gn}", channels)
        before = 4 * middle
    made["embedding/kernel"], made["embedding/bias"] = rule((1, 1, 1024, TOKENS), 3) * 0.05, 0.1 * rule((TOKENS,), 4)
    made["Transformer/posembed_input/pos_embedding"] = 0.3 * rule((1, 1 + (SIZE // 16) ** 2, TOKENS), 5)
    norm("Transformer/encoder_norm", TOKENS, 0)
    for k in range(DEPTH):
        root = f"Transformer/encoderblock_{k}"
        norm(f"{root}/LayerNorm_0", TOKENS, 0)
        norm(f"{root}/LayerNorm_2", TOKENS, 0)
        attention = f"{root}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            made[f"{attention}/{name}/kernel"] = rule((TOKENS, HEADS, TOKENS // HEADS), len(made)) * 0.2
            made[f"{attention}/{name}/bias"] = 0.1 * rule((HEADS, TOKENS // HEADS), len(made))
        made[f"{attention}/out/kernel"] = rule((HEADS, TOKENS // HEADS, TOKENS), len(made)) * 0.2
        made[f"{attention}/out/bias"] = 0.1 * rule((TOKENS,), len(made))
        for name, a, b in (("Dense_0", TOKENS, HIDDEN), ("Dense_1", HIDDEN, TOKENS)):
            made[f"{root}/MlpBlock_3/{name}/kernel"] = rule((a, b), len(made)) * 0.2
            made[f"{root}/MlpBlock_3/{name}/bias"] = 0.1 * rule((b,), len(made))
    return made


class Settings(dict):
    __getattr__ = dict.__getitem__


def theirs(folder: Path) -> nn.Module:
    """The authors' network, filled by the rule."""
    sys.modules["ml_collections"] = types.ModuleType("ml_collections")
    sys.modules["ml_collections"].ConfigDict = Settings
    sys.path.insert(0, str(folder))
    module = importlib.import_module("networks.vit_seg_modeling")
    config = Settings(
        patches=Settings(size=(16, 16), grid=(SIZE // 16, SIZE // 16)),
        hidden_size=TOKENS,
        transformer=Settings(
            mlp_dim=HIDDEN, num_heads=HEADS, num_layers=DEPTH, attention_dropout_rate=0.0, dropout_rate=0.0
        ),
        resnet=Settings(num_layers=(1, 1, 1), width_factor=1),
        classifier="seg",
        decoder_channels=WIDTHS,
        skip_channels=[512, 256, 64, 16],
        n_classes=CLASSES,
        n_skip=3,
    )
    network = module.VisionTransformer(config, SIZE, CLASSES)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(value(name, tuple(p.shape)))
    return network.double()


def main(folder: Path) -> None:
    from safetensors.torch import save_file

    network = theirs(folder)
    found: dict[str, Tensor] = {}
    for mode in ("eval", "train"):
        network.train(mode == "train")
        network.zero_grad()
        out = network(image())
        out.square().mean().backward()
        found[f"{mode} logits"] = out.detach().flatten()[::5].float()
        found[f"{mode} gradients"] = torch.stack([p.grad.norm() for _, p in sorted(network.named_parameters())])
    network = theirs(folder).eval()
    network.load_from({k: v.numpy() for k, v in arrays().items()})
    found["from the JAX file"] = network(image()).detach().flatten()[::5].float()
    names = " ".join(f"{k}:{'x'.join(map(str, v.shape))}" for k, v in sorted(network.state_dict().items()))
    found["names"] = torch.tensor(list(names.encode()), dtype=torch.uint8)
    for name in ("medpy", "SimpleITK"):  # which its metrics import
        sys.modules[name] = types.ModuleType(name)
    sys.modules["medpy"].metric = None
    utils = importlib.import_module("utils")
    logits, truth = 3 * rule((2, 3, 6, 7), 8), (1.5 * rule((2, 6, 7), 9).abs() * 2).floor().clamp(0, 2)
    found["dice loss"] = utils.DiceLoss(3)(logits, truth, softmax=True)[None]
    save_file({k: v.contiguous() for k, v in found.items()}, Path(__file__).with_name("golden.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
