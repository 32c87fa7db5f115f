"""MobileViT against timm and transformers, its unfolding against a loop, the sampler's arithmetic, the paper's counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.engine.weights import parameter_count
from paperzoo.papers.classification.convmixer.parity import seen
from paperzoo.papers.classification.mobilenet_v1.parity import Logits
from paperzoo.papers.classification.mobilevit import model as mobilevit


def cases() -> Iterator[Case]:
    import timm
    import transformers

    torch.manual_seed(0)
    for name in ("mobilevit_xxs", "mobilevit_s"):
        peer = f"timm {timm.__version__} {name}"
        reference = seen(timm.create_model(name), 96)
        ours = getattr(mobilevit, name)().eval()
        ours.load_state_dict(mobilevit.from_official(reference.state_dict()))
        for shape in ((1, 3, 256, 256), (2, 3, 120, 90)):
            x = torch.randn(shape)
            yield Case(f"{name} eval, {shape[2]} x {shape[3]}", ours, reference, (x,), peer)
    features = timm.create_model("mobilevit_s", features_only=True).eval()
    features.load_state_dict({k.replace("stages.", "stages_", 1): v for k, v in reference.state_dict().items() if k.startswith(("stem", "stages"))}, strict=False)  # fmt: skip
    yield Case(
        "stages but the last", lambda x: ours.stages(x)[:4], lambda x: features(x)[:4], (x,), f"{peer} features_only"
    )
    theirs = timm.create_model("mobilevit_xxs", num_classes=5, in_chans=1).double()
    ours = mobilevit.mobilevit_xxs(num_classes=5, in_channels=1).double()
    ours.load_state_dict(mobilevit.from_official(theirs.state_dict()))
    x = torch.randn(3, 1, 70, 64).double()
    yield Case("mobilevit_xxs training, one channel", ours.train(), theirs.train(), (x,), f"timm {timm.__version__}", gradients=True)  # fmt: skip

    config = transformers.MobileViTConfig(num_labels=7)
    hub = seen(Logits(transformers.MobileViTForImageClassification(config)), 96)
    ours = mobilevit.mobilevit_s(num_classes=7).eval()
    ours.load_state_dict(mobilevit.from_official(hub.net.state_dict()))
    yield Case("the Hub's names", ours, hub, (torch.randn(2, 3, 128, 160),), f"transformers {transformers.__version__} MobileViT")  # fmt: skip

    maps = torch.randn(2, 3, 6, 8)
    yield Case("unfolding", lambda m: mobilevit.unfold(m, 2), one_by_one, (maps,), "sec. 3.1, a pixel at a time", rtol=0, atol=0)  # fmt: skip
    yield Case("folding back", lambda m: mobilevit.fold(mobilevit.unfold(m, 2), 2, 6, 8), lambda m: m, (maps,), "sec. 3.1: neither order is lost", rtol=0, atol=0)  # fmt: skip
    yield Case("rows of a batch by size", sampled, lambda: [4096, 2844, 1600, 1264, 1024], against="sec. 3.2, b_t = H_n W_n b / (H_t W_t), by hand")  # fmt: skip
    for name, stated in (("mobilevit_s", 5.6), ("mobilevit_xs", 2.3), ("mobilevit_xxs", 1.3)):
        yield Case(f"{name}: millions of parameters", lambda n=name: round(on_meta(n) / 1e6, 1), lambda s=stated: s, against="paper, fig. 6", rtol=1e-9)  # fmt: skip


def one_by_one(maps: Tensor) -> Tensor:
    """Sequence p of image b holds pixel p of each 2 x 2 patch, patches row by row."""
    rows = []
    for image in maps:
        for i in (0, 1):
            for j in (0, 1):
                patches = [(y, x) for y in range(0, image.shape[1], 2) for x in range(0, image.shape[2], 2)]
                rows.append(torch.stack([image[:, y + i, x + j] for y, x in patches]))
    return torch.stack(rows)


def sampled() -> list[int]:
    from types import SimpleNamespace

    from paperzoo.papers.classification.mobilevit.recipe import PRESETS, MultiScaleRecipe

    published = PRESETS["published"]
    stand_in = SimpleNamespace(config=published, runtime=SimpleNamespace(share=lambda n: n))
    return [MultiScaleRecipe.rows_at(stand_in, size) for size in published.sampler_sizes]


def on_meta(name: str) -> int:
    with torch.device("meta"):
        return parameter_count(getattr(mobilevit, name)())


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import timm

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 256, 256),)

    def theirs() -> nn.Module:
        return timm.create_model("mobilevit_s")

    return {"mobilevit_s": Pair(mobilevit.mobilevit_s, theirs, images, "timm:mobilevit_s", train_batch=4)}
