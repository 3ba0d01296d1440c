"""The synthetic tasks of the Kimi Linear report (section 5.1), and two that ask more of a served state.

Every sequence is a function of payload values, one of which is free. A checksum of the payload decides which
split a sequence belongs to, and the free value is moved until it is the split asked for: no evaluation sequence
can be a training sequence, whatever the seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

NOT_SCORED = -100
PAD, BOS = 0, 1
CLASSES = 8
"""Checksum classes; the sequences of class 0 are held out."""

LETTERS = 64
MQAR_KEYS, MQAR_VALUES = 512, 64
STACKS, ELEMENTS = 64, 64
REGISTERS, REGISTER_VALUES = 16, 32
NEEDLE_KEYS, NEEDLE_VALUES, FILLERS = 64, 64, 64
MAX_NEEDLES = 8


@dataclass(frozen=True)
class Batch:
    """Sequences and what is asked of them."""

    tokens: torch.Tensor  # int64 [rows, length]
    # int64 [rows, length]; at a scored position the token to predict there, elsewhere `NOT_SCORED`
    targets: torch.Tensor

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.tokens[rows], self.targets[rows])


Sampler = Callable[[int, int, torch.Generator, bool], Batch]


@dataclass(frozen=True)
class Task:
    """One task."""

    name: str  # for files and commands
    vocabulary: tuple[str, ...]  # the tokens by id; every one is a word without spaces
    sample: Sampler  # `sample(rows, length, generator, held_out)` draws a batch on the generator's device
    min_length: int  # the shortest sequence it can draw


def _words(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in range(count))


def checksum(payload: torch.Tensor) -> torch.Tensor:
    """The class of each row of int64 [rows, values], in 0..CLASSES-1; unused values are 0."""
    weights = 1 + 2 * ((torch.arange(payload.shape[1], device=payload.device) * 40503 >> 5) % 1021)
    return (payload * weights).sum(1) % CLASSES


def _choose_split(payload: torch.Tensor, size: int, held_out: bool) -> torch.Tensor:
    """Move the first value of each row, modulo `size`, until the row is in the split asked for.

    `size` is a multiple of CLASSES and weights are odd, so that CLASSES steps reach every class.

    Args:
        payload: int64 [rows, values]; the first may be any of `size` values.
    """
    payload = payload.clone()
    for _ in range(CLASSES - 1 if held_out else 1):
        wrong = (checksum(payload) == 0) != held_out
        payload[:, 0] = (payload[:, 0] + wrong.to(torch.int64)) % size
    return payload


def _integers(high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device)


def _distinct(high: int, rows: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [rows, count], in each row different numbers below `high` in random order."""
    return torch.rand(rows, high, generator=generator, device=generator.device).argsort(1)[:, :count]


def _blank(rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.full((rows, length), PAD, device=generator.device)
    tokens[:, 0] = BOS
    return tokens, torch.full_like(tokens, NOT_SCORED)


# Palindrome: <bos>, n letters, <sep>, the letters in reverse.
_PALINDROME = ("<pad>", "<bos>", "<sep>", *_words("l", LETTERS))


def sample_palindrome(rows: int, length: int, generator: torch.Generator, held_out: bool) -> Batch:
    """Scored: each reversed letter except the first, which is given; predicted at the letter before it."""
    n = (length - 2) // 2
    letters = _integers(LETTERS, (rows, n), generator)
    letters = _choose_split(letters, LETTERS, held_out) + 3
    tokens, targets = _blank(rows, length, generator)
    tokens[:, 1 : n + 1] = letters
    tokens[:, n + 1] = 2
    tokens[:, n + 2 : 2 * n + 2] = letters.flip(1)
    targets[:, n + 2 : 2 * n + 1] = tokens[:, n + 3 : 2 * n + 2]
    return Batch(tokens, targets)


# MQAR: <bos>, length/4 pairs of a key and its value, <sep>, queries. No key comes twice among the pairs.
_MQAR = ("<pad>", "<bos>", "<sep>", *_words("k", MQAR_KEYS), *_words("v", MQAR_VALUES))


def sample_mqar(rows: int, length: int, generator: torch.Generator, held_out: bool) -> Batch:
    """Scored: every query; its value is predicted at the query's own position."""
    pairs = length // 4
    keys = _distinct(MQAR_KEYS, rows, pairs, generator)
    values = _integers(MQAR_VALUES, (rows, pairs), generator)
    asked = _integers(pairs, (rows, length - 2 - 2 * pairs), generator)
    values = _choose_split(torch.cat([values, keys], 1), MQAR_VALUES, held_out)[:, :pairs]
    keys, values = keys + 3, values + 3 + MQAR_KEYS
    tokens, targets = _blank(rows, length, generator)
    tokens[:, 1 : 2 * pairs + 1 : 2] = keys
    tokens[:, 2 : 2 * pairs + 2 : 2] = values
    tokens[:, 2 * pairs + 1] = 2
    tokens[:, 2 * pairs + 2 :] = keys.gather(1, asked)
    targets[:, 2 * pairs + 2 :] = values.gather(1, asked)
    return Batch(tokens, targets)


# Stack: <bos>, then operations of three tokens: <push> or <pop>, one of 64 stacks, an element.
_STACK = ("<pad>", "<bos>", "<push>", "<pop>", *_words("s", STACKS), *_words("e", ELEMENTS))
_STACK_ID, _ELEMENT = 4, 4 + STACKS


def _stack_operations(rows: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Half of all operations push to any stack, half pop from any stack that is not empty.

    Returns:
        bool [rows, count] whether an operation pops, int64 [rows, count] its stack, and int64 [rows, count]
        the operation that pushed the element it is about (for a push, its own number).
    """
    device = generator.device
    below = torch.zeros(rows, STACKS, count, dtype=torch.int64, device=device)
    depth = torch.zeros(rows, STACKS, dtype=torch.int64, device=device)
    scores = torch.rand(count, rows, STACKS, generator=generator, device=device)
    coins = torch.rand(count, rows, generator=generator, device=device) < 0.5
    row = torch.arange(rows, device=device)
    pops, stacks, origins = [], [], []
    for step in range(count):
        filled = depth > 0
        pop = coins[step] & filled.any(1)
        stack = torch.where(pop[:, None] & ~filled, -1.0, scores[step]).argmax(1)
        level = depth[row, stack] - pop.to(torch.int64)
        origin = torch.where(pop, below[row, stack, level], step)
        below[row, stack, level] = origin
        depth[row, stack] = level + (~pop).to(torch.int64)
        pops.append(pop)
        stacks.append(stack)
        origins.append(origin)
    return torch.stack(pops, 1), torch.stack(stacks, 1), torch.stack(origins, 1)


def sample_stack(rows: int, length: int, generator: torch.Generator, held_out: bool) -> Batch:
    """Scored: the element of each pop, predicted at the stack before it."""
    count = (length - 1) // 3
    pops, stacks, origins = _stack_operations(rows, count, generator)
    pushed = _integers(ELEMENTS, (rows, count), generator) * ~pops
    payload = torch.cat([pushed, stacks, pops.to(torch.int64)], 1)
    pushed = _choose_split(payload, ELEMENTS, held_out)[:, :count]
    elements = pushed.gather(1, origins) + _ELEMENT
    tokens, targets = _blank(rows, length, generator)
    end = 3 * count + 1
    tokens[:, 1:end:3] = 2 + pops
    tokens[:, 2:end:3] = stacks + _STACK_ID
    tokens[:, 3:end:3] = elements
    targets[:, 2:end:3] = torch.where(pops, elements, NOT_SCORED)
    return Batch(tokens, targets)


# Registers: <bos>, then operations of three tokens: <write> r v, <read> r v, <clear> <all> v0.
_REGISTERS = ("<pad>", "<bos>", "<write>", "<read>", "<clear>", "<all>", *_words("r", REGISTERS))
_REGISTERS += _words("v", REGISTER_VALUES)
_REGISTER_ID, _REGISTER_VALUE = 6, 6 + REGISTERS
CLEAR_EVERY = 64
"""Operations from one <clear> to the next, on average."""


def sample_registers(rows: int, length: int, generator: torch.Generator, held_out: bool) -> Batch:
    """Scored: the value of each read, predicted at the register before it: the last one written, v0 if cleared.

    State tracking that KDA's transition Diag(a)(I - b k k^T) can do. With a and b in [0, 1] its eigenvalues lie
    in [0, 1]: it can keep, overwrite and forget, and no composition of such steps returns to a state it has
    left, as parity or permutations would (that needs a negative or complex eigenvalue). Overwriting needs b
    near 1 on one key and 0 elsewhere, clearing needs a near 0.
    """
    count = (length - 1) // 3
    device = generator.device
    kind = torch.rand(rows, count, generator=generator, device=device)
    clear, write = kind < 1 / CLEAR_EVERY, kind > 0.5
    clear[:, 0], write[:, 0] = False, True
    register = _integers(REGISTERS, (rows, count), generator)
    written = _integers(REGISTER_VALUES, (rows, count), generator) * write
    # A third of all reads would otherwise be of registers that nothing was written to since the last clear.
    recent = _integers(6, (rows, count), generator)
    source = (torch.arange(count, device=device) - 1 - recent).clamp_min(0)
    use_recent = ~write & (torch.rand(rows, count, generator=generator, device=device) < 0.3)
    register = torch.where(use_recent, register.gather(1, source), register)
    register = register.masked_fill(clear, 0)
    payload = torch.cat([written, register, write.to(torch.int64), clear.to(torch.int64)], 1)
    written = _choose_split(payload, REGISTER_VALUES, held_out)[:, :count]

    numbers = torch.arange(1, count + 1, device=device)
    writes_to = torch.nn.functional.one_hot(register, REGISTERS).bool() & write[..., None]
    last_write = torch.where(writes_to, numbers[:, None], 0).cummax(1).values.gather(2, register[..., None])[..., 0]
    last_clear = torch.where(clear, numbers, 0).cummax(1).values
    current = written.gather(1, (last_write - 1).clamp_min(0)).masked_fill(last_clear >= last_write, 0)
    value = torch.where(write, written, current).masked_fill(clear, 0) + _REGISTER_VALUE

    read = ~write & ~clear
    tokens, targets = _blank(rows, length, generator)
    end = 3 * count + 1
    tokens[:, 1:end:3] = torch.where(write, 2, torch.where(clear, 4, 3))
    tokens[:, 2:end:3] = torch.where(clear, 5, register + _REGISTER_ID)
    tokens[:, 3:end:3] = value
    targets[:, 2:end:3] = torch.where(read, value, NOT_SCORED)
    return Batch(tokens, targets)


# Needle: <bos>, filler with needles of three tokens <note> k v in it, then questions <ask> k v.
_NEEDLE = ("<pad>", "<bos>", "<note>", "<ask>", *_words("f", FILLERS), *_words("k", NEEDLE_KEYS))
_NEEDLE += _words("v", NEEDLE_VALUES)
FIRST_FILLER, _NEEDLE_KEY, _NEEDLE_VALUE = 4, 4 + FILLERS, 4 + FILLERS + NEEDLE_KEYS


def sample_needle(
    rows: int, length: int, generator: torch.Generator, held_out: bool, depth: float | None = None
) -> Batch:
    """Scored: the value of each question, predicted at its key.

    Args:
        rows, length, generator, held_out: as for every task.
        depth: None strews up to eight needles and asks for all of them. A number from 0 to 1 places one needle
            there, as a share of the filler, and asks for it: 0.01 of a million tokens is 990,000 tokens away.
    """
    device = generator.device
    needles = 1 if depth is not None else min(MAX_NEEDLES, (length - 1) // 9)
    slots = (length - 1) // 3 - needles
    start = length - 3 * needles
    keys = _distinct(NEEDLE_KEYS, rows, needles, generator)
    values = _integers(NEEDLE_VALUES, (rows, needles), generator)
    fillers = _integers(FILLERS, (rows, length), generator)
    if depth is None:
        slot = _distinct(slots, rows, needles, generator).sort(1).values
    else:
        slot = torch.full((rows, 1), round(depth * (slots - 1)), device=device)
    order = _distinct(needles, rows, needles, generator)
    values = _choose_split(torch.cat([values, keys, slot, order], 1), NEEDLE_VALUES, held_out)[:, :needles]
    keys, values = keys + _NEEDLE_KEY, values + _NEEDLE_VALUE
    tokens, targets = _blank(rows, length, generator)
    tokens[:, 1:start] = fillers[:, 1:start] + FIRST_FILLER
    place = 1 + 3 * slot
    tokens.scatter_(1, place, 2)
    tokens.scatter_(1, place + 1, keys)
    tokens.scatter_(1, place + 2, values)
    tokens[:, start::3] = 3
    tokens[:, start + 1 :: 3] = keys.gather(1, order)
    tokens[:, start + 2 :: 3] = values.gather(1, order)
    targets[:, start + 1 :: 3] = tokens[:, start + 2 :: 3]
    return Batch(tokens, targets)


TASKS = {
    task.name: task
    for task in (
        Task("palindrome", _PALINDROME, sample_palindrome, 6),
        Task("mqar", _MQAR, sample_mqar, 8),
        Task("stack", _STACK, sample_stack, 8),
        Task("registers", _REGISTERS, sample_registers, 8),
        Task("needle", _NEEDLE, sample_needle, 16),
    )
}


def needle_at(depth: float) -> Task:
    """The needle task with one needle at a fixed place, see `sample_needle`."""

    def sample(rows: int, length: int, generator: torch.Generator, held_out: bool) -> Batch:
        return sample_needle(rows, length, generator, held_out, depth)

    return replace(TASKS["needle"], sample=sample)
