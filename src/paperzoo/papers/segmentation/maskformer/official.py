"""`transformers`' published files of MaskFormer in our names."""

from __future__ import annotations

import re

import torch
from torch import Tensor

ENCODER = "model.pixel_level_module.encoder."
NAMES = (
    (r"model\.pixel_level_module\.decoder\.fpn\.", "pixel_decoder."),
    (r"model\.pixel_level_module\.decoder\.", "pixel_decoder."),
    (r"model\.transformer_module\.queries_embedder\.", "queries."),
    (r"model\.transformer_module\.", ""),
)
RESNET = (
    (r"embedder\.embedder\.convolution\.", "conv1."),
    (r"embedder\.embedder\.normalization\.", "bn1."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)
SWIN_NAMES = (
    (r"^model\.", ""),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.", ""),
    (r"hidden_states_norms\.(?:stage)?", "norms."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def of_body(name: str) -> str:
    """A name inside of `transformers`' backbone in ours."""
    if found := re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(.+)", name):
        level, block, rest = found.groups()
        rest = re.sub(
            r"^layer\.(\d)\.(convolution|normalization)",
            lambda m: f"{'conv' if m[2] == 'convolution' else 'bn'}{int(m[1]) + 1}",
            rest,
        )
        name = f"layer{int(level) + 1}.{block}.{rest}"
    swin = "embeddings." in name or "blocks." in name or "norms." in name or "layers." in name
    for old, new in SWIN_NAMES if swin else RESNET:
        name = re.sub(old, new, name)
    # what ends a stage there begins the next one here
    return re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`transformers`' checkpoints (`facebook/maskformer-resnet50-ade`, `facebook/maskformer-swin-base-coco` and so on), of any
    version, to these names.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.startswith(("criterion.", f"{ENCODER}model.layernorm.")) or name.endswith("relative_position_index"):
            continue  # what nothing depends on
        if name.startswith(ENCODER):
            name = f"backbone.body.{of_body(name.removeprefix(ENCODER))}"
        for old, new in NAMES:
            name = re.sub(f"^{old}", new, name)
        if name.startswith("decoder."):
            name = name.replace(".o_proj.", ".out_proj.").replace(".mlp.fc", ".fc")
        renamed[name] = value
    for name in [n for n in renamed if ".attn.query." in n]:  # three maps there are one here
        parts = [renamed.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        renamed[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return renamed
