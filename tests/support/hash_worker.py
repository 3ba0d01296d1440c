"""A worker without a model: a state is the hash of the prefix it stands for, and so is what a page keeps of a token.

Under vLLM's real scheduler it notices when a request reads anything but its own prefix. On a GPU the requests of a step
run at once, so here a step reads everything before it writes anything.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from kimi_vllm.cache.exchange import MOVES


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
    """

    def __init__(self, state_group: int, block: int) -> None:
        self._state_group, self._block = state_group, block
        self._slots: dict[int, int] = {}
        self._pages: dict[int, list[int]] = {}
        self._tables: dict[str, list[list[int]]] = {}
        self._known: dict[str, list[int]] = {}

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run a step. AssertionError if a request would read or write what is not its own."""
        for source, target in getattr(output, MOVES, ()):
            self._slots[target] = self._slots[source]
        starts = self._follow(output)
        spans = {name: (starts[name], starts[name] + n) for name, n in output.num_scheduled_tokens.items()}
        readers = {self._read(name, start): name for name, (start, _) in spans.items() if start}
        writers: dict[int, str] = {}
        for name, (start, end) in spans.items():
            for slot in self._write(name, start, end):
                assert writers.setdefault(slot, name) == name, f"{name} and {writers[slot]} write slot {slot} at once"
        for slot in writers.keys() & readers.keys():
            assert writers[slot] == readers[slot], f"{readers[slot]} reads slot {slot} while {writers[slot]} writes it"
        sampled = [self._sample(name, end) for name, (_, end) in spans.items()]
        return ModelRunnerOutput(
            req_ids=list(spans), req_id_to_index={name: i for i, name in enumerate(spans)}, sampled_token_ids=sampled
        )

    def _follow(self, output: SchedulerOutput) -> dict[str, int]:
        """Take over the scheduler's news; returns how many tokens of each request are computed."""
        for name in output.finished_req_ids:
            self._tables.pop(name, None)
            self._known.pop(name, None)
        starts = {}
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = [list(ids) for ids in new.block_ids]
            self._known[new.req_id] = states(new.prefill_token_ids or new.prompt_token_ids)
            starts[new.req_id] = new.num_computed_tokens
        cached: Any = output.scheduled_cached_reqs
        for name, start, ids in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            starts[name] = start
            if name in cached.resumed_req_ids:
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
        assert self._slots.get(slot) == known[start], f"{name} after {start} tokens: slot {slot} is another prefix's"
        for index, page in enumerate(self._tables[name][1 - self._state_group]):
            own = known[1 + index * block : 1 + min(start, (index + 1) * block)]
            assert self._pages.get(page, [])[: len(own)] == own, f"{name}: page {page} is another prefix's"
        return slot

    def _write(self, name: str, start: int, end: int) -> set[int]:
        """Fill the pages, and the slots at each boundary and at the end; returns the slots."""
        known, block, written = self._known[name], self._block, set()
        assert end < len(known), f"{name}: a step to token {end}, and {len(known) - 1} are known"
        for index in range(start // block, (end - 1) // block + 1):
            first, last = max(start, index * block), min(end, (index + 1) * block)
            page = self._tables[name][1 - self._state_group][index]
            self._pages[page] = self._pages.get(page, [])[: first - index * block] + known[first + 1 : last + 1]
            if slot := self._tables[name][self._state_group][index]:
                self._slots[slot] = known[last]
                written.add(slot)
        assert slot, f"{name}: nothing holds the state after {end} tokens"
        return written

    def _sample(self, name: str, end: int) -> list[int]:
        known = self._known[name]
        if end + 1 < len(known):
            return []
        token = next_token(known[-1])
        known.append(after(known[-1], token))
        return [token]
