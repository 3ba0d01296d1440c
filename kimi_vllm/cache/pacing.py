"""How large a step is that has tokens of prompts beside requests that decode: their next tokens come when it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FEW = 4
"""Prompts for whose number alone throughput never decides."""


def for_decodes(decoding: int, prompts: int) -> bool:
    """Return whether a step is to be short for the requests that decode, rather than full for the prompts.

    Where more than a quarter as many wait for a first token as for the next one, a full step helps more of them.

    Args:
        decoding: Requests that have their prompts behind them.
        prompts: Requests that wait for a first token, whether or not they run.
    """
    return decoding > 0 and 0 < prompts <= max(FEW, decoding // 4)


def prompt_tokens(step_tokens: int, decode_tokens: int) -> int:
    """Return how many tokens of prompts a short step may have: what its decodes leave, or half of it."""
    return max(step_tokens - decode_tokens, -(-step_tokens // 2))


def graph_sizes(captured: int, step_tokens: int) -> list[int]:
    """Return for which sizes of short steps CUDA graphs are captured, beyond those of up to `captured` tokens.

    Outside of graphs a step of the 48B model waits for its launches, some 70 ms however few its tokens are. Sizes are
    an eighth of a power of two apart, so at most that share of a step is padding.
    """
    sizes = []
    while captured < step_tokens:
        captured = min(step_tokens, captured + max(1, (1 << (captured.bit_length() - 1)) // 8))
        sizes.append(captured)
    return sizes


@contextmanager
def paced(scheduler: Any, step_tokens: int) -> Iterator[None]:
    """Let a step that vLLM's scheduler puts together in here be short, if that is for its decodes.

    Args:
        scheduler: A `vllm.v1.core.sched.scheduler.Scheduler`.
        step_tokens: Tokens of a short step; 0 if none is.
    """
    running, waiting = scheduler.get_request_counts()
    decoding = sum(not request.is_prefill_chunk for request in scheduler.running) if step_tokens else 0
    if not for_decodes(decoding, running - decoding + waiting):
        yield
        return
    config, most = scheduler.scheduler_config, scheduler.max_num_scheduled_tokens
    decodes = decoding * (1 + scheduler.num_spec_tokens)
    prompts = prompt_tokens(step_tokens, decodes)
    scheduler.max_num_scheduled_tokens = min(most, decodes + prompts)
    # Else a prompt ahead of them, as of a session that got more input, would take what is meant for the decodes.
    config.long_prefill_token_threshold = prompts
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens, config.long_prefill_token_threshold = most, 0
