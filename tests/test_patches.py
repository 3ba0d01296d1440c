"""The ledger of patches: each still needed, each still works."""

import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.cpus import emulate_amx

from kimi_vllm import patches


def test_vllm_still_trips_over_llvmlite():
    """When this fails, the patch of llvmlite can go."""
    from vllm.triton_utils import dispatcher

    assert "vars(value).get" in inspect.getsource(dispatcher._rebind_kernels)


def test_llvmlite_survives_vllms_scan():
    import llvmlite.binding.ffi
    import numba  # noqa: F401  # loads the library handle

    patches.apply_all()
    assert vars(llvmlite.binding.ffi.lib).get("kernel") is None
    assert llvmlite.binding.ffi.lib.LLVMPY_GetVersionInfo() > 0


def test_vllm_still_sends_half_blocks_of_int8_to_amx():
    """When this fails, the patch of check_cpu_sgl_kernel can go, if dtypes are checked too."""
    from vllm.model_executor.layers import utils

    assert "return k % 32 == 0 and n % 16 == 0" in inspect.getsource(utils.check_cpu_sgl_kernel)


def test_vllm_still_packs_experts_once():
    """When this fails, the patch of UnquantizedFusedMoEMethod can go, if tests/engine/test_weight_updates.py passes."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    source = inspect.getsource(inspect.unwrap(UnquantizedFusedMoEMethod._setup_kernel))
    _, _, first_time_only = source.partition("if not is_weight_update:\n")
    assert "            self.moe_kernel.fused_experts.process_weights_after_loading(layer)" in first_time_only
    patches.apply_all()
    patches.apply_all()  # as every engine of a process does
    assert not hasattr(UnquantizedFusedMoEMethod._setup_kernel.__wrapped__, "__wrapped__")


def test_vllm_still_forgets_the_scales_of_int8():
    """When this fails, the patch of CPUInt8ScaledMMLinearKernel can go, if tests/engine/test_quantized.py passes."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

    source = inspect.getsource(inspect.unwrap(CPUInt8ScaledMMLinearKernel.process_weights_for_onednn))
    assert "self" not in source.partition("self.dnnl_handler = ")[2].replace("self.config", "")


@pytest.mark.parametrize(
    ("outputs", "inputs", "model", "weights", "served"),
    [
        (64, 96, torch.bfloat16, torch.int8, True),
        (48, 96, torch.bfloat16, torch.int8, False),
        (64, 48, torch.bfloat16, torch.int8, False),
        (64, 96, torch.float16, torch.int8, False),
        (64, 96, torch.float32, torch.int8, False),
        (48, 96, torch.bfloat16, torch.bfloat16, True),
    ],
)
def test_amx_gets_what_it_multiplies(outputs, inputs, model, weights, served, monkeypatch):
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    patches.apply_all()
    amx = emulate_amx(monkeypatch)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: model)
    assert cpu.check_cpu_sgl_kernel(outputs, inputs, weights) == served
    if served:
        amx.convert_weight_packed(torch.zeros(outputs, inputs, dtype=weights))


def test_vllm_still_expands_integers_only():
    """When this fails, the patch of expand_batch_to_tokens can go, if tests/engine/test_speculation.py passes."""
    from vllm.utils import cpu_triton_utils

    assert "        _ensure_int64(output),\n" in inspect.getsource(cpu_triton_utils._expand_kernel_impl)


@pytest.mark.parametrize("values", [[0.5, 0.0, 2.0], [3, 0, 7]])
def test_values_of_requests_are_expanded_to_their_drafts(values):
    from vllm.v1.sample import rejection_sampler

    patches.apply_all()
    x = torch.tensor(values)
    expanded = rejection_sampler.expand_batch_to_tokens(x, torch.tensor([2, 2, 5], dtype=torch.int32), 5)
    assert torch.equal(expanded, x[[0, 0, 2, 2, 2]])
    replaced = rejection_sampler.expand_batch_to_tokens(x, torch.tensor([1, 3, 4]), 4, replace_from=0, replace_to=1)
    assert torch.equal(replaced, torch.tensor([values[0], 1, 1, values[2]], dtype=x.dtype))


def test_vllm_still_takes_the_maximum_of_nothing():
    """When this fails, the patch of apply_sampling_constraints can go."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_only

    with pytest.raises(RuntimeError, match="max"):
        apply_top_k_only(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int32))


def test_vllm_still_sets_an_offset_that_cpus_lack():
    """When this fails, the patch of sample_tokens can go, if tests/engine/test_seeds.py passes without it."""
    from vllm.v1.worker import cpu_model_runner, gpu_model_runner

    runner = gpu_model_runner.GPUModelRunner
    source = inspect.getsource(runner._bookkeeping_sync)
    assert "gen.set_offset(gen.get_offset() - 4)" in source
    # Where vLLM looks for what it discards, and for its generators, is where the patch does.
    assert "self.discard_request_mask.np[" in source
    assert "self.input_batch.generators.get(" in source
    assert cpu_model_runner.CPUModelRunner._bookkeeping_sync is runner._bookkeeping_sync
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator().get_offset()
    patches.apply_all()
    patches.apply_all()  # as every engine of a process does
    assert cpu_model_runner.CPUModelRunner.sample_tokens.__wrapped__ is runner.sample_tokens


@pytest.mark.parametrize("failure", [None, "a step that fails"])
def test_seeds_of_discarded_rows_come_back(failure, monkeypatch):
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    seen = []

    def sample(self, grammar_output):
        seen.append({*self.input_batch.generators})
        if failure:
            raise RuntimeError(failure)
        return grammar_output

    patches.apply_all()
    monkeypatch.delattr(CPUModelRunner, "sample_tokens")  # our own, which is put back after the test
    monkeypatch.setattr(GPUModelRunner, "sample_tokens", sample)
    patches.apply_all()
    seeds = {row: torch.Generator() for row in (0, 1, 3)}
    mask = SimpleNamespace(np=[False, True, True, False])
    runner = SimpleNamespace(input_batch=SimpleNamespace(generators={**seeds}), discard_request_mask=mask)
    with pytest.raises(RuntimeError, match=failure) if failure else nullcontext():
        assert CPUModelRunner.sample_tokens(runner, "grammar") == "grammar"
    assert seen == [{0, 3}]
    assert runner.input_batch.generators == seeds
