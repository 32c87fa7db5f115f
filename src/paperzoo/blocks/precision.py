"""Parts of a network that stay in full precision under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the tensor's device; inputs must be cast by the caller.

    Where autocast is off already, or unknown (the meta device), it does nothing, and leaves no trace in an exported graph.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
