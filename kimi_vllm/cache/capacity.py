"""How many requests the blocks serve that states and KV cache share.

Pure: no vLLM, no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_SHOWN = (2**10, 2**12, 2**15, 2**17, 2**20)
"""Lengths of requests in the engine's log."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Blocks, and what they serve.

    Attributes:
        blocks: Blocks of every worker, vLLM's null block included.
        block_size: Tokens per block.
        state_blocks: Blocks of one state.
    """

    blocks: int
    block_size: int
    state_blocks: int

    @property
    def tokens(self) -> int:
        """Tokens that all blocks hold, without a state."""
        return max(0, self.blocks - 1) * self.block_size

    def held(self, tokens: int) -> int:
        """Blocks of one request of `tokens` tokens."""
        return self.state_blocks + -(-tokens // self.block_size)

    def concurrency(self, tokens: int) -> int:
        """Requests of `tokens` tokens that run at once without preemption."""
        return max(0, self.blocks - 1) // self.held(tokens)

    def average(self, lengths: Mapping[int, float]) -> float:
        """Requests that run at once on average, if those that run have these lengths in these shares."""
        return max(0, self.blocks - 1) / sum(share * self.held(tokens) for tokens, share in lengths.items())

    def longest(self, requests: int) -> int:
        """Tokens that each of so many concurrent requests can have."""
        return max(0, max(0, self.blocks - 1) // requests - self.state_blocks) * self.block_size

    def table(self, max_num_seqs: int, max_model_len: int) -> str:
        """The log message of the engine at start, once vLLM has counted the blocks."""
        lengths = sorted({tokens for tokens in _SHOWN if tokens < max_model_len} | {max_model_len})
        fits = ", ".join(f"{min(max_num_seqs, self.concurrency(tokens)):,} of {tokens:,}" for tokens in lengths)
        return f"""kimi-vllm: states and KV cache share {self.blocks:,} blocks:
  tokens   {self.tokens:,} in blocks of {self.block_size}
  state    {self.state_blocks:,} blocks per request
  at once  {fits} tokens (--max-num-seqs {max_num_seqs:,})"""
