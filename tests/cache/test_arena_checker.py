"""The checker of all memory sees a block that is lost, doubled or taken for something else."""

import random

import pytest
from support.arena import Traffic

from kimi_vllm.cache.arena import Kind


def busy():
    """A pool with blocks of every kind."""
    traffic = Traffic(40)
    draw = random.Random(1)
    for number in range(3):
        traffic.finish(traffic.start([number] * 8, publish=number > 0))
    traffic.start(draw.choices(range(3, 9), k=16))
    traffic.start([1] * 8 + [5] * 8)
    traffic.check()
    counts = traffic.arena.counts()
    assert all(counts.values()), counts
    return traffic


def of_kind(traffic, kind):
    blocks = traffic.arena.blocks[1:]
    return next(block for block in blocks if traffic.arena._kinds[block.block_id] == kind)


def lose_a_clean_block(traffic):
    traffic.arena.free_block_queue.popleft()


def lose_a_page(traffic):
    traffic.running[0].pages.pop()


def lose_a_state_s_block(traffic):
    next(iter(traffic.slots.backing.values())).pop()


def give_a_page_to_a_slot(traffic):
    next(iter(traffic.slots.backing.values()))[0] = of_kind(traffic, Kind.PAGE).block_id


def give_a_block_to_two_slots(traffic):
    one, two, *_ = traffic.slots.backing.values()
    one[0] = two[0]


def use_a_kept_page_without_taking_it(traffic):
    traffic.running[0].pages.append(of_kind(traffic, Kind.KEPT))


def count_a_reference_twice(traffic):
    of_kind(traffic, Kind.PAGE).ref_cnt += 1


def call_a_page_a_state(traffic):
    traffic.arena._kinds[of_kind(traffic, Kind.PAGE).block_id] = Kind.STATE


def call_a_state_clean(traffic):
    traffic.arena._kinds[of_kind(traffic, Kind.STATE).block_id] = Kind.CLEAN


def loosen_a_page_that_is_needed(traffic):
    traffic.arena._move(of_kind(traffic, Kind.KEPT), Kind.LOOSE)


def keep_a_page_that_nobody_needs(traffic):
    traffic.arena._move(of_kind(traffic, Kind.LOOSE), Kind.KEPT)


def leave_a_hash_on_a_clean_block(traffic):
    of_kind(traffic, Kind.CLEAN).set_block_hash(b"x" * 36, num_tokens=4)


def give_a_state_s_block_a_hash(traffic):
    of_kind(traffic, Kind.STATE).set_block_hash(b"x" * 36, num_tokens=4)


def forget_what_a_state_needs(traffic):
    traffic.arena._needed.popitem()


def miscount_a_queue(traffic):
    traffic.arena._loose.num_free_blocks += 1


def lose_a_slot(traffic):
    traffic.running[0].states.pop()


def hold_a_slot_twice(traffic):
    traffic.running[1].states.append(traffic.running[0].states[-1])


def forget_that_a_slot_is_published(traffic):
    next(block for block in traffic.slots.blocks if block.block_hash is not None).reset_hash()


@pytest.mark.parametrize(
    "mistake",
    [
        lose_a_clean_block,
        lose_a_page,
        lose_a_state_s_block,
        give_a_page_to_a_slot,
        give_a_block_to_two_slots,
        use_a_kept_page_without_taking_it,
        count_a_reference_twice,
        call_a_page_a_state,
        call_a_state_clean,
        loosen_a_page_that_is_needed,
        keep_a_page_that_nobody_needs,
        leave_a_hash_on_a_clean_block,
        give_a_state_s_block_a_hash,
        forget_what_a_state_needs,
        miscount_a_queue,
        lose_a_slot,
        hold_a_slot_twice,
        forget_that_a_slot_is_published,
    ],
)
def test_the_checker_sees(mistake):
    traffic = busy()
    mistake(traffic)
    with pytest.raises(AssertionError):
        traffic.check()
