"""Sends the requests of a batch to a server, some at once, and writes each answer as soon as it is there."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient

from serve.batch.requests import BatchError, Rejected, Request
from serve.batch.results import Results, answered, failed

RETRIES = 3


@dataclass(slots=True)
class Outcome:
    """What became of one line: a line for the output or one for the errors."""

    answer: dict[str, Any] | None
    failure: dict[str, Any] | None = None

    def tokens(self, kind: str) -> int:
        """Tokens of the prompt or of the completion, by the server's count."""
        usage = (self.answer or {}).get("response", {}).get("body", {}).get("usage") or {}
        return int(usage.get(f"{kind}_tokens") or 0)


def client(url: str, key: str, concurrency: int, timeout_seconds: float) -> AsyncOpenAI:
    """OpenAI's client with as many connections as requests at once; it repeats what may pass, with a back-off."""
    timeout = httpx.Timeout(timeout_seconds, connect=30)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    http = DefaultAsyncHttpxClient(limits=limits, timeout=timeout)
    return AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=RETRIES, http_client=http)


async def send(openai: AsyncOpenAI, request: Request) -> Outcome:
    """Post one request and wait for its answer.

    Raises:
        BatchError: the server is gone, which is no fault of the request: it is left for the next run.
    """

    def failure(status: int | None, message: str) -> Outcome:
        return Outcome(None, failed(request.line, request.raw, request.custom_id, status, message))

    try:
        response = await openai.post(request.url, body=request.body, cast_to=httpx.Response)
        body = response.json()
    except APITimeoutError:
        return failure(None, "no answer in time (--timeout)")
    except APIConnectionError as error:
        raise BatchError(f"the server does not answer any more: {error.__cause__ or error}") from error
    except APIStatusError as error:
        if error.status_code >= 500 and not await healthy(openai):
            raise BatchError(f"the server is not healthy any more: {error.message}") from error
        return failure(error.status_code, error.message)
    except json.JSONDecodeError as error:
        return failure(response.status_code, f"the answer is not JSON: {error}")
    return Outcome(answered(request, response.status_code, body))


async def healthy(openai: AsyncOpenAI) -> bool:
    """Whether the server says it can work. vLLM answers 500 to requests that a dying engine takes with it."""
    try:
        await openai.get("/health", cast_to=httpx.Response)
    except (APIConnectionError, APIStatusError):
        return False
    return True


@dataclass
class Run:
    """One run over the lines that are left."""

    lines: Iterator[Request | Rejected]  # read one at a time, when somebody can take the next
    send: Callable[[Request], Any]
    sink: Results
    # gets the numbers of lines answered and failed, and their prompt and output tokens
    advance: Callable[[int, int, int, int], None]
    _pending: list[Outcome] = field(default_factory=list)

    async def run(self, concurrency: int) -> None:
        """Work with so many requests at once until no line is left.

        Raises:
            ExceptionGroup: with the first error; what was answered until then is written.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._work())
        finally:
            self._flush()

    async def _work(self) -> None:
        for line in self.lines:
            if isinstance(line, Rejected):
                outcome = Outcome(None, failed(line.line, line.raw, None, None, line.reason))
            else:
                outcome = await self.send(line)
            self._pending.append(outcome)
            # Others that have an answer by now add theirs first; then one sync is enough for all.
            await asyncio.sleep(0)
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        outcomes, self._pending = self._pending, []
        answers = [outcome.answer for outcome in outcomes if outcome.answer]
        failures = [outcome.failure for outcome in outcomes if outcome.failure]
        self.sink.write(answers, failures)
        prompt, output = (sum(outcome.tokens(kind) for outcome in outcomes) for kind in ("prompt", "completion"))
        self.advance(len(answers), len(failures), prompt, output)
