"""The attention probabilities of any transformer, kept in the graph while it runs as it is.

Networks compute attention with `scaled_dot_product_attention`, which never shows its probabilities. While a tape records, that
call is answered by the literal equation, with the same result. What counts as attention:

- `torch.nn.functional.scaled_dot_product_attention`, called anywhere;
- `torch.nn.MultiheadAttention`;
- a softmax over the last dimension of a (B, heads, T, S) tensor, as networks write it that use neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Attention:
    """What one call attended to.

    module: the dotted name of the innermost module that was running.
    call: 0 for the first attention of that module in the forward pass, 1 for the second, and so on.
    probabilities: (B, heads, T, S); rows sum to one.
    """

    module: str
    call: int
    probabilities: Tensor


class Tape(TorchFunctionMode):
    """While active, attentions are answered by the literal equation and kept in `found`, in the order they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Attention] = []
        self.inside: list[str] = []  # the modules that are running, outermost first

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            return self.multi_head(*args, **kwargs)
        output = function(*args, **kwargs)
        if function in SOFTMAX and isinstance(output, Tensor) and output.ndim == 4 and last_dimension(args, kwargs):
            return self.keep(output)
        return output

    def keep(self, probabilities: Tensor) -> Tensor:
        if not probabilities.requires_grad:  # with frozen weights the graph starts here
            probabilities = probabilities.detach().requires_grad_()
        module = self.inside[-1] if self.inside else ""
        call = sum(attention.module == module for attention in self.found)
        self.found.append(Attention(module, call, probabilities))
        return probabilities

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """softmax(Q K^T scale + mask) V. Dropout is left out, as a network that is explained does not train."""
        if query.ndim == 3:  # without heads: one
            mask = attn_mask[:, None] if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
            one = (t[:, None] for t in (query, key, value))
            return self.attend(*one, attn_mask=mask, is_causal=is_causal, scale=scale)[:, 0]
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
        return self.keep(scores.softmax(-1)) @ value

    def multi_head(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`nn.MultiheadAttention`, made to call `scaled_dot_product_attention`; the weights it was asked for come from the tape."""
        wanted, each = kwargs.pop("need_weights", True), not kwargs.pop("average_attn_weights", True)
        with patch.object(
            F, "scaled_dot_product_attention", self.attend
        ):  # a mode does not see into the call it answers
            output, _ = F.multi_head_attention_forward(*args, need_weights=False, **kwargs)
        weights = self.found[-1].probabilities
        return output, (weights if each else weights.mean(1)) if wanted else None


def last_dimension(args: tuple, kwargs: dict) -> bool:
    """Whether a softmax of a 4-D tensor was asked for over its last dimension."""
    return kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, 3)


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Attention]]:
    """The attentions of whatever runs inside, with the names of the model's modules that called them."""
    tape, hooks = Tape(), []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: tape.inside.append(name)))
        hooks.append(module.register_forward_hook(lambda m, a, o: (tape.inside.pop(), None)[1], always_call=True))
    try:
        with tape:
            yield tape.found
    finally:
        for hook in hooks:
            hook.remove()
