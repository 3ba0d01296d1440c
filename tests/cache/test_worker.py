"""What the worker adds to vLLM's: sick slots with a step's result, and steps to warm up."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from kimi_vllm.cache import worker
from kimi_vllm.cache.exchange import NONFINITE
from kimi_vllm.cache.warm_up import step_sizes
from kimi_vllm.cache.worker import _with_sick_slots

DECLARED = sorted(name for name in vars(AsyncModelRunnerOutput) if not name.startswith("_"))


def result():
    return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[[7]])


def on_its_way(**answers):
    """An output of vLLM's kind that answers each declared method with what is given, or with the method's name."""
    methods = {name: lambda self, name=name: answers.get(name, name) for name in DECLARED}
    return type("OnItsWay", (AsyncModelRunnerOutput,), methods)()


@pytest.mark.parametrize("slots", [[], [(3, 0), (5, 2)]])
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


class FakeRunner:
    """Records the steps it is asked to run."""

    def __init__(self):
        self.steps = []

    def _dummy_run(self, num_tokens, **named):
        self.steps.append((num_tokens, named))


def worker_with(**attributes):
    made = object.__new__(worker.KimiWorker)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(("tokens", "sequences", "length", "most"), [(8192, 64, 4096, 8192), (8192, 1, 2048, 2048)])
def test_steps_of_every_size_are_run_and_none_that_cannot_be(tokens, sequences, length, most, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runner = FakeRunner()
    scheduler = SimpleNamespace(max_num_batched_tokens=tokens, max_num_seqs=sequences)
    model = SimpleNamespace(max_model_len=length)
    moe = SimpleNamespace(num_experts=256, num_experts_per_token=8)
    monkeypatch.setattr(worker, "geometry_of", lambda model_config: SimpleNamespace(moe=moe))
    worker_with(model_runner=runner, scheduler_config=scheduler, model_config=model)._warm_up_steps()
    assert [size for size, _ in runner.steps] == step_sizes(most, 256, 8)[::-1]
    # vLLM's first runner would otherwise replay, or capture, a graph that is not there yet.
    assert all(named["cudagraph_runtime_mode"] == CUDAGraphMode.NONE for _, named in runner.steps)
