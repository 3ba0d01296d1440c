"""What the worker adds to a step's result: sick slots, on results that are there and on those still on their way."""

import pytest
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from kimi_vllm.cache.exchange import NONFINITE
from kimi_vllm.worker import _with_sick_slots

DECLARED = sorted(name for name in vars(AsyncModelRunnerOutput) if not name.startswith("_"))


def result():
    return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[[7]])


def on_its_way(**answers):
    """An output of vLLM's kind that answers each declared method with what is given, or with the method's name."""
    methods = {name: lambda self, name=name: answers.get(name, name) for name in DECLARED}
    return type("OnItsWay", (AsyncModelRunnerOutput,), methods)()


@pytest.mark.parametrize("slots", [[], [3, 5]])
def test_a_result_on_its_way_brings_the_sick_slots_when_it_lands(slots):
    inner = result()
    output = _with_sick_slots(on_its_way(get_output=inner), lambda: slots)
    assert isinstance(output, AsyncModelRunnerOutput)
    landed = output.get_output()
    assert landed is inner
    assert getattr(landed, NONFINITE, []) == slots


@pytest.mark.parametrize("name", DECLARED)
def test_the_inner_result_answers_all_that_vllm_may_ask(name):
    """0.32 asks for `get_output` only; 0.33 for `get_kv_connector_output` too, without which nothing served."""
    assert getattr(_with_sick_slots(on_its_way(), list), name)() == name


def test_a_result_that_is_there_gets_them_at_once_and_the_shared_empty_one_never():
    assert getattr(_with_sick_slots(result(), lambda: [3]), NONFINITE) == [3]
    assert not hasattr(_with_sick_slots(result(), list), NONFINITE)
    assert _with_sick_slots(EMPTY_MODEL_RUNNER_OUTPUT, lambda: [3]) is EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, NONFINITE)
