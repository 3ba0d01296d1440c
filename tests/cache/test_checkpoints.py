"""Which boundaries of a prompt are worth a slot, and what losing a kept one costs."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_vllm.cache.checkpoints import CheckpointIndex, boundaries_to_keep

MILLION = 2**20 // 64


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [(1, []), (63, []), (64, [64]), (65, [64]), (127, [64]), (128, [64, 128]), (129, [128]), (1000, [960])],
)
def test_last_boundary_and_the_one_an_identical_prompt_can_use(prompt, kept):
    assert sorted(boundaries_to_keep(prompt, 64)) == kept


def test_junction_and_interval_are_kept_on_the_block_grid():
    assert sorted(boundaries_to_keep(1000, 64, junction=200)) == [192, 960]
    assert sorted(boundaries_to_keep(1000, 64, interval=300)) == [320, 640, 960]


@settings(deadline=None)
@given(
    prompt=st.integers(1, 5000),
    block=st.sampled_from([16, 64, 128]),
    junction=st.integers(0, 5000),
    interval=st.integers(0, 700),
)
def test_boundaries_lie_on_the_grid_inside_the_prompt(prompt, block, junction, interval):
    kept = boundaries_to_keep(prompt, block, min(junction, prompt), interval)
    assert all(0 < boundary <= prompt and boundary % block == 0 for boundary in kept)
    assert (prompt - 1) // block * block in kept | {0}


@settings(deadline=None)
@given(prompt=st.integers(1, 3000), start=st.integers(0, 3000), step=st.integers(1, 999), interval=st.integers(0, 200))
def test_a_step_asks_for_its_own_boundaries_only(prompt, start, step, interval):
    whole = boundaries_to_keep(prompt, 64, 200, interval)
    part = boundaries_to_keep(prompt, 64, 200, interval, start=start, end=start + step)
    assert part == {boundary for boundary in whole if start < boundary <= start + step}


@pytest.mark.parametrize("slot", [0, 1])
def test_every_slot_can_be_an_ancestor(slot):
    """Slot 0 is the null slot on a device, but a slot like any other on the host."""
    index, lineage = CheckpointIndex(), "abcdef"
    index.add(slot, lineage, 2)
    index.add(7, lineage, 5)
    assert index.value(7) == 3
    index.check()


class Blocks:
    """Keys of a long sequence, made up as they are read, which is counted: `shared` of a common one, then its own."""

    reads = 0

    def __init__(self, name, shared=0, length=MILLION):
        self.name, self.shared, self.length = name, shared, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        Blocks.reads += 1
        return ("shared" if index < self.shared else self.name, index)


def reads(function, *arguments):
    before = Blocks.reads
    result = function(*arguments)
    return Blocks.reads - before, result


def test_neither_a_million_tokens_nor_thousands_of_states_are_walked():
    """Of 3,000 conversations behind a system prompt of 100 blocks, each with a state at the end."""
    index = CheckpointIndex()
    for slot in range(3000):
        count, _ = reads(index.add, slot, Blocks(slot, shared=100), 101 + slot)
        assert count < 300
    count, found = reads(index.longest, Blocks("new"), MILLION)
    assert found == 0
    assert count < 100
    count, found = reads(index.longest, Blocks(2000, shared=100), MILLION)
    assert found == 2101
    assert count < 300
    count, _ = reads(index.add, 3000, Blocks("last"), MILLION)
    assert count < 300
    count, _ = reads(index.forget, 3000)
    assert count < 300
    index.add(3001, Blocks("last", shared=100), 100)
    assert index.value(7) == 8, "the system prompt is what it continues"


def test_the_longest_prefix_is_the_one_that_a_walk_from_the_end_finds():
    rng, index, published = random.Random(5), CheckpointIndex(), {}
    for turn in range(1500):
        tokens = "".join(rng.choices("ab", k=rng.choice((3, 9, 40))))
        lineage = [tokens[:end] for end in range(1, len(tokens) + 1)]
        limit = rng.randrange(len(lineage) + 1)
        expected = next((n for n in range(limit, 0, -1) if lineage[n - 1] in published), 0)
        assert index.longest(lineage, limit) == expected
        if len(published) < 60 and limit and index.add(turn, lineage, limit):
            published[lineage[limit - 1]] = turn
        elif published and rng.random() < 0.5:
            index.forget(published.pop(rng.choice(sorted(published))))
        if turn % 50 == 0:
            index.check()
