"""The recall task: facts such as `a=7 k=2`, then a question `? k →`, then ` 2` and the end of the text.

A sequence is a conversation of several turns: `a=7 k=2 ? k → 2<eos> ? a → 7<eos>`. Later turns may add
facts. A fact may be written twice: the later one counts. A fact may name an earlier key, `m=a`: its value is
that of `a`, which takes two look-ups.
"""

import hashlib
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass, field

KEYS = string.ascii_lowercase
VALUES = string.digits
ARROW = "→"
_HELD_OUT_IN = 10
_WORD_CHARS = KEYS * 8 + string.ascii_uppercase + VALUES + ".,;:!'-" * 2


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the tenth of all prompts that is never trained on."""
    return hashlib.sha256(prompt.encode()).digest()[0] % _HELD_OUT_IN == 0


def question(facts: str, key: str) -> str:
    """The prompt that asks for one key after some facts."""
    return f"{facts} ? {key} {ARROW}".lstrip()


def filler(rng: random.Random, length: int) -> list[str]:
    """Words without facts in them, of two characters or more: `length` characters (not 1) when joined."""
    words: list[str] = []
    while length > 0:
        size = rng.randint(2, 8)
        if length - size - 1 < 2:
            size = length
        words.append("".join(rng.choices(_WORD_CHARS, k=size)))
        length -= size + 1
    return words


@dataclass
class Memory:
    """The facts so far."""

    text: list[str] = field(default_factory=list)  # words, facts and filler
    values: dict[str, str] = field(default_factory=dict)  # the digit of each key
    references: list[str] = field(default_factory=list)  # keys whose fact names an earlier key

    def add(self, rng: random.Random, key: str, target: str | None = None) -> str:
        """Write one fact, with a random digit or the name of another key, and return its text."""
        self.values[key] = self.values[target] if target else rng.choice(VALUES)
        if target:
            self.references.append(key)
        return f"{key}={target or self.values[key]}"

    def ask(self, rng: random.Random, favour_references: float) -> tuple[str, str]:
        """A key to ask for and its value; with this probability one of the references, if there are any."""
        wanted = self.references and rng.random() < favour_references
        key = rng.choice(self.references if wanted else list(self.values))
        return key, self.values[key]


def _hide(rng: random.Random, facts: list[str], filler_chars: int) -> list[str]:
    """Put filler between the facts, in up to three pieces."""
    noise, words = filler(rng, filler_chars), list(facts)
    for _ in range(rng.randint(1, 3)):
        cut = rng.randint(0, len(noise))
        position = rng.randint(0, len(words))
        words[position:position] = noise[cut:]
        noise = noise[:cut]
    return noise + words


def make_prompt(rng: random.Random, num_pairs: int, filler_chars: int = 0, references: int = 0) -> tuple[str, str]:
    """One question over distinct keys.

    Args:
        num_pairs: facts in the prompt, 1 to 26.
        filler_chars: characters without facts that are strewn in, 0 or at least 2.
        references: facts, fewer than all, that name an earlier key. If any does, the question is about one.

    Returns:
        Prompt and answer: `("a=7 k=2 m=5 ? k →", "2")`. The model writes a space, the answer, the end token.
    """
    memory, keys = Memory(), rng.sample(KEYS, num_pairs)
    plain = num_pairs - references
    facts = [memory.add(rng, key) for key in keys[:plain]]
    facts += [memory.add(rng, key, rng.choice(keys[:plain])) for key in keys[plain:]]
    key, answer = memory.ask(rng, favour_references=1.0)
    return question(" ".join(_hide(rng, facts, filler_chars)), key), answer


def held_out_prompt(rng: random.Random, num_pairs: int, filler_chars: int = 0, references: int = 0) -> tuple[str, str]:
    """Like `make_prompt`, from the prompts that training never saw."""
    while True:
        prompt, answer = make_prompt(rng, num_pairs, filler_chars, references)
        if is_held_out(prompt):
            return prompt, answer


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    text: str  # facts, if any, and the question, up to and including the arrow
    answer: str  # one digit


@dataclass(frozen=True)
class Plan:
    """The shape of a conversation. Conversations of one plan have one length: they batch without padding."""

    first: int  # facts in the first turn, at least 1
    later: tuple[int, ...] = ()  # new facts of each later turn, often 0; its length is the number of later turns
    filler_chars: int = 0  # characters of filler in the first turn
    rewrite: float = 0.0  # probability that a fact is about a key that already has one
    reference: float = 0.0  # probability that a fact names an earlier key


def _new_facts(rng: random.Random, plan: Plan, memory: Memory, count: int) -> Iterator[str]:
    for _ in range(count):
        fresh = [key for key in KEYS if key not in memory.values]
        plain = [key for key in memory.values if key not in memory.references]
        if memory.values and (not fresh or rng.random() < plan.rewrite):
            yield memory.add(rng, rng.choice(plain))
        elif plain and rng.random() < plan.reference:
            yield memory.add(rng, rng.choice(fresh), rng.choice(plain))
        else:
            yield memory.add(rng, rng.choice(fresh))


def make_conversation(rng: random.Random, plan: Plan) -> list[Turn]:
    """A conversation to train on: none of its questions, asked alone after the facts so far, is held out.

    A plan with both rewrites and references is refused: what `m=a` means after a new `a=` is not defined.
    """
    if plan.rewrite and plan.reference:
        raise ValueError("a plan has rewrites or references, not both")
    while True:
        turns: list[Turn] = []
        memory = Memory()
        for position, count in enumerate((plan.first, *plan.later)):
            facts = list(_new_facts(rng, plan, memory, count))
            words = _hide(rng, facts, 0 if position else plan.filler_chars)
            memory.text += words
            key, answer = memory.ask(rng, favour_references=0.6)
            if is_held_out(question(" ".join(memory.text), key)):
                break
            turns.append(Turn(question(" ".join(words), key), answer))
        else:
            return turns
