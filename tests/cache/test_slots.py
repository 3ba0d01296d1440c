"""The accountant: whatever happens, every slot is free, live or an idle checkpoint, and exactly one of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_vllm.cache.slots import NULL_SLOT, NoSlotError, SlotAllocator


def test_every_slot_but_null_is_handed_out_once():
    slots = SlotAllocator(5)
    assert sorted(slots.take()[0] for _ in range(4)) == [1, 2, 3, 4]
    assert not slots.can_take(1)
    with pytest.raises(NoSlotError):
        slots.take()
    slots.check()


def test_too_few_slots_are_refused():
    with pytest.raises(ValueError, match="num_slots=2"):
        SlotAllocator(2)


def test_a_released_slot_is_free_and_a_released_checkpoint_idle():
    slots = SlotAllocator(4)
    plain, kept = slots.take()[0], slots.take()[0]
    assert slots.publish(kept, ["key"], 1)
    slots.release(plain)
    slots.release(kept)
    assert (slots.num_free, slots.num_idle, slots.num_live) == (2, 1, 0)
    assert slots.find("key") == kept


def test_eviction_takes_the_checkpoint_unused_for_longest():
    slots = SlotAllocator(4)
    taken = [slots.take()[0] for _ in range(3)]
    for slot in taken:
        slots.publish(slot, [slot], 1)
        slots.release(slot)
    slots.retain(taken[0])
    slots.release(taken[0])
    assert [slots.take() for _ in range(3)] == [(slot, ([slot], 1)) for slot in (taken[1], taken[2], taken[0])]
    assert slots.find(taken[1]) is None


def test_a_checkpoint_in_use_is_not_evicted():
    slots = SlotAllocator(4)
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
    slots = SlotAllocator(4)
    first, second = slots.take()[0], slots.take()[0]
    assert slots.publish(first, ["key"], 1)
    assert not slots.publish(second, ["key"], 1)
    slots.release(second)
    assert slots.num_free == 2


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
    slots = SlotAllocator(4)
    live = slots.take()[0]
    slots.publish(live, ["live"], 1)
    free = next(slot for slot in (1, 2, 3) if slot != live)
    before = (slots.num_free, slots.num_live, slots.num_idle, slots.references(live))
    with pytest.raises(ValueError, match="slot"):
        misuse(slots, free, live)
    slots.check()
    assert before == (slots.num_free, slots.num_live, slots.num_idle, slots.references(live))


def test_withdraw_frees_an_idle_checkpoint_and_unpublishes_a_live_one():
    slots = SlotAllocator(4)
    idle, live = slots.take()[0], slots.take()[0]
    slots.publish(idle, ["idle"], 1)
    slots.publish(live, ["live"], 1)
    slots.release(idle)
    assert slots.slots() == [idle, live]
    assert slots.withdraw(idle)
    assert slots.withdraw(live)
    assert (slots.num_free, slots.num_live) == (2, 1)
    assert not slots.withdraw(live)
    slots.check()


@settings(max_examples=200, deadline=None)
@given(
    num_slots=st.integers(3, 9),
    history=st.lists(
        st.tuples(st.sampled_from(["take", "publish", "retain", "release", "withdraw"]), st.integers(0, 30))
    ),
)
def test_random_histories_keep_the_books(num_slots, history):
    slots = SlotAllocator(num_slots)
    references: dict[int, int] = {}
    published: dict[int, int] = {}
    for action, number in history:
        live = sorted(references)
        if action == "take" and slots.can_take(1):
            slot, evicted = slots.take()
            assert slot not in references
            assert slot != NULL_SLOT
            assert (evicted is not None) == (slot in published.values())
            published = {key: owner for key, owner in published.items() if owner != slot}
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
        slots.check()
        assert slots.num_live == len(references)
        assert slots.num_free + slots.num_idle + slots.num_live == num_slots - 1
        assert all(slots.find(key) == slot for key, slot in published.items())


@pytest.mark.parametrize("check", [False, True])
def test_a_check_does_not_change_what_is_evicted(check):
    """The value of the next victim is the age of what is parked from now on, once it is evicted and not before."""
    slots = SlotAllocator(4)
    taken = {}
    for key, length in (("dear", 10), ("cheap", 5)):
        taken[key], _ = slots.take()
        slots.publish(taken[key], [f"{key}{block}" for block in range(length)], length)
        slots.release(taken[key])
        if check:
            slots.check()
    slots.take()
    assert slots.take()[0] == taken["cheap"]
