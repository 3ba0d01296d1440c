"""The accountant of slots: every one is bare, spare, live or an idle checkpoint, and exactly one of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_vllm.cache.slots import NULL_SLOT, NoSlotError, SlotAllocator

BLOCKS = 2
"""Of a slot."""


class Memory:
    """Blocks that are nobody's or a slot's."""

    def __init__(self, num_blocks):
        self.free, self.needed = list(range(num_blocks)), 0

    def get_num_free_blocks(self):
        return len(self.free) + self.slots.num_reclaimable * BLOCKS

    def take_state(self):
        while len(self.free) < BLOCKS:
            assert self.slots.drop_spare() or self.slots.evict(), "more was promised than there is"
        taken, self.free = self.free[:BLOCKS], self.free[BLOCKS:]
        return taken

    def give_state(self, ids):
        self.free += ids

    def cover(self, change, lineage, start, stop):
        self.needed += change * (stop - start)


def make_slots(states):
    """Slots with blocks for so many of them."""
    memory = Memory(states * BLOCKS)
    slots = memory.slots = SlotAllocator(1 + states, BLOCKS, memory)
    return slots


def available(slots):
    """Slots that could be taken without losing a checkpoint."""
    return slots.num_spare + len(slots._blocks.free) // BLOCKS


def check(slots):
    slots.check()
    blocks = [block for ids in slots.backing.values() for block in ids] + slots._blocks.free
    assert sorted(blocks) == list(range(BLOCKS * (slots.num_slots - 1)))
    assert slots._blocks.needed == len(list(slots.covered()))


def test_every_slot_but_null_is_handed_out_once():
    slots = make_slots(4)
    assert sorted(slots.take() for _ in range(4)) == [(slot, True) for slot in (1, 2, 3, 4)]
    assert not slots.can_take(1)
    with pytest.raises(NoSlotError):
        slots.take()
    check(slots)


def test_a_spare_slot_needs_no_blocks_until_it_gives_them_up():
    slots = make_slots(2)
    slot, fresh = slots.take()
    had = slots.backing[slot]
    slots.release(slot)
    assert (fresh, slots.num_spare) == (True, 1)
    assert slots.take() == (slot, False)
    assert slots.backing[slot] == had
    slots.release(slot)
    assert slots.drop_spare()
    assert not slots.drop_spare()
    assert not slots.backing
    assert slots.take()[1]
    check(slots)


def test_room_for_others_is_left_on_request():
    slots = make_slots(3)
    slots.take()
    assert slots.can_take(2)
    assert slots.can_take(1, reserve=2)
    assert not slots.can_take(1, reserve=3)


def test_a_released_slot_is_spare_and_a_released_checkpoint_idle():
    slots = make_slots(3)
    plain, kept = slots.take()[0], slots.take()[0]
    assert slots.publish(kept, ["key"], 1)
    slots.release(plain)
    slots.release(kept)
    assert (slots.num_spare, slots.num_idle, slots.num_live) == (1, 1, 0)
    assert slots.find("key") == kept


def test_eviction_takes_the_checkpoint_unused_for_longest():
    slots = make_slots(3)
    taken = [slots.take()[0] for _ in range(3)]
    for slot in taken:
        slots.publish(slot, [slot], 1)
        slots.release(slot)
    slots.retain(taken[0])
    slots.release(taken[0])
    assert [slots.evict() for _ in range(3)] == [(slot, ([slot], 1)) for slot in (taken[1], taken[2], taken[0])]
    assert slots.find(taken[1]) is None
    assert slots.evict() is None


def test_a_checkpoint_in_use_is_not_evicted():
    slots = make_slots(3)
    for key in "ab":
        slot, _ = slots.take()
        slots.publish(slot, [key], 1)
        slots.release(slot)
    used = slots.find("a")
    slots.retain(used)
    others = {slots.take()[0], slots.take()[0]}
    assert used not in others
    assert slots.find("a") == used
    assert not slots.can_take(1)


def test_a_second_state_for_the_same_prefix_is_not_published():
    slots = make_slots(3)
    first, second = slots.take()[0], slots.take()[0]
    assert slots.publish(first, ["key"], 1)
    assert not slots.publish(second, ["key"], 1)
    slots.release(second)
    assert (slots.num_spare, slots.num_idle, slots.num_live) == (1, 0, 1)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda slots, free, live: slots.retain(free),
        lambda slots, free, live: slots.release(free),
        lambda slots, free, live: slots.publish(free, ["key"], 1),
        lambda slots, free, live: slots.publish(live, ["again"], 1),
    ],
    ids=["retain-free", "release-free", "publish-free", "publish-twice"],
)
def test_misuse_raises_and_changes_nothing(misuse):
    slots = make_slots(3)
    live = slots.take()[0]
    slots.publish(live, ["live"], 1)
    free = next(slot for slot in (1, 2, 3) if slot != live)
    before = (available(slots), slots.num_live, slots.num_idle, slots.references(live))
    with pytest.raises(ValueError, match="slot"):
        misuse(slots, free, live)
    check(slots)
    assert before == (available(slots), slots.num_live, slots.num_idle, slots.references(live))


def test_withdraw_frees_an_idle_checkpoint_and_unpublishes_a_live_one():
    slots = make_slots(3)
    idle, live = slots.take()[0], slots.take()[0]
    slots.publish(idle, ["idle"], 1)
    slots.publish(live, ["live"], 1)
    slots.release(idle)
    assert slots.slots() == [idle, live]
    assert slots.withdraw(idle)
    assert slots.withdraw(live)
    assert (available(slots), slots.num_live) == (2, 1)
    assert not slots.withdraw(live)
    check(slots)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    states=st.integers(2, 8),
    history=st.lists(
        st.tuples(
            st.sampled_from(["take", "publish", "retain", "release", "withdraw", "evict", "drop"]), st.integers(0, 30)
        )
    ),
)
def test_random_histories_keep_the_books(states, history):
    slots = make_slots(states)
    references: dict[int, int] = {}
    published: dict[int, int] = {}
    for action, number in history:
        live = sorted(references)
        if action == "take" and slots.can_take(1):
            slot, _ = slots.take()
            assert slot not in references
            assert slot != NULL_SLOT
            published = {key: owner for key, owner in published.items() if slots.find(key) == owner}
            references[slot] = 1
        elif action == "publish" and live:
            slot = live[number % len(live)]
            if slot not in published.values():
                assert slots.publish(slot, [number], 1) == (number not in published)
                published.setdefault(number, slot)
        elif action == "retain" and published:
            slot = sorted(published.values())[number % len(published)]
            slots.retain(slot)
            references[slot] = references.get(slot, 0) + 1
        elif action == "release" and live:
            slot = live[number % len(live)]
            slots.release(slot)
            references[slot] -= 1
            if not references[slot]:
                del references[slot]
        elif action == "withdraw" and published:
            slot = sorted(published.values())[number % len(published)]
            assert slots.withdraw(slot)
            published = {key: owner for key, owner in published.items() if owner != slot}
        elif action == "evict" and (evicted := slots.evict()):
            slot, ([key], _) = evicted
            assert slot not in references
            assert published.pop(key) == slot
        elif action == "drop":
            spare = slots.num_spare
            assert slots.drop_spare() == (spare > 0)
        check(slots)
        assert slots.num_live == len(references)
        assert available(slots) + slots.num_idle + slots.num_live == states
        assert all(slots.find(key) == slot for key, slot in published.items())


@pytest.mark.parametrize("checked", [False, True])
def test_a_check_does_not_change_what_is_evicted(checked):
    """The value of the next victim is the age of what is parked from now on, once it is evicted and not before."""
    slots = make_slots(3)
    taken = {}
    for key, length in (("dear", 10), ("cheap", 5)):
        taken[key], _ = slots.take()
        slots.publish(taken[key], [f"{key}{block}" for block in range(length)], length)
        slots.release(taken[key])
        if checked:
            check(slots)
    assert slots.evict()[0] == taken["cheap"]
