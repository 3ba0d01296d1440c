"""A chat that outlives its server: saved by one as a session, resumed by the next."""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from serve.demo.recall_task import Memory, filler, question

SESSION = "demo"
_FILLER = 500


@dataclass(frozen=True, slots=True)
class Resumed:
    """How a chat went on.

    Attributes:
        expected, text: The right answer, and what came back.
        saved: Tokens of the session.
        cached: Of the prompt, the tokens that were not computed again.
        prompt_tokens: Of the whole chat.
    """

    expected: str
    text: str
    saved: int
    cached: int
    prompt_tokens: int

    @property
    def right(self) -> bool:
        """The answer is right, and comes from the session."""
        return self.text == self.expected and self.cached == self.saved > 0


class Chat:
    """Facts and a question to one server, another question about the same facts to the next."""

    def __init__(self, model: str, rng: random.Random) -> None:
        memory = Memory()
        facts = [memory.add(rng, key) for key in "akmx"]
        words = filler(rng, _FILLER)
        middle = len(words) // 2
        self._text = " ".join([*facts[:2], *words[:middle], *facts[2:], *words[middle:]])
        self._model, self._values = model, memory.values
        self._answer, self._saved = "", 0

    def begin(self, url: str) -> bool:
        """Ask and have the chat saved; whether the answer is right."""
        answer = self._ask(url, [("user", question(self._text, "k"))], save=SESSION)
        self._answer = answer.choices[0].message.content or ""
        self._saved = (answer.kv_transfer_params or {}).get("tokens", 0)
        return self._answer.strip() == self._values["k"]

    def go_on(self, url: str) -> Resumed:
        """Ask a server that has never seen the facts."""
        turns = [("user", question(self._text, "k")), ("assistant", self._answer), ("user", question("", "a"))]
        answer = self._ask(url, turns, load=SESSION)
        return Resumed(
            self._values["a"],
            (answer.choices[0].message.content or "").strip(),
            self._saved,
            answer.usage.prompt_tokens_details.cached_tokens,
            answer.usage.prompt_tokens,
        )

    def _ask(self, url: str, turns: list[tuple[str, str]], **wanted: str) -> Any:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)
        messages: Any = [{"role": role, "content": content} for role, content in turns]
        extra = {"kv_transfer_params": wanted}
        return client.chat.completions.create(
            model=self._model, messages=messages, max_tokens=8, temperature=0, extra_body=extra
        )


def empty(folder: Path) -> Path:
    """A new folder in the place of one that may be there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
