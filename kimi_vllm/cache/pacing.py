"""How large a step is that has tokens of prompts beside requests that decode, which wait for the whole step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STEP_TOKENS = 2048
"""Tokens of a short step by default. On an H100 and an H200 those of 1,024 are hardly shorter (kernels/NOTES.md)."""
GRAPH_TOKENS, GRAPH_TOKENS_OF_SEVERAL = 4096, 8192
"""Tokens of the largest step that has a CUDA graph by default, on one GPU and on several.

One GPU is busy with 8,192 tokens for longer than the host with their launches, and graphs of that size took 0.9 GiB on
an H200. Two have half the work each, and as many launches.
"""
FEW = 4
"""Prompts for whose number alone throughput never decides."""


def for_decodes(decoding: int, prompts: int) -> bool:
    """Return whether a step is to be short for the requests that decode, rather than full for the prompts.

    Where more than a quarter as many wait for a first token as for the next one, a full step helps more of them.

    Args:
        decoding: Requests that have their prompts behind them.
        prompts: Requests whose prompts the step could have tokens of.
    """
    return decoding > 0 and 0 < prompts <= max(FEW, decoding // 4)


def graph_sizes(captured: int, most: int) -> list[int]:
    """Return for which sizes of steps with prompts CUDA graphs are captured, beyond those of up to `captured` tokens.

    Outside of graphs a step of the 48B model waits for its launches, 70 to 100 ms however few its tokens are. From 512
    on, where padding costs time, sizes are an eighth of a power of two apart, from 2,048 on a quarter.
    """
    sizes = []
    while captured < most:
        parts = 8 if captured < STEP_TOKENS else 4
        captured += captured if captured < 512 else (1 << (captured.bit_length() - 1)) // parts
        sizes.append(min(captured, most))
    return sizes


def short_step(vllm_config: Any, given: int | None, *, on_cpu: bool) -> int:
    """Return the tokens of a short step, 0 if there is none.

    Args:
        vllm_config: vLLM's configuration, complete.
        given: The option's value; None: the default, which is none where steps of that size have no CUDA graphs.
        on_cpu: Whether the engine runs on a CPU.
    """
    if given is not None or on_cpu:
        return given or 0
    scheduling, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    graphs = compilation.cudagraph_mode.mixed_mode().value and compilation.max_cudagraph_capture_size
    by_turns = scheduling.prefill_schedule_interval > 1
    enough = min(STEP_TOKENS, scheduling.max_num_batched_tokens)
    return STEP_TOKENS if graphs >= enough and scheduling.enable_chunked_prefill and not by_turns else 0


@contextmanager
def paced(scheduler: Any, step_tokens: int) -> Iterator[None]:
    """Let a step that vLLM's scheduler puts together in here be short, if that is for its decodes.

    Args:
        scheduler: A `vllm.v1.core.sched.scheduler.Scheduler`.
        step_tokens: Tokens of a short step, of which prompts get a quarter in any case; 0 if there is none.
    """
    decoding = [request for request in scheduler.running if _decodes(request)] if step_tokens else []
    if not decoding or not for_decodes(len(decoding), _prompts(scheduler)):
        yield
        return
    decodes = sum([max(0, _left(request)) for request in decoding])
    most = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = min(most, max(step_tokens, decodes - step_tokens // -4))
    # vLLM goes through them in order, and some prompts could be ahead and take all.
    scheduler.running.sort(key=lambda request: request.is_prefill_chunk)
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = most


def _decodes(request: Any) -> bool:
    if request.is_prefill_chunk:
        return False
    # With steps in flight, its last token can be on its way; vLLM asks the same.
    in_flight = request.num_output_placeholders
    known = request.num_computed_tokens + 2 - in_flight
    return not in_flight or bool(known < request.num_prompt_tokens + request.max_tokens)


def _left(request: Any) -> int:
    return int(request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens)


def _prompts(scheduler: Any) -> int:
    """Requests that compute their prompt, and those for which there is a seat."""
    running, waiting = scheduler.get_request_counts()
    idle = scheduler.num_waiting_for_streaming_input
    admitted = max(0, min(waiting - idle, scheduler.max_num_active_reqs - running - idle))
    return int(sum([request.is_prefill_chunk for request in scheduler.running]) + admitted)
