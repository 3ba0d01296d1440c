"""Ten thousand questions to one engine that is short of everything, each answer checked.

Slots are few, so checkpoints are evicted, some to host memory and back; pages are few, so requests are preempted;
requests are aborted at random. After every step each block must have one owner, at the end none may be in use, and what
the tiny checkpoint was told it must recall: a state that was lost, mixed up or reused too early is a wrong answer.
"""

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from serve.common.engine import Engine, engine
from serve.common.environment import ENGINE, prepare
from serve.common.paths import RECALL
from serve.common.rows import save
from serve.demo.recall_task import Plan, Turn, held_out_prompt, make_conversation

SEQUENCES = 16
SHORTAGE: dict[str, Any] = {
    "max_num_seqs": SEQUENCES,
    "max_num_batched_tokens": 397,
    "num_gpu_blocks_override": 70,  # a state has 8
    "enable_prefix_caching": True,
    "additional_config": {"kimi": {"host_memory_gib": 0.005}},
}
WITH_TEXT = {"skip_tokenizer_init": False}
PLENTY: dict[str, Any] = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1024,
    "num_gpu_blocks_override": 60,
    "enable_prefix_caching": False,
}
WAITING = 8
ABORTED = 0.002
SHORT_ANSWER, LONG_ANSWERS = 8, (40, 150)
CONVERSATIONS = 12


@dataclass(frozen=True, slots=True)
class Question:
    """One request."""

    prompt: str  # text with the question at its end
    answer: str  # one digit
    max_tokens: int  # more than a few makes the model go on after its answer, which is then the first character

    @property
    def long(self) -> bool:
        """Whether the model must go on after its answer."""
        return self.max_tokens > SHORT_ANSWER

    def is_answered_by(self, text: str) -> bool:
        """Whether this is the answer, or for a long one begins with it."""
        return text.strip().startswith(self.answer) if self.long else text.strip() == self.answer


def questions(rng: random.Random) -> Iterator[Question]:
    """Endless: single questions that training never saw, and turns of conversations, which share prefixes."""
    shelf: list[list[Turn]] = []
    while True:
        max_tokens = rng.randint(*LONG_ANSWERS) if rng.random() < 0.2 else SHORT_ANSWER
        if rng.random() < 0.3:
            facts = rng.randint(1, 20)
            yield Question(*held_out_prompt(rng, facts, rng.choice([0, 0, 50, 100, 300])), max_tokens)
            continue
        if len(shelf) < CONVERSATIONS or rng.random() < 0.05:
            later = tuple(rng.choice([0, 0, 1, 2]) for _ in range(rng.randint(2, 5)))
            # The first turn alone may span several blocks: that is the prefix which the others share.
            plan = Plan(rng.randint(4, 12), later, filler_chars=rng.choice([0, 50, 150, 300]))
            shelf = [make_conversation(rng, plan), *shelf][:CONVERSATIONS]
        turns = shelf[min(int(rng.expovariate(0.35)), len(shelf) - 1)]
        count = rng.randint(1, len(turns))
        told = "".join(f"{turn.text} {turn.answer}<eos> " for turn in turns[: count - 1])
        yield Question(told + turns[count - 1].text, turns[count - 1].answer, max_tokens)


def ask(running: Engine, name: str, question: Question) -> None:
    """Queue a question."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=question.max_tokens, ignore_eos=question.long)
    running.llm.llm_engine.add_request(name, question.prompt, parameters)


def num_leaked(running: Engine) -> int:
    """Slots and pages still in use, though no request is left."""
    pages = running.scheduler.kv_cache_manager.block_pool
    # One page is the null block, which is never free.
    in_use = pages.num_gpu_blocks - 1 - pages.get_num_free_blocks()
    return int(running.slots.num_live + len(running.manager.req_to_blocks) + in_use)


def soak(requests: int, seed: int = 0, progress: Progress | None = None, drafts: int = 0) -> dict[str, Any]:
    """Ask so many questions.

    Args:
        drafts: n-gram drafts a step, 0 for none.

    Returns:
        What happened. A wrong answer is one that the same question, asked alone of an engine that caches nothing and
        lacks nothing, does not get; where it does, the mistake is the tiny model's own and counted apart.
    """
    rng = random.Random(seed)
    source = questions(rng)
    counts = Counter[str]()
    asked: dict[str, Question] = {}
    doubtful: list[tuple[Question, str]] = []
    progress = progress or Progress(disable=True)
    task = progress.add_task("asking", total=requests)
    started = time.perf_counter()
    with engine(RECALL, **WITH_TEXT, **_short(drafts)) as running:
        vllm = running.llm.llm_engine
        while counts["requests"] < requests or asked:
            while counts["requests"] < requests and len(asked) < SEQUENCES + WAITING:
                name = f"q{counts['requests']}"
                asked[name] = next(source)
                ask(running, name, asked[name])
                counts["requests"] += 1
            for name in [name for name in asked if rng.random() < ABORTED]:
                vllm.abort_request([name])
                del asked[name]
                counts["aborted"] += 1
            for output in vllm.step():
                question = asked.get(output.request_id)
                if question is None or not output.finished:
                    continue
                del asked[output.request_id]
                _count(counts, question, output)
                if not question.is_answered_by(output.outputs[0].text):
                    doubtful.append((question, output.outputs[0].text))
            counts["steps"] += 1
            running.scheduler.check_memory()
            running.manager.block_pool.host.check()
            progress.update(task, completed=counts["requests"] - len(asked))
        while vllm.has_unfinished_requests():
            vllm.step()
        vllm.step()  # the scheduler hears of the last aborts
        seconds = time.perf_counter() - started
        happened = {**counts, **running.counts, "preemptions": running.num_preemptions, "leaked": num_leaked(running)}
    mistakes = _model_mistakes(doubtful)
    return happened | {
        "wrong": len(doubtful) - mistakes,
        "model_mistakes": mistakes,
        "seconds": round(seconds, 1),
    }


def _short(drafts: int) -> dict[str, Any]:
    ngram = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_min": 1, "prompt_lookup_max": 4}
    return SHORTAGE | ({"speculative_config": ngram} if drafts else {})


def _count(counts: Counter[str], question: Question, output: Any) -> None:
    counts["finished"] += 1
    counts["long_answers"] += question.long
    counts["hits"] += bool(output.num_cached_tokens)
    counts["prompt_tokens"] += len(output.prompt_token_ids)
    counts["cached_tokens"] += output.num_cached_tokens or 0
    counts["output_tokens"] += len(output.outputs[0].token_ids)


def _model_mistakes(doubtful: list[tuple[Question, str]]) -> int:
    if not doubtful:
        return 0
    with engine(RECALL, **WITH_TEXT, **PLENTY) as alone:
        return sum(_answer(alone, question) == text for question, text in doubtful)


def _answer(running: Engine, question: Question) -> str:
    ask(running, "alone", question)
    outputs: list[Any] = []
    while running.llm.llm_engine.has_unfinished_requests():
        outputs = running.llm.llm_engine.step()
    return str(outputs[0].outputs[0].text)


def main(
    requests: Annotated[int, typer.Option(min=1, help="Questions to ask.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of questions and aborts.")] = 0,
    drafts: Annotated[int, typer.Option(min=0, help="N-gram drafts a step; 0 for none.")] = 0,
    output: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Ask the tiny checkpoint many questions while slots, pages and memory are short, and check every answer.

    Exit status: 0 if no answer was wrong and no slot or page leaked, 1 if not.
    """
    prepare(ENGINE)
    console = Console(highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        counts = soak(requests, seed, progress, drafts)
    for name, value in counts.items():
        console.print(f"{name.replace('_', ' '):15} {value:>10,}")
    if output is not None:
        command = f"python -m serve.soak --requests {requests} --seed {seed}" + (
            f" --drafts {drafts}" if drafts else ""
        )
        save(output, {"bench": "soak", "command": command, "counts": counts, "engine": _short(drafts)}, "torch")
    raise typer.Exit(1 if counts["wrong"] or counts["leaked"] else 0)


if __name__ == "__main__":
    typer.run(main)
