"""Traffic with prefixes to reuse, as token ids: chats, agents that branch, questions about documents.

A trace is a list of turns in order of arrival. A turn may follow an earlier one: then its prompt is that turn's prompt
and answer with something added, so it cannot arrive before that answer is there. Everything is drawn from a seed.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

BLOCK = 64
"""The grid on which prefixes are shared: our attention block."""
VOCABULARY = range(3, 100)
"""Ordinary tokens of the tiny checkpoint."""

Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request."""

    follows: int | None  # index of the turn whose prompt and answer this prompt begins with, or None
    tokens: Tokens  # the rest of the prompt
    answer: Tokens  # what the model is made to say in a replay; a real engine says something else of this length


def prompt_of(turns: Sequence[Turn], index: int, answers: Sequence[Tokens]) -> Tokens:
    """The whole prompt of a turn, given the answers of those before it."""
    turn = turns[index]
    if turn.follows is None:
        return turn.tokens
    return prompt_of(turns, turn.follows, answers) + answers[turn.follows] + turn.tokens


def reusable_tokens(prompts: Sequence[Tokens], answers: Sequence[Tokens], block: int = BLOCK) -> list[int]:
    """What an exact prefix cache that forgets nothing could spare each prompt.

    That is the longest prefix it shares with an earlier turn's prompt and answer, in whole blocks, and at most the
    prompt less one token, for the last one must be computed to get the first token of the answer. The last token of
    an answer does not count as shared: it was sampled and never computed.
    """
    seen: set[int] = set()
    reusable = []
    for prompt, answer in zip(prompts, answers, strict=True):
        keys = block_keys(prompt, block)
        shared = next((i for i, key in enumerate(keys) if key not in seen), len(keys))
        reusable.append(min(shared, (len(prompt) - 1) // block) * block)
        seen.update(block_keys(prompt + answer[:-1], block))
    return reusable


def block_keys(tokens: Tokens, block: int) -> list[int]:
    """One key for each prefix of whole blocks."""
    ends = range(block, len(tokens) + 1, block)
    return list(accumulate((hash(tuple(tokens[end - block : end])) for end in ends), lambda a, b: hash((a, b))))


class _Writer:
    """Draws lengths and tokens."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.turns: list[Turn] = []
        self.lengths: list[int] = []

    def text(self, shortest: int, longest: int) -> Tokens:
        """Random tokens; short texts are likelier than long ones, as in real traffic."""
        length = round(shortest * (longest / shortest) ** self.random.random())
        return self.random.choices(VOCABULARY, k=length)

    def add(self, follows: int | None, tokens: Tokens, answer: Tokens) -> int:
        before = 0 if follows is None else self.lengths[follows]
        self.lengths.append(before + len(tokens) + len(answer))
        self.turns.append(Turn(follows, tokens, answer))
        return len(self.turns) - 1


def chat(seed: int = 0, users: int = 32, turns: int = 12, limit: int = 8192) -> list[Turn]:
    """People who each keep a conversation going, one system prompt for all; a few are active at a time."""
    draw = _Writer(seed)
    system = draw.text(500, 600)
    left = dict.fromkeys(range(users), turns)
    last: dict[int, int] = {}
    while left:
        user = draw.random.choice(list(left)[:16])
        begin = [] if user in last else system
        question, answer = draw.text(20, 300), draw.text(40, 400)
        before = draw.lengths[last[user]] if user in last else len(system)
        left[user] -= 1
        if before + len(question) + len(answer) >= limit:
            left[user] = 0
        else:
            last[user] = draw.add(last.get(user), begin + question, answer)
        if not left[user]:
            del left[user]
    return draw.turns


def agent(seed: int = 0, tasks: int = 16, steps: int = 24, limit: int = 8192) -> list[Turn]:
    """Agents that search a tree: mostly one step deeper, else back to an earlier node, preferably one near the root.

    They share instructions; each has a task of its own. A step adds what a tool returned, seldom much, often little.
    """
    draw = _Writer(seed)
    instructions = draw.text(900, 1100)
    left = dict.fromkeys(range(tasks), steps)
    nodes: dict[int, list[int]] = {}
    while left:
        task = draw.random.choice(list(left)[:12])
        left[task] -= 1
        if task not in nodes:
            nodes[task] = [draw.add(None, instructions + draw.text(100, 1500), draw.text(30, 200))]
        else:
            known = nodes[task]
            back = draw.random.random() < 0.35
            follows = known[int(len(known) * draw.random.random() ** 2)] if back else known[-1]
            observation, answer = draw.text(30, 1500), draw.text(30, 200)
            if draw.lengths[follows] + len(observation) + len(answer) < limit:
                known.append(draw.add(follows, observation, answer))
        if not left[task]:
            del left[task]
    return draw.turns


def rag(seed: int = 0, documents: int = 64, requests: int = 500, limit: int = 8192) -> list[Turn]:
    """Questions about documents of very different lengths, some asked about far more often than others (Zipf)."""
    draw = _Writer(seed)
    system = draw.text(200, 300)
    library = [draw.text(300, limit - 1024) for _ in range(documents)]
    popularity = [1 / rank for rank in range(1, documents + 1)]
    for document in draw.random.choices(library, popularity, k=requests):
        draw.add(None, system + document + draw.text(20, 120), draw.text(30, 150))
    return draw.turns


TRACES: dict[str, Callable[..., list[Turn]]] = {"chat": chat, "agent": agent, "rag": rag}
"""By name."""


def working_set(prompts: Sequence[Tokens], answers: Sequence[Tokens], hits: Sequence[int], block: int = BLOCK) -> int:
    """The most states that have a use still to come at any time, given how much of each prompt was found in the end.

    A state is needed from the first turn that passes it to the last one that resumes from it. This is what a cache
    that knew the future would have to hold in order to lose nothing.
    """
    born: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, (prompt, answer, hit) in enumerate(zip(prompts, answers, hits, strict=True)):
        if hit:
            last[block_keys(prompt[:hit], block)[-1]] = index
        for key in block_keys(prompt + answer[:-1], block):
            born.setdefault(key, index)
    changes = [0] * (len(prompts) + 1)
    for key, index in last.items():
        changes[born[key]] += 1
        changes[index] -= 1
    return max(accumulate(changes))
