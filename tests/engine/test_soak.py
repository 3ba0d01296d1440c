"""The soak of serve/soak, short: everything is scarce, nothing leaks, every answer is right."""

import pytest
from support.engine import DRAFTS

from serve.soak import __main__ as soak

pytestmark = pytest.mark.engine


def test_nothing_leaks_and_nothing_is_wrong():
    counts = soak.soak(200, seed=1, drafts=DRAFTS)
    assert counts["finished"] + counts["aborted"] == counts["requests"] == 200
    assert (counts["wrong"], counts["leaked"]) == (0, 0)
    for path in ("aborted", "evictions", "swaps_out", "swaps_in", "hits", "long_answers"):
        assert counts[path] > 0, path


@pytest.mark.slow
def test_a_lost_state_is_a_wrong_answer(monkeypatch):
    """The soak must be able to fail: states from host memory that are another's do not go unnoticed."""
    from kimi_vllm.cache.pool import StatePool

    monkeypatch.setattr(StatePool, "_copy", lambda self, source, target: None)
    assert soak.soak(400, seed=1)["wrong"] > 0
