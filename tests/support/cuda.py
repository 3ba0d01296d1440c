"""What tests of logits on a GPU share."""

from typing import Any

import torch

# Every expert is chosen: with few of them, rounding moves a token to another expert now and then, and no bound on
# rounding errors bounds that. Weights are as small as the 48B model's were at first; with the larger ones of the other
# tests transformers' own bfloat16 is 7 % off its float32.
SMOOTH: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 6, "initializer_range": 0.02}

# For these vLLM has other attention kernels than for small heads.
HEADS_OF_48B: dict[str, Any] = SMOOTH | {
    "linear_num_heads": 32,
    "linear_head_dim": 128,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "layer_types": "KKMK",
    "mlp_layer_types": "dsss",
}


def distributions(output: Any, vocab_size: int) -> torch.Tensor:
    """Log-probabilities of every token at every position but the first: ``[T - 1, vocab]``."""
    rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    table = torch.full((len(rows), vocab_size), torch.nan)
    for row, candidates in zip(table, rows, strict=True):
        for token, candidate in candidates.items():
            row[token] = candidate.logprob
    return table


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of a request's logits, which log-probabilities are up to a constant: norm of the difference over the norm."""
    ours, theirs = (table - table.mean(-1, keepdim=True) for table in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()
