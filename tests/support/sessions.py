"""Requests that save and load sessions, in engines of a test's own."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.engine import RECALL, Completion, Engine, check_cold, completion, engine, random_prompts

LENGTHS = [5, 24, 25, 63, 64, 65, 88, 127, 128, 129, 200, 300]
"""With answers of 40, files end at these and 39: at and between multiples of 64."""

ANSWER = 40


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """Of an engine that keeps sessions there; `kimi` are further ones of the plugin."""
    kimi = {"session_dir": str(folder)} | more.pop("kimi", {})
    return {"enable_prefix_caching": True, "additional_config": {"kimi": kimi}} | more


def parameters(
    max_tokens: int = ANSWER,
    stop: int | None = None,
    prompt_logprobs: int | None = None,
    cold: bool | None = None,
    **wanted: Any,
) -> Any:
    """Greedy, up to a token that stops it or to the last; `wanted` is what is saved and loaded."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        stop_token_ids=None if stop is None else [stop],
        logprobs=0,
        prompt_logprobs=prompt_logprobs,
        skip_reading_prefix_cache=cold,
        detokenize=False,
        extra_args={"kv_transfer_params": wanted},
    )


def complete(running: Engine, prompts: Sequence[list[int]], sampling: Sequence[Any], salt: str | None = None) -> Any:
    """What vLLM answers to prompts of token ids, all at once, when what ended has been written."""
    from vllm import TokensPrompt

    inputs = [TokensPrompt(prompt_token_ids=prompt, **({"cache_salt": salt} if salt else {})) for prompt in prompts]
    outputs = running.llm.generate(inputs, sampling, use_tqdm=False)
    settle(running)
    return outputs


def ask(
    running: Engine,
    prompts: Sequence[list[int]],
    names: Sequence[Any],
    what: str,
    max_tokens: int = ANSWER,
    salt: str | None = None,
) -> list[Completion]:
    """Complete prompts, each with a session of its own to save or to load."""
    sampling = [parameters(max_tokens, **{what: name}) for name in names]
    return [completion(output) for output in complete(running, prompts, sampling, salt)]


def settle(running: Engine) -> None:
    """Let what ended be written: an engine in this process steps only when it is asked to."""
    while running.scheduler.has_requests():
        running.llm.llm_engine.step()
    running.check_idle()


def save(
    folder: Path,
    prompts: Sequence[list[int]],
    names: Sequence[str],
    checkpoint: Path = RECALL,
    *,
    salt: str | None = None,
    **more: Any,
) -> Any:
    """Save sessions in an engine of their own, and return prompts that go on where they ended."""
    with engine(checkpoint, **options(folder, **more)) as running:
        done = ask(running, prompts, names, "save", salt=salt)
        assert counts(running)["sessions_saved"] == len(names), counts(running)
    tail = random.Random(8)
    return [one.prompt + one.tokens + [tail.randrange(3, 100) for _ in range(tail.choice((1, 2, 70)))] for one in done]


def near(one: Completion, other: Completion) -> bool:
    """The same next token, about as likely: rounding depends on the steps in which a prompt is computed."""
    return one.tokens[0] == other.tokens[0] and abs(one.logprobs[0] - other.logprobs[0]) < 0.2


def check_stops(running: Engine) -> None:
    """Sessions of answers that a token has ended go on behind that token, which a step in flight has computed."""
    prompts, names = random_prompts([30, 63, 64, 100], 100), ["a", "b", "c", "d"]
    whole = ask(running, prompts, names, "save")
    for at in range(3, 8):
        sampling = [parameters(stop=one.tokens[at], save=name) for one, name in zip(whole, names, strict=True)]
        stopped = [completion(output) for output in complete(running, prompts, sampling)]
        running.llm.reset_prefix_cache()
        done = ask(running, [one.prompt + one.tokens + [7, 8, 9] for one in stopped], names, "load")
        assert [len(one.prompt) - one.cached for one in done] == [3] * 4
        check_cold(running, done)
    assert counts(running)["sessions_unsaved"] == counts(running)["sessions_missed"] == 0


def counts(running: Engine) -> Any:
    """Sessions resumed, missed, saved, unsaved and deleted so far."""
    return running.scheduler.connector.counts


def flip(path: Path, place: int) -> None:
    """Change a bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
