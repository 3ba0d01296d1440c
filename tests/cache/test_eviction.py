"""Which checkpoint goes first: by value with ageing, or by recency."""

import random

import pytest

from kimi_vllm.cache.checkpoints import CheckpointIndex
from kimi_vllm.cache.eviction import EvictionQueue
from kimi_vllm.cache.host_tier import HostTier

CHAIN = list("abcdefghij")


def published(index, slot, lineage, length):
    assert index.add(slot, lineage, length)
    index.park(slot)


def evicted(index):
    slot, _ = index.evict()
    index.check()
    return slot


@pytest.mark.parametrize(("eviction", "order"), [("value", [2, 1, 3]), ("lru", [1, 2, 3])])
def test_value_counts_blocks_since_the_nearest_ancestor(eviction, order):
    index = CheckpointIndex(eviction)
    published(index, 1, CHAIN, 4)
    published(index, 2, CHAIN, 6)  # two blocks more than slot 1
    published(index, 3, list("xyzuvw"), 6)
    assert [index.value(slot) for slot in (1, 2, 3)] == [4, 2, 6]
    assert [evicted(index) for _ in range(3)] == order


def test_losing_an_ancestor_makes_its_heirs_dearer():
    index = CheckpointIndex()
    for slot, length in enumerate((2, 5, 9), 1):
        published(index, slot, CHAIN, length)
    assert index.value(3) == 4
    index.forget(2)
    index.check()
    assert index.value(3) == 7
    index.forget(1)
    assert index.value(3) == 9


def test_a_junction_published_later_comes_between():
    index = CheckpointIndex()
    published(index, 1, CHAIN, 8)
    other = [*CHAIN[:4], "p", "q"]
    published(index, 2, other, 6)
    published(index, 3, CHAIN[:4], 4)
    index.check()
    assert [index.value(slot) for slot in (1, 2, 3)] == [4, 2, 4]


def test_equal_values_go_by_recency():
    index = CheckpointIndex()
    for slot in (1, 2, 3):
        published(index, slot, [f"{slot}a", f"{slot}b"], 2)
    index.wake(1)
    index.park(1)
    assert [evicted(index) for _ in range(3)] == [2, 3, 1]


def test_a_dear_checkpoint_that_nobody_uses_goes_in_the_end():
    index = CheckpointIndex()
    published(index, 1, [f"dear{i}" for i in range(10)], 10)
    gone = []
    for slot in range(2, 40):
        published(index, slot, [f"{slot}a", f"{slot}b"], 2)
        if index.num_idle > 2:
            gone.append(evicted(index))
    assert gone.index(1) > 2
    assert 1 in gone


def test_asking_for_the_victim_changes_nothing():
    queue = EvictionQueue()
    queue.park(1, 10)
    assert queue.victim() == queue.victim() == 1
    queue.park(2, 5)
    assert (queue.evict(), queue.evict(), queue.evict()) == (2, 1, None)


@pytest.mark.parametrize("eviction", ["value", "lru"])
def test_random_histories_keep_the_tree(eviction):
    rng = random.Random(7)
    index = CheckpointIndex(eviction)
    free, idle = set(range(1, 12)), set()
    for _ in range(2000):
        action = rng.random()
        if action < 0.5 and free:
            tokens, lineage = rng.choices("ab", k=6), []
            for token in tokens:
                lineage.append((lineage[-1] if lineage else "") + token)
            slot = min(free)
            if index.add(slot, lineage, rng.randint(1, 6)):
                free.remove(slot)
                index.park(slot)
                idle.add(slot)
        elif action < 0.7 and idle:
            slot = rng.choice(sorted(idle))
            index.wake(slot)
            index.park(slot)
        elif action < 0.8 and idle:
            slot = rng.choice(sorted(idle))
            index.forget(slot)
            idle.remove(slot)
            free.add(slot)
        elif idle:
            slot = evicted(index)
            assert slot in idle
            idle.remove(slot)
            free.add(slot)
        index.check()
        assert index.idle_slots() == idle


class Counted(int):
    """A number that counts how often any of its kind is compared."""

    comparisons = 0

    def __lt__(self, other):
        type(self).comparisons += 1
        return int(self) < int(other)

    def __add__(self, other):
        return Counted(int(self) + int(other))

    __radd__ = __add__


def test_an_eviction_looks_at_few_of_many():
    queue, states = EvictionQueue(), 12_000
    for slot in range(states):
        queue.park(slot, Counted(slot * 7919 % states))
    Counted.comparisons = 0
    for evictions in range(100):
        assert queue.evict() * 7919 % states == evictions
    assert Counted.comparisons < 100 * 40


def test_what_is_out_of_date_does_not_pile_up():
    queue = EvictionQueue()
    for value in range(10_000):
        queue.park(1, value + 1)
        queue.revalue(1, value)
        queue.remove(1)
    assert len(queue._heap) < 100
    assert queue.victim() is None


def test_a_random_history_evicts_in_the_order_of_values_then_of_age():
    rng, queue, model, age = random.Random(3), EvictionQueue(), {}, 0
    for turn in range(5000):
        slot = rng.randrange(60)
        if slot not in model:
            model[slot] = [age, rng.randrange(8), turn]
            queue.park(slot, model[slot][1])
        elif rng.random() < 0.4:
            model[slot][1] = rng.randrange(8)
            queue.revalue(slot, model[slot][1])
        elif rng.random() < 0.5:
            del model[slot]
            queue.remove(slot)
        if model and rng.random() < 0.3:
            expected = min(model, key=lambda slot: (model[slot][0] + model[slot][1], model[slot][2]))
            assert queue.victim() == expected
            if rng.random() < 0.5:
                assert queue.evict() == expected
                age = max(age, sum(model.pop(expected)[:2]))


class HostBlocks:
    def __init__(self, count):
        self.free = [*range(count)]

    def take_host(self, count):
        return [self.free.pop() for _ in range(count)] if len(self.free) >= count else None

    def give_host(self, ids):
        self.free += ids


def host_tier(num_slots):
    return HostTier(num_slots, 2, HostBlocks(2 * num_slots + 1))


def test_a_state_on_the_host_keeps_the_keys_of_its_own_prefix_only():
    tier, request = host_tier(2), [*CHAIN]
    slot = tier.store(request, 3)
    request += ["answer"] * 1000
    assert tier.claim(slot) == (CHAIN[:3], 3)


def test_host_tier_keeps_what_is_worth_most_and_finds_it():
    tier = host_tier(2)
    first = tier.store(CHAIN, 3)
    second = tier.store(list("xy"), 2)
    assert {first, second} == {0, 1}
    assert tier.store(CHAIN, 3) is None  # here already
    assert tier.store(list("pqrst"), 5) == second  # the cheapest goes
    assert tier.find("y") is None
    assert tier.find("t") == second
    tier.check()


def test_a_slot_that_is_being_loaded_is_not_given_away():
    tier = host_tier(1)
    slot = tier.store(CHAIN, 3)
    assert tier.claim(slot) == (CHAIN[:3], 3)
    assert tier.store(list("xyz"), 3) is None
    tier.release(slot)
    assert tier.store(list("xyz"), 3) == slot
    tier.clear()
    assert tier.num_idle == 0
    tier.check()


def test_a_state_finds_no_room_where_pages_are():
    blocks = HostBlocks(5)
    tier = HostTier(2, 2, blocks)
    assert tier.store(CHAIN, 3) is not None
    blocks.take_host(2)
    assert tier.store(list("xy"), 2) is not None, "in the place of the other"
    assert tier.find(CHAIN[2]) is None
    tier.clear()
    blocks.take_host(2)
    assert tier.store(CHAIN, 3) is None
    tier.check()


def test_no_host_memory_stores_nothing():
    tier = host_tier(0)
    assert tier.store(CHAIN, 3) is None
    tier.check()


def test_a_state_that_was_used_is_worth_more():
    index = CheckpointIndex()
    for slot, lineage in ((1, "ab"), (2, "cde")):
        index.add(slot, lineage, len(lineage))
        index.park(slot)
    index.wake(1)
    index.park(1)
    assert (index.value(1), index.worth(1), index.worth(2)) == (2, 4, 3)
    assert evicted(index) == 2
