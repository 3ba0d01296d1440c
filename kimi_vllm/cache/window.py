"""Speculative decoding: how many tokens of a request a step computes before it is known which of them count."""

from vllm.config import VllmConfig


def window_of(vllm_config: VllmConfig) -> int:
    """A request's next token and its drafts; 0 without speculative decoding."""
    drafts: int = vllm_config.num_speculative_tokens
    return 1 + drafts if drafts else 0
