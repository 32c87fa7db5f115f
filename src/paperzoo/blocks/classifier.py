"""A classifier's last layer."""

from __future__ import annotations

from torch import nn


def last_layer(num_features: int, num_classes: int) -> nn.Module:
    """(B, num_features) -> logits (B, num_classes); with 0 classes the features themselves, as timm has it."""
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()
