"""New weights in a running engine, as reinforcement learning sends them: from a folder, and tensor by tensor."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import write_checkpoint
from support.engine import RECALL, STATE_BLOCKS, engine, random_prompts
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from kimi_vllm.layers.kda import KimiDeltaAttention
from kimi_vllm.weights import check_whole

pytestmark = pytest.mark.engine

PROMPTS = random_prompts([5, 40, 100, 300], 100, seed=3)


@dataclass
class Bucket:
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)


class InProcess(WeightTransferEngine):
    """vLLM's own need GPUs; this one does what they do with tensors that are here already."""

    init_info_cls = update_info_cls = Bucket

    def init_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info):
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info):
        self.model.load_weights(update_info.tensors)

    def finish_weight_update(self):
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self):
        pass


WeightTransferEngineFactory.register_engine("in-process", InProcess)


@pytest.fixture(scope="module")
def weights():
    return load_file(RECALL / "model.safetensors")


@pytest.fixture(scope="module")
def others(weights):
    generator = torch.Generator().manual_seed(1)
    return {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def other_checkpoint(others, tmp_path_factory):
    config = json.loads((RECALL / "config.json").read_text())
    return write_checkpoint(tmp_path_factory.mktemp("other") / "model", config, others)


@pytest.fixture(scope="module")
def other_answers(other_checkpoint):
    with engine(other_checkpoint) as fresh:
        return answers(fresh)


@pytest.fixture(scope="module")
def running(other_answers):  # engines in one process go together
    memory = {"num_gpu_blocks_override": 9 * STATE_BLOCKS + 20, "additional_config": {"kimi": {"host_memory_gib": 0.1}}}
    options = {"enable_prefix_caching": True} | memory
    with engine(RECALL, weight_transfer_config={"backend": "in-process"}, **options) as running:
        yield running


def answers(running, **sampling):
    return [(each.tokens, each.logprobs) for each in running.complete(PROMPTS, **sampling)]


def check_same(found, expected):
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(found, expected, strict=True):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)


def send(running, tensors):
    """One bucket for each tensor."""
    for name, tensor in tensors.items():
        running.llm.collective_rpc("update_weights", args=({"tensors": [(name, tensor)]},))


def update(running, tensors):
    running.llm.collective_rpc("start_weight_update")
    send(running, tensors)
    running.llm.collective_rpc("finish_weight_update")
    assert running.llm.reset_prefix_cache()


def test_weights_reloaded_from_the_same_folder_and_from_another(running, other_checkpoint, other_answers):
    before = answers(running)
    addresses = {name: parameter.data_ptr() for name, parameter in running.model.named_parameters()}
    for folder, expected in ((RECALL, before), (other_checkpoint, other_answers), (RECALL, before)):
        running.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        assert running.llm.reset_prefix_cache()
        check_same(answers(running), expected)
    # Captured graphs know parameters by their address, and so do the records that KDA's kernels get.
    assert addresses == {name: parameter.data_ptr() for name, parameter in running.model.named_parameters()}
    for layer in running.model.modules():
        if isinstance(layer, KimiDeltaAttention):
            assert layer.weights.conv_weight is layer.conv_weight
            assert layer.weights.A_log is layer.A_log
            assert layer.weights.dt_bias is layer.dt_bias
            assert layer.weights.norm_weight is layer.o_norm.weight


def test_buckets_of_one_tensor_in_any_order(running, weights, others, other_answers):
    before = answers(running)
    update(running, dict(sorted(others.items(), key=lambda item: item[0][::-1])))
    check_same(answers(running), other_answers)
    update(running, weights)
    check_same(answers(running), before)


def test_a_bucket_that_leaves_half_a_layer_is_refused_until_the_rest_is_there(running, weights):
    before = answers(running)
    prefix = "model.layers.0.self_attn."
    running.llm.collective_rpc("start_weight_update")
    halves = [f"{prefix}A_log", f"{prefix}k_proj.weight", "model.layers.2.block_sparse_moe.experts.3.w2.weight"]
    for name in halves:
        send(running, {name: weights[name]})
    with pytest.raises(ValueError, match=rf"lacks tensors: {prefix}b_proj.weight.*Send them .*finish_weight_update"):
        running.llm.collective_rpc("finish_weight_update")
    rest = (f"{prefix}", "model.layers.2.block_sparse_moe.experts.")
    send(running, {name: tensor for name, tensor in weights.items() if name.startswith(rest) and name not in halves})
    running.llm.collective_rpc("finish_weight_update")
    assert running.llm.reset_prefix_cache()
    check_same(answers(running), before)


def test_states_of_old_weights_go_with_the_prefix_cache(running, weights):
    [prompt] = random_prompts([500], 100, seed=5)
    running.complete([prompt])
    for seed in range(12):  # more than there are slots: some go to host memory
        running.complete(random_prompts([200], 100, seed=100 + seed))
    host = running.manager.block_pool.host
    assert host.num_idle
    assert running.slots.num_idle
    update(running, weights)
    assert host.num_idle == running.slots.num_idle == 0
    assert running.complete([prompt])[0].cached == 0


def test_experts_of_other_ranks_need_not_come(running, weights, monkeypatch):
    """As with --enable-expert-parallel --enable-ep-weight-filter, which no CPU runs."""
    local = {0, 1, 2}
    ranks = torch.tensor([expert if expert in local else -1 for expert in range(8)])
    monkeypatch.setattr(RoutedExperts, "expert_map", ranks)
    kept = {name for name in weights if not should_skip_weight(name, local)}
    assert len(kept) < len(weights)
    check_whole(running.model, running.model.geometry, kept, all_modules=True)
    lost = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    with pytest.raises(ValueError, match=rf"lacks tensors: {lost}$"):
        check_whole(running.model, running.model.geometry, kept - {lost}, all_modules=True)
