"""What the state cache spares on traces with prefixes to reuse, by eviction policy and by memory.

Two amounts of memory. *Everything fits*: nothing is ever evicted. *A third*: bytes for the pages of the whole trace,
for the states of running requests and for a third of the working set, which is the most states that have a use still
to come at any time (`traces.working_set`). Both kinds of scheduler may use them all for states or for pages. vLLM's
"align" has blocks of 1920 tokens, at the sizes of the 48B model, at whose ends its hits end; with --prefix-match-unit
they end at every 64th or 128th token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serve.bench.cache.replay import (
    ALIGN_BLOCK,
    BLOCK_BYTES,
    LONGEST,
    STATE_BYTES,
    Memory,
    Outcome,
    align_scheduler,
    our_scheduler,
    replay,
)
from serve.bench.cache.traces import BLOCK, TRACES, Turn, block_keys, prompt_of, reusable_tokens, working_set
from serve.common.rows import Row
from serve.common.tables import ResultTable

ALIGNED: dict[str, int | None] = {"align": None, "align-64": 64, "align-128": 128}
"""VLLM's own, by --prefix-match-unit."""
POLICIES = ("value", "lru", *ALIGNED)
FITS, THIRD = "everything fits", "a third"
CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class Reuse:
    """One policy on one trace with one amount of memory; tokens summed over all turns."""

    trace: str
    seed: int
    memory: str
    policy: str
    turns: int
    prompt: int
    reusable: int  # see `traces.reusable_tokens`
    hit: int  # tokens of prompts that were not computed
    computed: int  # all that was computed, answers included
    preemptions: int
    blocks: int  # memory, of 64 tokens; for "align" of 1920
    working_set: int
    share: float  # how much of what can be reused was


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace, what can be reused in it, and how much memory that takes."""

    name: str
    seed: int
    turns: Sequence[Turn]
    prompts: Sequence[list[int]]
    reusable: int
    pages: int
    working_set: int
    concurrency: int
    fits: Outcome

    @classmethod
    def of(cls, name: str, seed: int, concurrency: int = CONCURRENCY, **sizes: int) -> "Workload":
        """Draw a trace, and replay it once with room for everything to learn its working set."""
        turns = TRACES[name](seed, **sizes)
        answers = [turn.answer for turn in turns]
        prompts = [prompt_of(turns, index, answers) for index in range(len(turns))]
        blocks = {key for p, a in zip(prompts, answers, strict=True) for key in block_keys(p + a, BLOCK)}
        # Requests that run side by side hold pages of their own until one of them is done.
        pages = len(blocks) + concurrency * (max(map(len, prompts)) // BLOCK + 8) + 1
        pages = max(pages, LONGEST // BLOCK + 1)  # vLLM refuses less than its longest sequence
        fits = replay(our_scheduler(memory_of(concurrency, pages, 4 * len(turns))), turns)
        needed = working_set(prompts, answers, fits.hits)
        reusable = sum(reusable_tokens(prompts, answers))
        return cls(name, seed, turns, prompts, reusable, pages, needed, concurrency, fits)

    def memory(self, regime: str, state_blocks: int | None = None) -> Memory:
        """The memory of our scheduler in this regime; of another model if its states have so many blocks."""
        states = 4 * len(self.turns) if regime == FITS else self.concurrency + self.working_set // 3
        if state_blocks is not None:
            return Memory(self.concurrency, self.pages + states * state_blocks, state_blocks)
        return memory_of(self.concurrency, self.pages, states)

    def run(self, regime: str, policy: str, state_blocks: int | None = None) -> Reuse:
        """Replay it."""
        memory = self.memory(regime, state_blocks)
        if policy in ALIGNED:
            memory = aligned_memory(memory)
            outcome = replay(align_scheduler(memory, ALIGNED[policy]), self.turns)
        else:
            outcome = replay(our_scheduler(memory, policy), self.turns)
        return Reuse(
            trace=self.name,
            seed=self.seed,
            memory=regime,
            policy=policy,
            turns=len(self.turns),
            prompt=sum(map(len, self.prompts)),
            reusable=self.reusable,
            hit=sum(outcome.hits),
            computed=outcome.computed,
            preemptions=outcome.preemptions,
            blocks=memory.blocks,
            working_set=self.working_set,
            share=round(sum(outcome.hits) / self.reusable, 4),
        )


def memory_of(concurrency: int, pages: int, states: int) -> Memory:
    """Blocks of as many bytes as so many pages and states have."""
    return Memory(concurrency, pages + states * STATE_BYTES // BLOCK_BYTES)


def aligned_memory(ours: Memory) -> Memory:
    """As many bytes as our blocks have, in blocks of 1920 tokens."""
    return Memory(ours.concurrency, ours.blocks // (ALIGN_BLOCK // BLOCK))


def rows(names: Sequence[str], policies: Sequence[str], seed: int) -> Iterator[Reuse]:
    """Every trace with both amounts of memory under every policy."""
    for name in names:
        workload = Workload.of(name, seed)
        for regime in (FITS, THIRD):
            for policy in policies:
                yield workload.run(regime, policy)


def report(found: Sequence[Reuse], env: Row) -> None:
    """Print a table."""
    recency = {(row.trace, row.memory): row.hit for row in found if row.policy == "lru"}
    cells = []
    for row in found:
        base = recency.get((row.trace, row.memory))
        numbers = (f"{number:,}" for number in (row.prompt, row.reusable, row.hit))
        cells.append(
            [
                *(row.trace, row.memory, row.policy, *numbers, f"{row.share:.1%}", f"{row.prompt - row.hit:,}"),
                f"{row.hit / base:.2f}x" if base else "",
                f"{row.blocks:,}",
            ]
        )
    columns = ["trace", "memory", "policy", "prompt tokens", "reusable", "hit", "of reusable", "computed", "hit / lru"]
    title = f"replayed through {env['vllm']}'s scheduler, commit {env['commit']}"
    ResultTable(title, [*columns, "blocks"], cells, words=3).show()
