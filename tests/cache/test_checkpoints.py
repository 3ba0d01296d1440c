"""Which boundaries of a prompt are worth a slot, and what losing a kept one costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_vllm.cache.checkpoints import CheckpointIndex, boundaries_to_keep


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [(1, []), (63, []), (64, [64]), (65, [64]), (127, [64]), (128, [64, 128]), (129, [128]), (1000, [960])],
)
def test_last_boundary_and_the_one_an_identical_prompt_can_use(prompt, kept):
    assert sorted(boundaries_to_keep(prompt, 64)) == kept


def test_junction_and_interval_are_kept_on_the_block_grid():
    assert sorted(boundaries_to_keep(1000, 64, junction=200)) == [192, 960]
    assert sorted(boundaries_to_keep(1000, 64, interval=300)) == [320, 640, 960]


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


@pytest.mark.parametrize("slot", [0, 1])
def test_every_slot_can_be_an_ancestor(slot):
    """Slot 0 is the null slot on a device, but a slot like any other on the host."""
    index, lineage = CheckpointIndex(), "abcdef"
    index.add(slot, lineage, 2)
    index.add(7, lineage, 5)
    assert index.value(7) == 3
    index.check()
