"""One memory: blocks turn from pages into states and back under pressure, answers stay, and a step writes its own."""

import random
from collections import Counter

import pytest
import torch
from support.engine import RECALL, STATE_BLOCKS, check_equal, engines, random_prompts

from kimi_vllm.cache.arena import Kind
from kimi_vllm.cache.exchange import OPERATIONS

pytestmark = [pytest.mark.engine, pytest.mark.skipif(torch.cuda.is_available(), reason="compares all memory per step")]

BLOCKS = 12 * STATE_BLOCKS
OPTIONS = {"enable_prefix_caching": True, "max_num_seqs": 32, "max_num_batched_tokens": 150}
CONFIGURATIONS = {
    "plain": OPTIONS | {"enable_prefix_caching": False, "num_gpu_blocks_override": 400, "max_num_seqs": 8},
    "tight": OPTIONS | {"num_gpu_blocks_override": BLOCKS},
    "host": OPTIONS | {"num_gpu_blocks_override": BLOCKS, "additional_config": {"kimi": {"host_memory_gib": 0.01}}},
}


class Ledger:
    """What each block was and became, and what a step wrote that was not its own."""

    def __init__(self, engine):
        self.engine, self.kinds, self.turns, self.steps = engine, {}, Counter(), 0
        execute = engine.worker.execute_model

        def watched(output):
            self._look()
            before, allowed = engine.pool.memory.clone(), self._written(output)
            result = execute(output)
            # What nobody owns is filled with NaN between: an owner's block is not among it.
            changed = (engine.pool.memory != before).any(1).nonzero().flatten().tolist()
            outside = set(changed) - allowed - self._nobodys()
            assert not outside, f"a step wrote the blocks {sorted(outside)}, which are not its own"
            return result

        engine.worker.execute_model = watched

    def _look(self):
        self.steps += 1
        now = dict(enumerate(self.engine.scheduler.arena._kinds))
        for block, kind in now.items():
            before = self.kinds.get(block, kind)
            if kind != Kind.CLEAN and before != kind and Kind.STATE in (before, kind):
                self.turns["to a state" if kind == Kind.STATE else "to a page"] += 1
        self.kinds |= {block: kind for block, kind in now.items() if kind != Kind.CLEAN}

    def _written(self, output):
        """Blocks that a step may write: of its slots, of its pages, of copies made before it, and the null block."""
        backing, num_slots = self.engine.slots.backing, self.engine.slots.num_slots
        [step] = [step for scheduled, step in self.engine.scheduler._steps if scheduled is output]
        slots = {slot for access in step.accesses.values() for slot in access.written}
        blocks = {0}.union(*(access.pages()[1] for access in step.accesses.values()))
        given = {}
        for slot, what in getattr(output, OPERATIONS, ()):
            if isinstance(slot, list):
                blocks.update(what)
            elif isinstance(what, list):
                given[slot] = what
            elif what < num_slots:
                blocks.update(given.get(what, backing.get(what, ())))
        return blocks.union(*(backing[slot] for slot in slots))

    def _nobodys(self):
        return set(range(len(self.engine.pool.memory))) - self.engine.watch.owned()


def traffic(seed):
    """Prompts that share prefixes, of many lengths, in rounds: short, long, mixed."""
    rng = random.Random(seed)
    trunks = random_prompts([128, 320, 640], 100, seed=seed)
    for low, high, count in ((1, 60, 24), (500, 900, 6), (1, 900, 12), (64, 130, 24), (700, 900, 5)):
        prompts = []
        for index in range(count):
            [tail] = random_prompts([rng.randrange(low, high)], 100, seed=rng.randrange(10**6))
            trunk = rng.choice(trunks)
            shared = trunk[: rng.randrange(0, min(len(trunk), high))] if index % 2 else []
            prompts.append((shared + tail)[:900])
        yield prompts, rng.choice([4, 20, 70])


def test_blocks_turn_both_ways_and_a_step_writes_its_own():
    with engines(RECALL, CONFIGURATIONS) as running:
        ledgers = {name: Ledger(running[name]) for name in ("tight", "host")}
        for prompts, answer in traffic(5):
            expected = running["plain"].complete(prompts, max_tokens=answer)
            for name in ledgers:
                for ours, plain in zip(running[name].complete(prompts, max_tokens=answer), expected, strict=True):
                    check_equal(ours, plain)
        for name, ledger in ledgers.items():
            assert ledger.turns["to a state"] > 100, ledger.turns
            assert ledger.turns["to a page"] > 100, ledger.turns
            assert running[name].watch.spoiled > 200
        assert running["host"].counts["swaps_in"] > 0
