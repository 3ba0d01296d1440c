"""The chunked KDA recurrence of transformers, rearranged for training: far fewer, far larger products.

transformers builds a [chunk, chunk, K] tensor of decays per chunk and inverts its triangular matrix row by row.
Here decays are split between the two sides of a matrix product, which is exact as long as no gate of a chunk
forgets more than `MIN_LOG_DECAY` a token, and the inverse is built in blocks that double. A gate below the limit
is taken as the limit; `GateWatch` keeps trained gates above it, and accuracies are measured with transformers'
own function.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import KimiLinearForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear as modeling

CHUNK = 32
MIN_LOG_DECAY = -4.0
"""Nats a token. Halfway through a chunk exp(-gate) is at most exp(4 * 16), within float32."""


def _unit_lower_inverse(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of I + `lower`, strictly lower triangular, [..., n, n] with n a power of two."""
    n = lower.shape[-1]
    index = torch.arange(n, device=lower.device)
    inverse = torch.eye(n, dtype=lower.dtype, device=lower.device).expand_as(lower)
    size = 1
    while size < n:
        block = index // size
        below = (block[:, None] == block + 1) & (block % 2 == 0)
        inverse = inverse - inverse @ (lower * below) @ inverse
        size *= 2
    return inverse


def chunk_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    **_options: Any,
) -> tuple[torch.Tensor, None]:
    """In place of transformers' `chunk_kimi_delta_attention`, from an empty state and without returning one.

    Args:
        query, key, value, g: [batch, length, heads, head_dim]; g in nats.
        beta: [batch, length, heads].

    Returns:
        Output, shaped like the query, and None.
    """
    dtype, length = query.dtype, query.shape[1]
    query, key, value, g = (x.transpose(1, 2).float() for x in (query, key, value, g))
    beta = beta.transpose(1, 2).float()
    query = modeling.l2norm(query) * query.shape[-1] ** -0.5
    key = modeling.l2norm(key)
    padding = -length % CHUNK
    query, key, value, g = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, CHUNK)) for x in (query, key, value, g))
    beta = F.pad(beta, (0, padding)).unflatten(2, (-1, CHUNK)).unsqueeze(-1)

    total = g.clamp_min(MIN_LOG_DECAY).cumsum(-2)
    middle = total[..., CHUNK // 2 - 1 : CHUNK // 2, :].detach()
    up, down = (total - middle).exp(), (middle - total).exp()
    last = total[..., -1:, :]
    key_down = (key * down).transpose(-1, -2)
    above = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g.device).triu()
    lower = ((key * beta * up) @ key_down).masked_fill(above, 0)
    inside = ((query * up) @ key_down).masked_fill(above.triu(1), 0)
    inverse = _unit_lower_inverse(lower)
    from_start = total.exp()
    writes = (inverse @ (value * beta)).flatten(0, 1).unbind(1)
    reads = (inverse @ (key * beta * from_start)).flatten(0, 1).unbind(1)
    to_end = (key * (last - total).exp()).transpose(-1, -2).flatten(0, 1).unbind(1)
    decays = last.exp().transpose(-1, -2).flatten(0, 1).unbind(1)

    state = value.new_zeros(writes[0].shape[0], key.shape[-1], value.shape[-1])
    states, updates = [], []
    for write, read, end, decay in zip(writes, reads, to_end, decays, strict=True):
        update = torch.baddbmm(write, read, state, alpha=-1)
        states.append(state)
        updates.append(update)
        state = torch.baddbmm(state * decay, end, update)
    shape = value.shape[:2]
    output = (query * from_start) @ torch.stack(states, 1).unflatten(0, shape)
    output = output + inside @ torch.stack(updates, 1).unflatten(0, shape)
    return output.flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype), None


@contextmanager
def replaced_kda(function: Any) -> Iterator[None]:
    """Let every KDA layer of transformers call this function for sequences."""
    original = modeling.chunk_kimi_delta_attention
    modeling.chunk_kimi_delta_attention = function
    try:
        yield
    finally:
        modeling.chunk_kimi_delta_attention = original


@contextmanager
def state_reset_every(tokens: int) -> Iterator[None]:
    """Ablation: transformers' own recurrence, but the state is zeroed every so many tokens. The conv is not."""
    original = modeling.chunk_kimi_delta_attention

    def forgetful(*inputs: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **options: Any) -> tuple[Any, None]:
        pieces = zip(*(x.split(tokens, 1) for x in (*inputs, g, beta)), strict=True)
        outputs = [original(*piece[:3], g=piece[3], beta=piece[4], **options)[0] for piece in pieces]
        return torch.cat(outputs, 1), None

    with replaced_kda(forgetful):
        yield


def drop(model: KimiLinearForCausalLM, kind: str, share: float) -> None:
    """Let all layers of one kind add nothing to the hidden state of a random share of sequences, in training only."""

    def hook(_module: Any, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        return out * (torch.rand(len(out), 1, 1, device=out.device) >= share) if torch.is_grad_enabled() else out

    for layer in model.model.layers:
        if layer.block_type == kind:
            layer.self_attn.o_proj.register_forward_hook(hook)
