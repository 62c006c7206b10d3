"""Ways, SimCSE's and that of decoders, from token embeddings (R, T, D) to one embedding a text (R, D)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NEEDS_HIDDEN_STATES = ("avg_top2", "avg_first_last")


def embed(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, pooler_type: str) -> Tensor:
    """Runs the encoder on texts of tokens (R, T) and pools its output, whichever side they are padded on. -> (R, D)"""
    # To the right: there a text's positions, its first token and the pooler layer's are what they are without padding.
    order = attention_mask.argsort(dim=1, descending=True, stable=True)
    input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
    wants_all = pooler_type in NEEDS_HIDDEN_STATES
    output = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=wants_all, return_dict=True)
    return POOLERS[pooler_type](output, attention_mask)


def _masked_mean(tokens: Tensor, attention_mask: Tensor) -> Tensor:
    mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)


def _cls(output: Any, attention_mask: Tensor) -> Tensor:
    return output.pooler_output  # the first token through the encoder's pooler, a linear layer and tanh


def _cls_before_pooler(output: Any, attention_mask: Tensor) -> Tensor:
    return output.last_hidden_state[:, 0]


def _last_token(output: Any, attention_mask: Tensor) -> Tensor:
    last = attention_mask.sum(dim=1) - 1
    return output.last_hidden_state[torch.arange(len(last), device=last.device), last]


def _avg(output: Any, attention_mask: Tensor) -> Tensor:
    return _masked_mean(output.last_hidden_state, attention_mask)


def _avg_top2(output: Any, attention_mask: Tensor) -> Tensor:
    return _masked_mean((output.hidden_states[-1] + output.hidden_states[-2]) / 2, attention_mask)


def _avg_first_last(output: Any, attention_mask: Tensor) -> Tensor:
    # "first" is the first layer's output, as in SimCSE; hidden_states[0] is the embedding layer's.
    return _masked_mean((output.hidden_states[1] + output.hidden_states[-1]) / 2, attention_mask)


POOLERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cls": _cls,
    "cls_before_pooler": _cls_before_pooler,
    "last_token": _last_token,
    "avg": _avg,
    "avg_top2": _avg_top2,
    "avg_first_last": _avg_first_last,
}
