"""A worker without a model: a state is the hash of the prefix it stands for, and so is what a page keeps of a token.

A slot's state lies in its blocks, a part in each, and a page is a block: what is written to one is lost in the other.

Under vLLM's real scheduler it notices when a request reads anything but its own prefix. On a GPU the requests of a step
run at once, so here a step reads everything before it writes anything.

With drafts, a slot holds the state before its last window and a record of each token of it. How many of them count
is known here alone: what the scheduler says of a position may be too much by the drafts in flight.

A state can be made sick, as NaN makes one: whatever is computed from it is sick too, and the step reports the slots.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from kimi_vllm.cache.exchange import NEW_PAGES, NONFINITE, OPERATIONS
from support.drafter import Drafter
from support.hashes import NONSENSE, SICK, after, next_token, states


@dataclass
class Glitch:
    """The state after a token of a request becomes sick, the first time it is computed or every time.

    Attributes:
        counted: Whether the token was more than a rejected draft.
    """

    token: int
    always: bool
    happened: bool = False
    counted: bool = False


@dataclass
class Row:
    """What a step computes for a request.

    Attributes:
        start, end: Its tokens; `drafts` are the last of them.
        states: Before the first of them and after each.
        window: Whether its slots keep the state before it, and records.
        healthy: How many of the request's tokens have a healthy state.
    """

    start: int
    end: int
    drafts: list[int]
    states: list[int]
    window: bool
    healthy: int = 0

    @property
    def spoiled(self) -> list[int]:
        """What becomes of `states`."""
        return [state if self.start + i <= self.healthy else SICK for i, state in enumerate(self.states)]


class HashWorker:
    """Executes the steps of a scheduler with two groups of caches: pages, and states in slots.

    Follows both protocols: vLLM's first model runner, on CPUs, gets a preempted request back with new tables, the
    second, on GPUs, as if it were new.

    Args:
        state_group: Index of the cache group of states.
        block: Tokens of a block.
        window: See `KDAStateSpec`.
        fresh_last: Whether vLLM puts new requests behind longer ones, as for its first model runner.

    Attributes:
        drafter: What proposes drafts.
        drafts: By request, what it proposed after the last step.
        conversions: Blocks written as something else than before: "pages to states", "states to pages".
        glitches: By request, what makes its state sick.
        pages_end: Whether only pages behind the last state become sick: a reader's states stay healthy, and nothing
            reports that its answers come from them.
        touched: By request, the slot that the last step read for it (0 for none), the slots that it wrote, the pages
            that it read and those that it wrote.
        seen: What happened to drafts, and windows across boundaries.
    """

    def __init__(self, state_group: int, block: int, window: int = 0, *, fresh_last: bool = False) -> None:
        self._state_group, self._block, self._window, self._fresh_last = state_group, block, window, fresh_last
        # Blocks of slots, on the device and on the host; and in each block, hashes of tokens or a part of a state.
        self._backing: dict[int, list[int]] = {}
        self._memory: dict[int, list[int] | tuple[tuple[int, ...], int]] = {}
        self._bases: dict[int, int] = {}
        self._tables: dict[str, list[list[int]]] = {}
        self._known: dict[str, list[int]] = {}
        self._prompts: dict[str, int] = {}
        self._computed: dict[str, int] = {}
        self._rejected: Counter[str] = Counter()
        self._tried: dict[str, set[int]] = {}
        self.drafter = Drafter(max(0, window - 1))
        self.drafts: dict[str, list[int]] = {}
        self._wanted = 0
        self.conversions: Counter[str] = Counter()
        self.glitches: dict[str, Glitch] = {}
        self.pages_end = False
        self.touched: dict[str, tuple[int, set[int], set[int], set[int]]] = {}
        self.seen: Counter[str] = Counter()

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run a step. AssertionError if a request would read or write what is not its own.

        All states are read before one is written; each layer writes all pages of a step before it reads one.
        """
        for source, target in getattr(output, OPERATIONS, ()):
            if isinstance(source, list):
                for one, other in zip(source, target, strict=True):
                    assert isinstance(self._memory.get(one), list), f"block {one} is copied, and is no page"
                    self._memory[other] = list(self._memory[one])
                    self.seen["pages copied"] += 1
            elif isinstance(target, int):
                contents = self.slot(source)
                assert contents is not None, f"slot {source} is copied, and holds no state"
                self._store(target, contents, self._bases[source])
            else:
                self._backing[source] = list(target)
        for page in getattr(output, NEW_PAGES, ()):
            self.conversions["states to pages"] += isinstance(self._memory.get(page), tuple)
            self._memory[page] = []
        rows = self._rows(output, self._follow(output))
        self._wanted = output.num_spec_tokens_to_schedule
        reads = {name: self._read(name, row.start) for name, row in rows.items() if row.start}
        for name, row in rows.items():
            row.healthy = self._healthy(name, row)
        self._check_tails(rows)
        muted = self._write_pages(rows)
        writers: dict[int, str] = {}
        self.touched = {}
        for name, row in rows.items():
            self._check_pages(name, row.start)
            written = self._write_slots(name, row)
            pages, first = self._tables[name][1 - self._state_group], row.start // self._block
            ahead = {*pages[first : -(-row.end // self._block)]}
            self.touched[name] = reads.get(name, 0), written, {*pages[:first]}, ahead
            for slot in written:
                assert writers.setdefault(slot, name) == name, f"{name} and {writers[slot]} write slot {slot} at once"
        for name, slot in reads.items():
            assert writers.get(slot, name) == name, f"{name} reads slot {slot} while {writers[slot]} writes it"
        sampled = [self._sample(name, row, muted=name in muted) for name, row in rows.items()]
        result = ModelRunnerOutput(
            req_ids=list(rows), req_id_to_index={name: i for i, name in enumerate(rows)}, sampled_token_ids=sampled
        )
        held = {slot: self.slot(slot) or () for slot in writers}
        if sick := sorted((slot, max(0, kept.index(SICK) - 1)) for slot, kept in held.items() if SICK in kept):
            setattr(result, NONFINITE, sick)
        return result

    def take_drafts(self, result: ModelRunnerOutput) -> DraftTokenIds:
        """What the scheduler is told of drafts after a step, unless steps are in flight."""
        return DraftTokenIds(result.req_ids, [list(self.drafts[name]) for name in result.req_ids])

    def slot(self, slot: int) -> tuple[int, ...] | None:
        """What a slot holds: a state, and those after each token that has a record. None if it is in pieces."""
        parts = [self._memory.get(block) for block in self._backing.get(slot, ())]
        contents = parts[0][0] if parts and isinstance(parts[0], tuple) else None
        return contents if parts == [(contents, part) for part in range(len(parts))] else None

    def state(self, slot: int, length: int) -> int | None:
        """The state after so many tokens, as whoever reads the slot folds it; None if that is not there."""
        contents = self.slot(slot) or ()
        lag = length - self._bases.get(slot, 0)
        # A GPU does not say so: it folds what there is.
        assert not slot or 0 <= lag <= self._window, f"slot {slot} lags by {lag} tokens"
        return contents[lag] if 0 <= lag < len(contents) else None

    def page(self, page: int) -> list[int]:
        """What a page keeps of each of its tokens."""
        held = self._memory.get(page)
        return held if isinstance(held, list) else []

    def _store(self, slot: int, contents: tuple[int, ...], base: int) -> None:
        self._bases[slot] = base
        for part, block in enumerate(self._backing[slot]):
            self.conversions["pages to states"] += isinstance(self._memory.get(block), list)
            self._memory[block] = contents, part

    def _follow(self, output: SchedulerOutput) -> dict[str, int]:
        """Take over the scheduler's news; returns how many tokens of each request are computed."""
        for name in output.finished_req_ids:
            self._tables.pop(name, None)
            self._known.pop(name, None)
            self._tried.pop(name, None)
        starts = {}
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = [list(ids) for ids in new.block_ids]
            self._known[new.req_id] = states(new.prefill_token_ids or new.prompt_token_ids)
            self._prompts[new.req_id] = len(new.prompt_token_ids)
            self._tried.setdefault(new.req_id, set())  # a session goes on in its pages
            starts[new.req_id] = new.num_computed_tokens
        cached: Any = output.scheduled_cached_reqs
        rows = zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, cached.num_output_tokens, strict=True
        )
        for name, start, ids, outputs in rows:
            # The first model runner forgets tokens that the scheduler has dropped, and is told all when one resumes.
            del self._known[name][1 + self._prompts[name] + outputs :]
            if name in cached.resumed_req_ids:
                assert name in cached.all_token_ids, f"{name} resumes, and nobody says with which tokens"
                self._known[name] = states(cached.all_token_ids[name])
                self._tables[name] = [list(group) for group in ids]
                starts[name] = start
            else:
                starts[name] = self._computed[name]
                # It does not know yet what the step in flight rejects.
                ahead = start - starts[name]
                assert ahead in (0, self._rejected[name]), f"{name}: {start} tokens are not computed"
                for row, more in zip(self._tables[name], ids or (), strict=bool(ids)):
                    row.extend(more)
        return starts

    def _rows(self, output: SchedulerOutput, starts: dict[str, int]) -> dict[str, Row]:
        rows = {}
        longest = max(output.num_scheduled_tokens.values(), default=0)
        for name, count in output.num_scheduled_tokens.items():
            start, known = starts[name], self._known[name]
            told = output.scheduled_spec_decode_tokens.get(name, [])
            drafts = [*self.drafts.get(name, ()), *[-1] * len(told)][: len(told)]
            # With steps in flight the scheduler knows of none yet.
            assert told in (drafts, [-1] * len(told)), f"{name}: nobody proposed {told}"
            end = start + count
            assert end - len(drafts) < len(known), f"{name}: a step to token {end}, and {len(known) - 1} are known"
            kept = known[start : end - len(drafts) + 1]
            for draft in drafts:
                kept.append(after(kept[-1], draft))
            window = count <= self._window and (not self._fresh_last or start > 0 or longest <= self._window)
            assert window or not drafts, f"{name}: drafts among tokens that all count"
            rows[name] = Row(start, end, drafts, kept, window)
        return rows

    def _read(self, name: str, start: int) -> int:
        """Check what a request resumes from; returns the slot."""
        known, block = self._known[name], self._block
        slot = self._tables[name][self._state_group][(start - 1) // block]
        assert slot, f"{name} has no state after {start} tokens"
        held = self.state(slot, start)
        assert held in (known[start], SICK), f"{name} after {start} tokens: slot {slot} is another prefix's"
        return slot

    def _healthy(self, name: str, row: Row) -> int:
        """How many of a request's tokens have a healthy state as far as slots tell."""
        glitch, start = self.glitches.get(name), row.start
        fresh = glitch and start <= glitch.token < row.end and (glitch.always or not glitch.happened)
        if start and self.state(self._tables[name][self._state_group][(start - 1) // self._block], start) == SICK:
            return start - 1
        if glitch and fresh:
            glitch.happened = True
            return glitch.token
        return row.end

    def _write_pages(self, rows: dict[str, Row]) -> set[str]:
        """Fill the pages, and lower `healthy` where a request reads sick ones.

        Returns:
            Requests that read sick pages, of the last layer only if there is one behind all states: they sample
            nonsense, and have healthy states.
        """
        while True:
            for name, row in rows.items():
                start, end, made = row.start, row.end, row.spoiled
                self._tried[name].update(made[len(made) - len(row.drafts) :])
                for index in range(start // self._block, (end - 1) // self._block + 1):
                    first, last = max(start, index * self._block), min(end, (index + 1) * self._block)
                    page = self._tables[name][1 - self._state_group][index]
                    kept = self.page(page)[: first - index * self._block]
                    self._memory[page] = kept + made[first + 1 - start : last + 1 - start]
            muted = {name for name, row in rows.items() if SICK in self._prefix(name, row.start)}
            spread = {name for name in muted if rows[name].healthy > rows[name].start}
            if self.pages_end or not spread:
                return muted
            for name in spread:
                rows[name].healthy = rows[name].start

    def _check_tails(self, rows: dict[str, Row]) -> None:
        """Attention reads the pages of a step to their ends: no other owner may have left anything there."""
        for name, row in rows.items():
            for index in range(row.start // self._block, (row.end - 1) // self._block + 1):
                held = self._memory.get(self._tables[name][1 - self._state_group][index])
                assert isinstance(held, list), f"{name} has a page that was not cleared"
                behind = held[max(0, row.start - index * self._block) :]
                own = {*self._known[name][max(row.start, index * self._block) + 1 :], *self._tried[name]}
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

    def _written_blocks(self, row: Row) -> range:
        return range(row.start // self._block, (row.end - 1) // self._block + 1)

    def _write_slots(self, name: str, row: Row) -> set[int]:
        """Fill the slots at each boundary and at the end, or those of a window; returns them."""
        table, block, made, written = self._tables[name][self._state_group], self._block, row.spoiled, set()
        for index in self._written_blocks(row):
            slot, stop = table[index], min(row.end, (index + 1) * block)
            if slot and row.window:
                self._store(slot, tuple(made), row.start)
            elif slot:
                self._store(slot, (made[stop - row.start],), stop)
            if slot:
                written.add(slot)
            assert slot or not row.window, f"{name}: nothing holds the state after {stop} tokens"
        assert slot, f"{name}: nothing holds the state after {row.end} tokens"
        self.seen["two slots"] += row.window and len(written) == 2
        return written

    def _sample(self, name: str, row: Row, *, muted: bool) -> list[int]:
        known, computed, tokens = self._known[name], row.end - len(row.drafts), list[int]()
        if computed + 1 == len(known):
            for count, draft in enumerate([*row.drafts, None], computed):
                sick = muted or row.healthy < count
                tokens.append(NONSENSE if sick else next_token(row.states[count - row.start]))
                known.append(after(known[-1], tokens[-1]))
                if tokens[-1] != draft:
                    break
        right = max(0, len(tokens) - 1)
        self._computed[name], self._rejected[name] = computed + right, len(row.drafts) - right
        self.drafts[name] = self.drafter.propose(known[-1])[: self._wanted] if tokens else []
        self.seen.update(accepted=right, rejected=len(row.drafts) - right)
        if (glitch := self.glitches.get(name)) and glitch.happened:
            glitch.counted |= row.healthy < computed + right
        return tokens
