"""What the trainings of the shipped checkpoints share."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
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


class GateWatch:
    """Losses on the gates of the last batch.

    A gate of -50 nats forgets hardly more than one of -5, but the chunked forms of the recurrence take differences of
    summed gates, where its neighbours lose digits: without this loss, transformers with chunks of 64 and with chunks of
    16 differed by 5e-4 in a log-probability of the recall model. For the needle task, gates and write strengths on
    filler are pushed towards "keep, write nothing": 512 tokens of training hardly tell a memory of a thousand tokens
    from one of a million.

    Args:
        fast_weight: weight of the square by which gates exceed `limit`.
        keep_weight: weight of the logarithm by which gates and write strengths on filler exceed `keep`.
        limit: Largest gate that costs nothing, in nats per token.
        keep: Largest gate, in nats, and largest write strength on filler that cost nothing.
    """

    def __init__(
        self,
        model: KimiLinearForCausalLM,
        fast_weight: float,
        keep_weight: float,
        limit: float = 3.0,
        keep: float = 1e-7,
    ) -> None:
        self._fast_weight, self._keep_weight, self._limit, self._keep = fast_weight, keep_weight, limit, keep
        self._gates: list[torch.Tensor] = []
        self._betas: list[torch.Tensor] = []
        for layer in model.model.layers:
            if layer.block_type == "linear_attention":
                layer.self_attn.forget_gate.register_forward_hook(lambda _m, _i, out: self._note(self._gates, out))
                layer.self_attn.b_proj.register_forward_hook(lambda _m, _i, out: self._note(self._betas, out))

    @staticmethod
    def _note(noted: list[torch.Tensor], output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            noted.append(output)

    def losses(self, filler: torch.Tensor | None) -> torch.Tensor:
        """The weighted losses on the gates of the last batch, which is forgotten.

        Args:
            filler: bool [batch, length], where nothing is to be forgotten or written; None for nowhere.
        """
        gates, betas = self._gates, self._betas
        self._gates, self._betas = [], []
        fast = torch.stack([F.relu(-gate - self._limit).square().mean() for gate in gates]).sum()
        if filler is None:
            return self._fast_weight * fast
        weight, floor = filler / filler.sum().clamp_min(1), math.log(self._keep)
        # transformers computes log(1 + exp(x)), which is 0 for x below -17, where no gradient is left.
        forgets = [(F.relu((-gate).clamp_min(1e-9).log() - floor).mean((2, 3)) * weight).sum() for gate in gates]
        writes = [(F.relu(F.logsigmoid(beta.float()) - floor).mean(2) * weight).sum() for beta in betas]
        return self._fast_weight * fast + self._keep_weight * torch.stack([*forgets, *writes]).sum()
