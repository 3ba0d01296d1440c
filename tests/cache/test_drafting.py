"""Drafts stop while few are accepted, soon come back when more are, and trying costs little."""

import random
from types import SimpleNamespace

import pytest
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from kimi_vllm import config_hook
from kimi_vllm.cache.drafting import HALF_LIFE, KNOWN, REST, TRIED, Drafting, both_lengths
from kimi_vllm.options import KimiOptions


class Traffic:
    """Requests whose drafts are right with some probability; a step's results are known some steps later."""

    def __init__(self, requests: int, drafts: int, delay: int, least: float = 0.25) -> None:
        self.drafting = Drafting(least, drafts)
        self._size, self._delay, self._random = (requests, drafts), delay, random.Random(0)
        self._flying: list[list[tuple[int, int]]] = []

    def run(self, steps: int, right: float) -> int:
        """Return how many of the steps drafted."""
        requests, drafts = self._size
        count = 0
        for _ in range(steps):
            wanted = self.drafting.wanted(requests)
            count += wanted
            self._flying.append([(drafts, self._accepted(drafts, right)) for _ in range(requests * wanted)])
            if len(self._flying) > self._delay:
                for result in self._flying.pop(0):
                    self.drafting.saw(*result)
        return count

    def _accepted(self, drafts: int, right: float) -> int:
        return next((n for n in range(drafts) if self._random.random() >= right), drafts)


SIZES = pytest.mark.parametrize(("requests", "drafts", "delay"), [(1, 3, 0), (1, 7, 2), (8, 3, 1), (128, 3, 2)])


@SIZES
def test_drafts_that_are_wrong_are_given_up_but_for_a_few(requests, drafts, delay):
    traffic = Traffic(requests, drafts, delay)
    first = traffic.run(200, right=0.0)
    assert first <= KNOWN / (requests * drafts) + 3 * (TRIED / (requests * drafts) + 1) + delay + 1
    later = traffic.run(10 * REST, right=0.0)
    assert 0 < later <= 10 * (TRIED / (requests * drafts) + 1)


@SIZES
def test_drafts_that_are_right_never_stop(requests, drafts, delay):
    assert Traffic(requests, drafts, delay).run(2000, right=0.8) == 2000


@SIZES
def test_drafts_follow_what_answers_are_like(requests, drafts, delay):
    traffic = Traffic(requests, drafts, delay)
    traffic.run(1000, right=0.8)
    forgotten = 4 * HALF_LIFE // (requests * drafts) + delay + 1
    traffic.run(forgotten, right=0.0)
    assert traffic.run(REST, right=0.0) <= TRIED / (requests * drafts) + 1
    traffic.run(4 * REST, right=0.9)
    assert traffic.run(100, right=0.9) == 100


def test_by_default_of_a_gpu_nothing_stops():
    assert Traffic(64, 3, 2, least=0.0).run(1000, right=0.0) == 1000


def test_prompts_in_which_nothing_recurs_cost_nothing_and_stop_nothing():
    """The drafter finds no drafts: there are no results, and no reason to stop looking."""
    drafting = Drafting(0.25, 3)
    assert all(drafting.wanted(4) for _ in range(1000))


@pytest.mark.parametrize("most", [2, 256])
def test_vllm_captures_graphs_with_drafts_and_without(most):
    lookup = build_dynamic_sd_schedule_lookup(
        both_lengths(most, 3), vllm_max_batch_size=most, vllm_num_speculative_tokens=3
    )
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
