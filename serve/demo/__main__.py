"""`make demo`: serve a tiny trained Kimi Linear model with vLLM on this CPU, ask it, and check every answer.

A chat is saved as a session, and goes on after the server was restarted.

The checkpoint in configs/models/recall has one skill: after `a=7 k=2 ? k →` it answers `2`.
A layer that forgets, or a state that another request can touch, shows as a wrong answer.
"""

import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any

import typer
from openai import AsyncOpenAI, OpenAIError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kimi_vllm.cli.doctor import check_entry_point, check_environment, check_vllm_command
from serve.common.paths import RECALL, ROOT
from serve.common.server import Server, ServerError
from serve.demo.recall_task import held_out_prompt
from serve.demo.sessions import SESSION, Chat, empty

NAME = "kimi-recall"
LOG = ROOT / ".demo" / "server.log"
SESSIONS = ROOT / ".demo" / "sessions"
CONCURRENT = 8
LONG_ANSWER = 64
PROFILE = ROOT / "configs" / "serve" / "cpu-demo.yaml"
# Logged by kimi_vllm only. Without it vLLM's own model could answer and nobody would notice.
PLUGIN_LINE = "kimi-vllm serves KimiLinearForCausalLM"

console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Question:
    """Something to ask."""

    title: str  # what the question shows
    turns: tuple[str, ...]  # what was said, the user first; the last one is asked
    expected: str  # the right answer
    chat: bool = False  # whether to use the chat endpoint; a completion has one turn
    max_tokens: int = 8  # length of the answer; more than a few makes the model go on after its answer is complete


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    text: str
    right: bool  # whether it is, or for a long one begins with, what was expected
    ttft_seconds: float  # from the request to the first text
    total_seconds: float  # from the request to the end
    prompt_tokens: int
    output_tokens: int


def questions(rng: random.Random) -> list[Question]:
    """Prompts that training never saw, from short to long, and a chat of two turns."""

    def held_out(title: str, num_pairs: int, filler_chars: int = 0, *, chat: bool = False) -> Question:
        prompt, expected = held_out_prompt(rng, num_pairs, filler_chars)
        return Question(title, (prompt,), expected, chat)

    return [
        held_out("3 facts", 3),
        held_out("8 facts", 8),
        held_out("far apart", 4, 500),
        held_out("chat", 5, chat=True),
        Question("chat, turn 2", ("a=7 k=2 m=5 ? k →", "2", "? a →"), "7", chat=True),
    ]


async def ask(client: AsyncOpenAI, question: Question) -> Answer:
    """Ask one question and stream the answer."""
    start = time.perf_counter()
    first = 0.0
    text = ""
    prompt_tokens = output_tokens = 0
    async for event in await _request(client, question):
        if event.usage is not None:
            prompt_tokens, output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
        for choice in event.choices:
            piece = (choice.delta.content if question.chat else choice.text) or ""
            first = first or (time.perf_counter() if piece else 0.0)
            text += piece
    end = time.perf_counter()
    long = question.max_tokens >= LONG_ANSWER
    right = text.strip().startswith(question.expected) if long else text.strip() == question.expected
    return Answer(text.strip(), right, (first or end) - start, end - start, prompt_tokens, output_tokens)


async def _request(client: AsyncOpenAI, question: Question) -> AsyncIterator[Any]:
    long = question.max_tokens >= LONG_ANSWER
    common: dict[str, Any] = {
        "model": NAME,
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {"ignore_eos": True} if long else {},
    }
    if not question.chat:
        (prompt,) = question.turns
        return await client.completions.create(prompt=prompt, **common)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(question.turns)]
    return await client.chat.completions.create(messages=messages, **common)


async def ask_all(client: AsyncOpenAI, rng: random.Random) -> bool:
    """Ask the questions one by one, then many at once; print both; return whether all answers were right."""
    table = Table("question", "asked", "answer", "expected", "first token", "tok/s", box=SIMPLE_HEAD)
    one_by_one = []
    for question in questions(rng):
        answer = await ask(client, question)
        one_by_one.append(answer)
        table.add_row(
            question.title,
            Text(_shorten(" ".join(question.turns)), no_wrap=True),
            Text(f"{answer.text} {'✓' if answer.right else '✗'}", "green" if answer.right else "bold red"),
            question.expected,
            f"{answer.ttft_seconds * 1e3:.0f} ms",
            f"{answer.output_tokens / answer.total_seconds:.0f}",
        )
    console.print(table)

    prompts = [held_out_prompt(rng, 4, 200) for _ in range(CONCURRENT)]
    at_once = [Question("", (prompt,), answer, max_tokens=LONG_ANSWER) for prompt, answer in prompts]
    start = time.perf_counter()
    answers = await asyncio.gather(*(ask(client, question) for question in at_once))
    seconds = time.perf_counter() - start
    num_right = sum(answer.right for answer in answers)
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    output_tokens = sum(answer.output_tokens for answer in answers)
    console.print(
        f"  {CONCURRENT} requests at once: {num_right} right, {prompt_tokens} prompt and {output_tokens} "
        f"output tokens in {seconds:.1f} s, {output_tokens / seconds:.0f} output tokens/s\n"
    )
    return all(answer.right for answer in [*one_by_one, *answers])


def _shorten(text: str, length: int = 21) -> str:
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def _refuse_inactive_plugin() -> None:
    for finding in (check_environment(), check_entry_point(), check_vllm_command()):
        if finding.status != "OK":
            raise ServerError(f"{finding.found}. To fix it: {finding.fix}")


def _server(port: int) -> Server:
    kimi = json.dumps({"kimi": {"session_dir": str(SESSIONS)}})
    return Server(RECALL, LOG, "--config", str(PROFILE), "--additional-config", kimi, name=NAME, port=port)


def _serve_and_ask(port: int, *, keep: bool) -> bool:
    _refuse_inactive_plugin()
    empty(SESSIONS)
    chat = Chat(NAME, random.Random(1))
    with _server(port) as server:
        seconds = server.wait_ready(300, console)
        if PLUGIN_LINE not in LOG.read_text(errors="replace"):
            raise ServerError(
                f"vLLM started without kimi-vllm: {LOG} has no line {PLUGIN_LINE!r}. Run .venv/bin/kimi-vllm doctor."
            )
        console.print(f"vLLM is ready after {seconds:.0f} s and serves {NAME} with kimi-vllm at {server.url}/v1")
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0)
        try:
            right = asyncio.run(ask_all(client, random.Random(0)))
            right &= chat.begin(server.url)
        except OpenAIError as error:
            raise ServerError(f"the server did not answer: {error}\n{server.why()}") from error
    with _server(port) as server:
        seconds = server.wait_ready(300, console)
        try:
            resumed = chat.go_on(server.url)
        except OpenAIError as error:
            raise ServerError(f"the server did not answer: {error}\n{server.why()}") from error
        console.print(
            f"Restarted in {seconds:.0f} s. Session {SESSION!r} goes on: {resumed.cached} of {resumed.prompt_tokens} "
            f"prompt tokens come from disk, the answer is {resumed.text} {'✓' if resumed.right else '✗'}\n"
        )
        right &= resumed.right
        server.keep = keep
        if keep:
            console.print(f"The server is still running; its log is {LOG}. To stop it: kill {server.process.pid}")
    return right


def main(
    port: Annotated[int, typer.Option(min=1, max=65534, help="Port of the server on 127.0.0.1.")] = 8000,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running at the end.")] = False,
) -> None:
    """Serve a tiny trained Kimi Linear model with vLLM and kimi-vllm on this CPU, ask it, check the answers.

    Exit status: 0 if all answers are right, 1 if not.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        right = _serve_and_ask(port, keep=keep)
    except ServerError as error:
        console.print(Text(f"make demo: {error}", style="red"))
        raise typer.Exit(1) from error
    console.print("[green]All answers are right.[/]" if right else "[bold red]Some answers are wrong.[/]")
    raise typer.Exit(0 if right else 1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Leave through the context managers, so that the server is stopped."""
    sys.exit(128 + number)


if __name__ == "__main__":
    typer.run(main)
