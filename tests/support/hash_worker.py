"""A worker without a model: a state is the hash of the prefix it stands for, and so is what a page keeps of a token.

A slot's state lies in its blocks, a part in each, and a page is a block: what is written to one is lost in the other.

Under vLLM's real scheduler it notices when a request reads anything but its own prefix. On a GPU the requests of a step
run at once, so here a step reads everything before it writes anything.

A state can be made sick, as NaN makes one: whatever is computed from it is sick too, and the step reports the slots.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from kimi_vllm.cache.exchange import NEW_PAGES, NONFINITE, OPERATIONS

SICK = -(2**70)
"""What stands for NaN: no hash of a prefix."""
NONSENSE = 1
"""The token that is sampled from a sick state, and never from another."""


@dataclass
class Glitch:
    """The state after a token of a request becomes sick, the first time it is computed or every time."""

    token: int
    always: bool
    happened: bool = False


def after(state: int, token: int) -> int:
    """One step of the recurrence."""
    return hash((state, token))


def states(tokens: Sequence[int]) -> list[int]:
    """The state before the first token and after each."""
    return list(accumulate(tokens, after, initial=0))


def next_token(state: int) -> int:
    """What the model says in this state."""
    return 3 + state % 89


def answer(prompt: Sequence[int], length: int) -> list[int]:
    """What the model says to a prompt."""
    state, tokens = states(prompt)[-1], []
    for _ in range(length):
        tokens.append(next_token(state))
        state = after(state, tokens[-1])
    return tokens


class HashWorker:
    """Executes the steps of a scheduler with two groups of caches: pages, and states in slots.

    Follows both protocols: vLLM's first model runner, on CPUs, gets a preempted request back with new tables, the
    second, on GPUs, as if it were new.

    Attributes:
        conversions: Blocks written as something else than before: "pages to states", "states to pages".
        glitches: By request, what makes its state sick.
        pages_end: Whether only pages behind the last state become sick: a reader's states stay healthy, and nothing
            reports that its answers come from them.
    """

    def __init__(self, state_group: int, block: int) -> None:
        self._state_group, self._block = state_group, block
        # Blocks of slots on the device, states on the host; and in each block, hashes of tokens or a part of a state.
        self._backing: dict[int, list[int]] = {}
        self._host: dict[int, int] = {}
        self._memory: dict[int, list[int] | tuple[int, int]] = {}
        self._tables: dict[str, list[list[int]]] = {}
        self._known: dict[str, list[int]] = {}
        self._prompts: dict[str, int] = {}
        self.conversions: Counter[str] = Counter()
        self.glitches: dict[str, Glitch] = {}
        self.pages_end = False

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run a step. AssertionError if a request would read or write what is not its own.

        All states are read before one is written; each layer writes all pages of a step before it reads one.
        """
        for slot, what in getattr(output, OPERATIONS, ()):
            if isinstance(what, int):
                state = self.slot(slot)
                assert state is not None, f"slot {slot} is copied, and holds no state"
                self._store(what, state)
            else:
                self._backing[slot] = list(what)
        for page in getattr(output, NEW_PAGES, ()):
            self.conversions["states to pages"] += isinstance(self._memory.get(page), tuple)
            self._memory[page] = []
        starts = self._follow(output)
        spans = {name: (starts[name], starts[name] + n) for name, n in output.num_scheduled_tokens.items()}
        readers = {self._read(name, start): name for name, (start, _) in spans.items() if start}
        healthy = {name: self._healthy(name, *span) for name, span in spans.items()}
        self._check_tails(spans)
        muted = self._write_pages(spans, healthy)
        writers: dict[int, str] = {}
        for name, (start, end) in spans.items():
            self._check_pages(name, start)
            for slot in self._write_slots(name, start, end, healthy[name]):
                assert writers.setdefault(slot, name) == name, f"{name} and {writers[slot]} write slot {slot} at once"
        for slot in writers.keys() & readers.keys():
            assert writers[slot] == readers[slot], f"{readers[slot]} reads slot {slot} while {writers[slot]} writes it"
        sampled = [
            self._sample(name, end, sick=healthy[name] < end or name in muted) for name, (_, end) in spans.items()
        ]
        result = ModelRunnerOutput(
            req_ids=list(spans), req_id_to_index={name: i for i, name in enumerate(spans)}, sampled_token_ids=sampled
        )
        if sick := sorted((slot, 0) for slot in writers if self.slot(slot) == SICK):
            setattr(result, NONFINITE, sick)
        return result

    def slot(self, slot: int) -> int | None:
        """The state that a slot holds; None if it is in pieces."""
        if slot in self._host:
            return self._host[slot]
        parts = [self._memory.get(block) for block in self._backing.get(slot, ())]
        state = parts[0][0] if parts and isinstance(parts[0], tuple) else None
        return state if parts == [(state, part) for part in range(len(parts))] else None

    def page(self, page: int) -> list[int]:
        """What a page keeps of each of its tokens."""
        held = self._memory.get(page)
        return held if isinstance(held, list) else []

    def _store(self, slot: int, state: int) -> None:
        if slot in self._backing:
            for part, block in enumerate(self._backing[slot]):
                self.conversions["pages to states"] += isinstance(self._memory.get(block), list)
                self._memory[block] = state, part
        else:
            self._host[slot] = state

    def _follow(self, output: SchedulerOutput) -> dict[str, int]:
        """Take over the scheduler's news; returns how many tokens of each request are computed."""
        for name in output.finished_req_ids:
            self._tables.pop(name, None)
            self._known.pop(name, None)
        starts = {}
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = [list(ids) for ids in new.block_ids]
            self._known[new.req_id] = states(new.prefill_token_ids or new.prompt_token_ids)
            self._prompts[new.req_id] = len(new.prompt_token_ids)
            starts[new.req_id] = new.num_computed_tokens
        cached: Any = output.scheduled_cached_reqs
        rows = zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, cached.num_output_tokens, strict=True
        )
        for name, start, ids, outputs in rows:
            starts[name] = start
            # The first model runner forgets tokens that the scheduler has dropped, and is told all when one resumes.
            del self._known[name][1 + self._prompts[name] + outputs :]
            if name in cached.resumed_req_ids:
                assert name in cached.all_token_ids, f"{name} resumes, and nobody says with which tokens"
                self._known[name] = states(cached.all_token_ids[name])
                self._tables[name] = [list(group) for group in ids]
            else:
                for row, more in zip(self._tables[name], ids or (), strict=bool(ids)):
                    row.extend(more)
        return starts

    def _read(self, name: str, start: int) -> int:
        """Check what a request resumes from; returns the slot."""
        known, block = self._known[name], self._block
        slot = self._tables[name][self._state_group][(start - 1) // block]
        assert slot, f"{name} has no state after {start} tokens"
        held = self.slot(slot)
        assert held in (known[start], SICK), f"{name} after {start} tokens: slot {slot} is another prefix's"
        return slot

    def _healthy(self, name: str, start: int, end: int) -> int:
        """How many of a request's tokens have a healthy state as far as slots tell; at least `start`."""
        glitch = self.glitches.get(name)
        fresh = glitch and start <= glitch.token < end and (glitch.always or not glitch.happened)
        if start and self.slot(self._tables[name][self._state_group][(start - 1) // self._block]) == SICK:
            return start
        if glitch and fresh:
            glitch.happened = True
            return glitch.token
        return end

    def _write_pages(self, spans: dict[str, tuple[int, int]], healthy: dict[str, int]) -> set[str]:
        """Fill the pages, and lower `healthy` where a request reads sick ones.

        Returns:
            Requests that read sick pages, of the last layer only if there is one behind all states: they sample
            nonsense, and have healthy states.
        """
        while True:
            for name, (start, end) in spans.items():
                known = self._spoiled(name, end, healthy[name])
                for index in range(start // self._block, (end - 1) // self._block + 1):
                    first, last = max(start, index * self._block), min(end, (index + 1) * self._block)
                    page = self._tables[name][1 - self._state_group][index]
                    kept = self.page(page)[: first - index * self._block]
                    self._memory[page] = kept + known[first + 1 : last + 1]
            muted = {name for name, (start, _) in spans.items() if SICK in self._prefix(name, start)}
            spread = {name for name in muted if healthy[name] > spans[name][0]}
            if self.pages_end or not spread:
                return muted
            healthy |= {name: spans[name][0] for name in spread}

    def _check_tails(self, spans: dict[str, tuple[int, int]]) -> None:
        """Attention reads the pages of a step to their ends: no other owner may have left anything there."""
        for name, (start, end) in spans.items():
            for index in range(start // self._block, (end - 1) // self._block + 1):
                held = self._memory.get(self._tables[name][1 - self._state_group][index])
                assert isinstance(held, list), f"{name} has a page that was not cleared"
                behind = held[max(0, start - index * self._block) :]
                own = {*self._known[name][max(start, index * self._block) + 1 :]}
                assert own.issuperset(behind), f"{name}: another's tokens are behind its own"

    def _prefix(self, name: str, start: int) -> list[int]:
        """What the pages say of a request's first tokens."""
        pages = self._tables[name][1 - self._state_group][: -(-start // self._block)]
        return [state for page in pages for state in self.page(page)[: self._block]][:start]

    def _check_pages(self, name: str, start: int) -> None:
        own = self._known[name][1 : start + 1]
        kept = self._prefix(name, start)
        right = len(kept) == len(own) and all(state in (mine, SICK) for state, mine in zip(kept, own, strict=True))
        assert right, f"{name}: a page is another prefix's"

    def _spoiled(self, name: str, end: int, healthy: int) -> list[int]:
        return [*self._known[name][: healthy + 1], *[SICK] * (end - healthy)]

    def _write_slots(self, name: str, start: int, end: int, healthy: int) -> set[int]:
        """Fill the slots at each boundary and at the end; returns them."""
        assert end < len(self._known[name]), (
            f"{name}: a step to token {end}, and {len(self._known[name]) - 1} are known"
        )
        known, block, written = self._spoiled(name, end, healthy), self._block, set()
        for index in range(start // block, (end - 1) // block + 1):
            if slot := self._tables[name][self._state_group][index]:
                self._store(slot, known[min(end, (index + 1) * block)])
                written.add(slot)
        assert slot, f"{name}: nothing holds the state after {end} tokens"
        return written

    def _sample(self, name: str, end: int, *, sick: bool) -> list[int]:
        known = self._known[name]
        if end + 1 < len(known):
            return []
        token = NONSENSE if sick else next_token(known[-1])
        known.append(after(known[-1], token))
        return [token]
