"""Questions to a served model: the rest of a sequence is given, so that every scored position has an answer of its own.

A sequence is a prompt and each answer the most likely token behind a position, by `prompt_logprobs`. Or its first half
is the prompt and the second is decoded, the sequence's own token taken in place of the answer: then the answer is
the most likely token before that, by `logprobs`, which vLLM takes of the logits as the model gave them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams, TokensPrompt
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from serve.common.engine import Engine, engine
from serve.eval.tasks import NOT_SCORED, PAD, Task

SEQUENCES = 64
SEED = 7
BLOCK = 64
REPLAY = "replay"


@dataclass(frozen=True)
class Question:
    """One sequence and what is asked of it."""

    tokens: list[int]
    positions: list[int]  # scored positions in its second half; the first is what there is to remember
    targets: list[int]  # the right answer at each

    @property
    def prompt(self) -> int:
        """Tokens before the part that can be decoded: up to the first position that can be asked."""
        return len(self.tokens) // 2 + 1


@dataclass(frozen=True)
class Answers:
    """What was answered to a question."""

    tokens: list[int]  # the most likely token at each position
    margins: list[float]  # by how many nats it is more likely than the second
    cached: int = 0  # tokens of the prompt that came from the prefix cache

    def right(self, question: Question) -> int:
        """How many are right."""
        return sum(ours == target for ours, target in zip(self.tokens, question.targets, strict=True))


@dataclass(frozen=True)
class Run:
    """Answers to all questions, and what happened on the way."""

    answers: list[Answers]  # in the order of the questions
    steps: int = 0
    most: int = 0  # requests that ran at once
    preemptions: int = 0


class Replay(AdapterLogitsProcessor):  # type: ignore[misc]
    """Makes the sampler take the tokens in a request's `extra_args`, whatever the logits are."""

    def is_argmax_invariant(self) -> bool:
        """No."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """The tokens to take, in order; behind them the model is free again."""
        tokens = (params.extra_args or {}).get(REPLAY)
        if tokens is None:
            return None

        def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits.fill_(-math.inf)
            logits[tokens[len(output)]] = 0
            return logits

        return force


def questions_of(task: Task, counts: dict[int, int], seed: int = SEED) -> list[Question]:
    """Held-out sequences, so many of each length."""
    found = []
    for length, count in counts.items():
        batch = task.sample(count, length, torch.Generator().manual_seed(seed * 10**6 + length), True)
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            scored = [p for p in range(length // 2, length) if targets[p] != NOT_SCORED]
            found.append(Question(tokens, scored, [targets[p] for p in scored]))
    return found


def counts_of(lengths: Sequence[int], sequences: int) -> dict[int, int]:
    """How many of so many sequences have each length: at least one, and about as many tokens of every length."""
    total = sum(1 / length for length in lengths)
    counts = {length: max(1, int(sequences / length / total)) for length in lengths}
    counts[min(lengths)] += sequences - sum(counts.values())
    return counts


@contextmanager
def serving(checkpoint: Path, longest: int, state_dtype: str = "float32", **options: Any) -> Iterator[Engine]:
    """An engine that can be asked questions of up to `longest` tokens, 64 at once."""
    if torch.cuda.is_available():
        forced: dict[str, Any] = {
            "enable_trace_replay": True,
            "enforce_eager": False,
            "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, SEQUENCES]},
        }
    else:
        forced = {"logits_processors": [Replay], "async_scheduling": False}
    defaults = {
        "max_model_len": longest + BLOCK,
        "max_num_seqs": SEQUENCES,
        "max_num_batched_tokens": max(longest, 2048),
        "enable_prefix_caching": True,
        "additional_config": {"kimi": {"state_dtype": state_dtype}},
    }
    with engine(checkpoint, **(defaults | forced | options)) as running:
        yield running


@contextmanager
def step_of(running: Engine, tokens: int) -> Iterator[None]:
    """Let a step compute at most so many tokens, as `--max-num-batched-tokens` would."""
    before = running.scheduler.max_num_scheduled_tokens
    running.scheduler.max_num_scheduled_tokens = tokens
    try:
        yield
    finally:
        running.scheduler.max_num_scheduled_tokens = before


def _parameters(question: Question, decode: bool) -> SamplingParams:
    options: dict[str, Any] = {"prompt_logprobs": 2, "max_tokens": 1}
    if decode:
        rest = [*question.tokens[question.prompt :], PAD]
        options = {"max_tokens": len(rest)}
        if torch.cuda.is_available():
            options["trace_decode_token_ids"] = rest
        else:
            options["extra_args"] = {REPLAY: rest}
    return SamplingParams(temperature=0, logprobs=2, ignore_eos=True, detokenize=False, flat_logprobs=True, **options)


def _read(output: Any, question: Question, decode: bool) -> Answers:
    """Answers of a finished request."""
    prompt, generated = output.prompt_logprobs, output.outputs[0].logprobs
    first = question.prompt if decode else len(question.tokens)
    tokens, margins = [], []
    for position in question.positions:
        entries = prompt[position + 1] if position + 1 < first else generated[position + 1 - first]
        best, second = sorted(entries.items(), key=lambda entry: entry[1].rank)[:2]
        tokens.append(best[0])
        margins.append(best[1].logprob - second[1].logprob)
    return Answers(tokens, margins, output.num_cached_tokens or 0)


def ask(
    running: Engine,
    questions: Sequence[Question],
    *,
    decode: bool = False,
    between: Callable[[int], None] | None = None,
) -> Run:
    """Ask all questions at once.

    Args:
        decode: whether the second half is decoded; else the whole sequence is a prompt.
        between: called after every step with the number of steps so far.
    """
    engine = running.llm.llm_engine
    for number, question in enumerate(questions):
        prompt = question.tokens[: question.prompt] if decode else question.tokens
        engine.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), _parameters(question, decode))
    answers: dict[int, Answers] = {}
    steps, most, preemptions = 0, 0, running.num_preemptions
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                number = int(output.request_id)
                answers[number] = _read(output, questions[number], decode)
        steps, most = steps + 1, max(most, len(running.scheduler.running))
        if between is not None:
            between(steps)
    running.check_idle()
    return Run([answers[n] for n in range(len(questions))], steps, most, running.num_preemptions - preemptions)


def one_shot(running: Engine, questions: Sequence[Question]) -> Run:
    """Every sequence alone, as a prompt in one step."""
    runs = [ask(running, [question]) for question in questions]
    assert all(run.most <= 1 for run in runs)
    return Run([answer for run in runs for answer in run.answers], sum(run.steps for run in runs), 1)


def in_chunks(running: Engine, questions: Sequence[Question], size: int) -> Run:
    """All sequences as prompts, so many tokens in a step: a chunk ends where the step is full."""
    with step_of(running, size):
        run = ask(running, questions)
    assert run.steps >= sum(len(question.tokens) for question in questions) / size
    return run


def at_once(running: Engine, questions: Sequence[Question]) -> Run:
    """All decoded at once, some while others are still prompts."""
    assert running.llm.reset_prefix_cache()
    run = ask(running, questions, decode=True)
    assert run.most == len(questions)
    return run


def after_hit(running: Engine, questions: Sequence[Question]) -> Run:
    """All decoded at once, the first part of every prompt from the prefix cache."""
    assert running.llm.reset_prefix_cache()
    parameters = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    warm = [TokensPrompt(prompt_token_ids=question.tokens[: question.prompt - 21]) for question in questions]
    running.llm.generate(warm, parameters, use_tqdm=False)
    run = ask(running, questions, decode=True)
    block = running.scheduler.block_size
    expected = [(question.prompt - 21) // block * block for question in questions]
    assert any(expected)
    assert all(answer.cached >= hit for answer, hit in zip(run.answers, expected, strict=True))
    return run


def after_preemption(running: Engine, questions: Sequence[Question]) -> Run:
    """All decoded at once, and every running request preempted after 40 steps and again after 100 more."""

    def preempt(steps: int) -> None:
        if steps in (40, 140):
            assert running.llm.reset_prefix_cache(reset_running_requests=True)

    assert running.llm.reset_prefix_cache()
    run = ask(running, questions, decode=True, between=preempt)
    assert run.preemptions >= len(questions)
    return run


MODES: dict[str, Callable[[Engine, Sequence[Question]], Run]] = {
    "one-shot": one_shot,
    "chunks of 37": lambda running, questions: in_chunks(running, questions, 37),
    "chunks of 97": lambda running, questions: in_chunks(running, questions, 97),
    "all at once": at_once,
    "prefix-cache hit": after_hit,
    "after preemption": after_preemption,
}
"""How questions are asked of one engine."""
