"""What the trainings of the shipped checkpoints share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import KimiLinearForCausalLM


def decayed_apart(model: KimiLinearForCausalLM, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for AdamW: matrices decay, but neither norms nor the gate's `A_log` and `dt_bias`."""
    decayed = [p for name, p in model.named_parameters() if p.dim() >= 2 and "A_log" not in name]
    kept = [p for name, p in model.named_parameters() if p.dim() < 2 or "A_log" in name]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


@contextmanager
def switched_off(model: KimiLinearForCausalLM, kind: str) -> Iterator[None]:
    """Ablation: all layers of one kind, `full_attention` or `linear_attention`, add nothing to the hidden state."""
    layers = [layer for layer in model.model.layers if layer.block_type == kind]
    hooks = [
        layer.self_attn.o_proj.register_forward_hook(lambda _m, _i, out: torch.zeros_like(out)) for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
