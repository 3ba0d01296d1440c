"""One sick state harms no healthy request, whatever is aborted, preempted, swapped, reset or in flight meanwhile."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.arrivals import Arrival, rounds
from support.hash_worker import NONSENSE, Glitch, answer
from support.schedules import MODES, SCARCE

from kimi_vllm.cache import contagion, scheduler
from kimi_vllm.cache.contagion import Access, Step, spread

CASES = 84  # each of 24, so 2,016


def access(read, *written, first=0, end=64, preemptions=0):
    return Access(first, end, read, written, preemptions, ())


def test_a_sick_slot_is_followed_through_reads_moves_and_writes():
    steps = [
        Step([], {"sick": access(0, 1, 2), "sound": access(0, 3)}),
        # Slot 2 goes to the host and is written anew by a request that read slot 3; slot 1 is resumed from.
        Step([(2, 20)], {"sound": access(3, 2), "heir": access(1, 4, first=64, end=200)}),
        # What was on the host comes back into slot 5, slot 20 is stored anew, and the heir goes on.
        Step([(20, 5), (3, 20)], {"heir": access(4, 4, 6, first=200, end=201), "late": access(5, 7)}),
    ]
    found = spread({1, 2}, steps)
    assert (found.origins, found.victims) == ({"sick"}, {"heir", "late"})
    assert found.slots == {1, 4, 5, 6, 7}
    assert found.tokens == {"sick": (0, 64), "heir": (64, 201), "late": (0, 64)}
    assert [step.spoiled for step in steps] == [set(), {"heir"}, {"heir", "late"}]


def test_a_step_s_report_blames_nobody_who_is_known_to_have_read_a_sick_state():
    steps = [Step([], {"sick": access(0, 1)}), Step([], {"heir": access(1, 2), "sick": access(1, 1)})]
    spread({1}, steps)
    later = [steps[1], Step([], {"other": access(2, 3)})]
    found = spread({1, 2}, later)
    assert (found.origins, found.victims, found.slots) == (set(), {"other"}, {1, 2, 3})


sicknesses = st.dictionaries(st.integers(0, 3), st.tuples(st.integers(0, 320), st.booleans()), min_size=1, max_size=2)


def run_cases(make_server, on_nonfinite, **options):
    """Play random schedules in which one or two requests fall ill; what was seen."""
    seen = Counter()

    @settings(
        max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], **options
    )
    @given(rounds=rounds, sicknesses=sicknesses, resets=st.frozensets(st.integers(1, 15), max_size=1))
    def cases(rounds, sicknesses, resets):
        server = make_server()
        for number, schedule in enumerate(rounds):
            # In the second round the same names are healthy.
            server.worker.glitches = {} if number else glitches(schedule, sicknesses)
            server.play(schedule, resets)
            server.check_idle()
            server.check_healthy()
            for index, arrival in enumerate(schedule):
                check(server, str(index), arrival, on_nonfinite)
            seen["sick"] += sum(glitch.happened for glitch in server.worker.glitches.values())
        seen.update(cases=1, quarantined=server.scheduler._counts["quarantined"], **server.seen)

    cases()
    return seen


def glitches(schedule, sicknesses):
    found = {}
    for index, (token, always) in sicknesses.items():
        if index < len(schedule):
            arrival = schedule[index]
            found[str(index)] = Glitch(token % (len(arrival.prompt) + arrival.max_tokens), always)
    return found


def check(server, name, arrival: Arrival, on_nonfinite):
    ours, reason = server.answers[name], server.reasons.get(name)
    glitch = server.worker.glitches.get(name)
    assert NONSENSE not in ours, f"{name} was told what a sick state says"
    assert ours == answer(arrival.prompt, len(ours))
    if reason == "error":
        assert glitch is not None, f"{name} failed, and was never sick"
        assert glitch.happened, f"{name} failed, and was never sick"
        assert on_nonfinite == "abort" or glitch.always, f"{name} could have been computed again"
    elif reason is not None:
        assert len(ours) == arrival.max_tokens
    else:
        assert arrival.abort_after is not None


@pytest.mark.parametrize("on_nonfinite", ["abort", "resume"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCARCE)
def test_no_healthy_request_fails_because_of_a_sick_one(name, mode, on_nonfinite):
    seen = run_cases(lambda: MODES[mode].server(name, on_nonfinite), on_nonfinite)
    assert seen["cases"] >= CASES
    wanted = {"sick", "quarantined", "aborts", "hits", "resets"}
    assert {path for path in wanted if not seen[path]} == set(), seen


def no_walk(reported, steps):
    return spread(reported, steps[:1])


def nothing_in_flight(reported, steps):
    found = spread(reported, steps)
    return contagion.Spread(found.origins, set(), set(reported), found.tokens)


def states_only(reported, steps):
    found = spread(reported, steps)
    return contagion.Spread(found.origins, found.victims, found.slots, {})


def run_all(mode):
    for name in SCARCE:
        run_cases(lambda name=name: MODES[mode].server(name), "abort", phases=[Phase.generate])


@pytest.mark.parametrize("mutation", [no_walk, nothing_in_flight, states_only])
def test_a_quarantine_that_forgets_something_is_caught(mutation, monkeypatch):
    monkeypatch.setattr(scheduler, "spread", mutation)
    with pytest.raises(AssertionError, match=r"is published, and sick|is sick|was never sick|was told|another prefix"):
        run_all("two-in-flight")
