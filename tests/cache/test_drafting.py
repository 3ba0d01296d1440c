"""Drafts stop while few are accepted, soon come back when more are, and trying costs little."""

import random
from types import SimpleNamespace

import pytest
from support.drafter import Drafter
from support.schedules import DRAFTING, Server
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from kimi_vllm import config_hook
from kimi_vllm.cache import scheduler as schedulers
from kimi_vllm.cache.drafting import HALF_LIFE, KNOWN, REST, TRIED, Drafting, both_lengths
from kimi_vllm.options import KimiOptions

LEAST = 0.25


class Traffic:
    """Requests whose drafts are right with some probability; a step's results are known some steps later."""

    def __init__(self, requests: int, drafts: int, delay: int, least: float = LEAST) -> None:
        self.drafting = Drafting(least)
        self._size, self._delay, self._random = (requests, drafts), delay, random.Random(0)
        self._flying: list[list[tuple[int, int]]] = []

    def run(self, steps: int, right: float | list[float], found: float = 1.0) -> int:
        """Return how many of the steps drafted; `found` is how often a request's drafter finds something to draft."""
        requests, drafts = self._size
        chances = right if isinstance(right, list) else [right] * requests
        count = 0
        for _ in range(steps):
            wanted = self.drafting.wanted(True)
            count += wanted
            drafted = [chance for chance in chances if wanted and self._random.random() < found]
            self._flying.append([(drafts, self._accepted(drafts, chance)) for chance in drafted])
            if len(self._flying) > self._delay:
                for result in self._flying.pop(0):
                    self.drafting.saw(*result)
        return count

    def _accepted(self, drafts: int, right: float) -> int:
        return next((n for n in range(drafts) if self._random.random() >= right), drafts)


SIZES = pytest.mark.parametrize(("requests", "drafts", "delay"), [(1, 3, 0), (1, 7, 2), (8, 3, 1), (128, 3, 2)])


def steps_for(count: int, requests: int, drafts: int, delay: int) -> int:
    """Steps until so many drafts are known."""
    return -(-count // (requests * drafts)) + delay + 1


@SIZES
def test_drafts_that_are_wrong_are_given_up_but_for_a_few(requests, drafts, delay):
    traffic = Traffic(requests, drafts, delay)
    traffic.run(steps_for(KNOWN, requests, drafts, delay), right=0.0)
    tried = traffic.run(10 * REST, right=0.0)
    assert 0 < tried <= 10 * steps_for(TRIED, requests, drafts, delay)


@SIZES
def test_drafts_that_are_right_never_stop(requests, drafts, delay):
    assert Traffic(requests, drafts, delay).run(2000, right=0.8) == 2000


@SIZES
def test_drafts_follow_what_answers_are_like(requests, drafts, delay):
    traffic = Traffic(requests, drafts, delay)
    traffic.run(1000, right=0.8)
    traffic.run(steps_for(4 * HALF_LIFE, requests, drafts, delay), right=0.0)
    assert traffic.run(REST, right=0.0) <= steps_for(TRIED, requests, drafts, delay)
    traffic.run(REST + steps_for(TRIED, requests, drafts, delay), right=1.0)
    assert traffic.run(100, right=1.0) == 100


@pytest.mark.parametrize("good", [8, 40, 100])
@pytest.mark.parametrize("first", [True, False])
def test_it_does_not_matter_which_requests_come_first(good, first):
    """The share of the whole batch decides."""
    chances = sorted([0.95] * good + [0.0] * (128 - good), reverse=first)
    drafted = Traffic(128, 3, 1).run(1000, right=chances)
    enough = good * 2.7 / (128 * 3) > LEAST
    assert drafted == 1000 if enough else drafted < 100


@pytest.mark.parametrize("found", [0.05, 0.3])
def test_a_trial_lasts_until_there_was_something_to_try(found):
    """Where the drafter seldom finds anything, steps with nothing to verify cost nothing, and none is wasted."""
    traffic = Traffic(1, 3, 0)
    traffic.run(int(4 * KNOWN / found), right=0.0, found=found)
    assert traffic.run(10 * REST, right=0.0, found=found) < 10 * REST
    needed = REST + int(4 * TRIED / found)
    traffic.run(needed, right=1.0, found=found)
    assert traffic.run(100, right=1.0, found=found) == 100


def test_steps_in_which_nobody_could_draft_count_as_nothing():
    traffic = Traffic(1, 3, 0)
    while traffic.run(1, right=0.0):
        pass
    traffic.run(9, right=0.0)
    assert not any(traffic.drafting.wanted(False) for _ in range(10 * REST))
    assert [traffic.drafting.wanted(True) for _ in range(REST)].count(True) == 10


def test_with_a_least_share_of_nothing_nothing_stops():
    assert Traffic(64, 3, 2, least=0.0).run(1000, right=0.0) == 1000


@pytest.mark.parametrize(
    ("cpu", "replicas", "given", "expected"),
    [(True, 1, None, 0.15), (False, 1, None, 0.0), (False, 1, 0.3, 0.3), (True, 1, 0, 0.0), (True, 2, None, None)],
    ids=["cpu", "gpu", "gpu, set", "cpu, never", "replicas"],
)
def test_who_rests_by_default(cpu, replicas, given, expected, monkeypatch):
    server = DRAFTING["drafts"].server("room")
    config = server.scheduler.vllm_config
    monkeypatch.setattr(schedulers, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    monkeypatch.setattr(config.parallel_config, "data_parallel_size", replicas)
    monkeypatch.setitem(config.additional_config["kimi"], "least_drafts_accepted", given)
    drafting = Server("room", config, Drafter(3)).scheduler._drafting
    assert (drafting and drafting._least) == expected


@pytest.mark.parametrize("by_batch_size", [None, [(1, 2, 2), (3, 1024, 0)], both_lengths(1024, 3)])
def test_a_schedule_by_batch_size_is_the_users(by_batch_size, monkeypatch):
    config = DRAFTING["drafts"].server("room").scheduler.vllm_config
    most = config.scheduler_config.max_num_seqs
    if by_batch_size and by_batch_size[0] == (1, 1, 0):
        by_batch_size = both_lengths(most, 3)  # ours, for CUDA graphs alone
        expected = {3}
    else:
        expected = {2, 0} if by_batch_size else {3}
    monkeypatch.setattr(config.speculative_config, "num_speculative_tokens_per_batch_size", by_batch_size)
    scheduler = Server("room", config, Drafter(3)).scheduler
    assert {*scheduler._drafts[1:]} == expected
    assert {*scheduler._no_drafts} == {0}


@pytest.mark.parametrize("most", [2, 256])
def test_vllm_captures_graphs_with_drafts_and_without(most):
    lookup = build_dynamic_sd_schedule_lookup(both_lengths(most, 3), most, 3)
    assert {*lookup[1:]} == {0, 3}


@pytest.mark.parametrize(
    ("least", "cpu", "second_runner", "by_batch_size", "expected"),
    [
        (None, False, True, None, None),
        (0.1, False, True, None, [(1, 1, 0), (2, 8, 3)]),
        (0.1, False, False, None, None),
        (0.1, True, True, None, None),
        (0.1, False, True, [(1, 8, 2)], [(1, 8, 2)]),
    ],
    ids=["by default", "asked for", "first runner", "no graphs", "set by the user"],
)
def test_graphs_without_drafts_are_asked_for(least, cpu, second_runner, by_batch_size, expected, monkeypatch):
    monkeypatch.setattr(config_hook, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    speculation = SimpleNamespace(num_speculative_tokens=3, num_speculative_tokens_per_batch_size=by_batch_size)
    config = SimpleNamespace(
        speculative_config=speculation,
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        use_v2_model_runner=second_runner,
    )
    config_hook._capture_steps_without_drafts(config, KimiOptions(least_drafts_accepted=least))
    assert speculation.num_speculative_tokens_per_batch_size == expected
