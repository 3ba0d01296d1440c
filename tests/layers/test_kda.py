"""The operator of a KDA layer: what torch.compile and CUDA graphs see, and what a layer checks before it serves."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.forward_context import get_forward_context, override_forward_context

from kimi_vllm.cache.metadata import KDAMetadata, rehearsal
from kimi_vllm.kernels.bench.layer import scattered
from kimi_vllm.kernels.contract import DecodeRows, PrefillRows, Weights
from kimi_vllm.kernels.dispatch import load_backend
from kimi_vllm.layers import kda

H, D, T, SLOTS = 2, 64, 5, 8
NAME = "model.layers.0.self_attn"


def small_layer() -> kda.KimiDeltaAttention:
    """A layer with what its operator needs, without the projections around it."""
    torch.manual_seed(0)
    layer = kda.KimiDeltaAttention.__new__(kda.KimiDeltaAttention)
    nn.Module.__init__(layer)
    layer.conv_weight, layer.dt_bias = (
        nn.Parameter(torch.randn(*shape), requires_grad=False) for shape in ((4, 3 * H * D), (H * D,))
    )
    layer.A_log, layer.o_norm = nn.Parameter(torch.zeros(H), requires_grad=False), nn.Module()
    layer.o_norm.weight, layer.norm_eps = nn.Parameter(torch.ones(D), requires_grad=False), 1e-5
    layer.weights = Weights(layer.conv_weight, layer.A_log, layer.dt_bias, layer.o_norm.weight, layer.norm_eps)
    pools = scattered(torch.zeros(SLOTS, 8, 3 * H * D), torch.zeros(SLOTS, H, D, D))
    pools = replace(pools, nonfinite=torch.zeros(SLOTS, 1, dtype=torch.int32))
    layer.home, layer.layer = SimpleNamespace(pool=SimpleNamespace(layers=[pools])), 0
    layer.backend = load_backend("cpu")
    layer.metadata_name, layer.block_size, layer.max_num_seqs = "rows", 64, 4
    return layer


def activations() -> list[torch.Tensor]:
    """qkv, gate, beta, out_gate and out."""
    torch.manual_seed(1)
    return [*(torch.randn(T, width) for width in (3 * H * D, H * D, H, H * D)), torch.zeros(T, H * D)]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


STEPS = {
    "decode": KDAMetadata(T, T, DecodeRows(int32(0, 0, 0, 0, 0), int32(1, 2, 3, 4, 5), torch.zeros(T).long()), None),
    "prefill": KDAMetadata(0, T, None, PrefillRows(int32(0, T), int32(0), int32(1)[:, None], 64)),
    "both": KDAMetadata(
        2,
        4,
        DecodeRows(int32(0, 0), int32(1, 2), torch.zeros(2).long()),
        PrefillRows(int32(0, 2), int32(0), int32(3)[:, None], 64),
    ),
    "profiling": None,
}


@pytest.fixture(params=STEPS)
def layer(request: pytest.FixtureRequest):
    """A layer in the forward pass of such a step."""
    layer, step = small_layer(), STEPS[request.param]
    metadata = None if step is None else {"rows": step}
    with override_forward_context(SimpleNamespace(no_compile_layers={NAME: layer}, attn_metadata=metadata)):
        yield layer


def test_opcheck(layer) -> None:
    torch.library.opcheck(torch.ops.vllm.kimi_delta_attention.default, (*activations(), NAME))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_sees_one_graph(layer, backend: str) -> None:
    def mixer(*arguments: torch.Tensor) -> torch.Tensor:
        torch.ops.vllm.kimi_delta_attention(*arguments, NAME)
        return arguments[-1] * 2

    arguments = activations()
    arguments[0][0] = float("nan")
    expected = mixer(*(each.clone() for each in arguments))
    pools, flags = layer.pools.dense(), layer.pools.nonfinite.clone()
    layer.pools.nonfinite.zero_()
    with torch._dynamo.config.patch(disable=False):
        result = torch.compile(mixer, backend=backend, fullgraph=True)(*arguments)
    for ours, gold in zip((result, *layer.pools.dense()), (expected, *pools), strict=True):
        torch.testing.assert_close(ours, gold, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(layer.pools.nonfinite, flags)
    assert flags.flatten().nonzero().flatten().tolist() == ([] if get_forward_context().attn_metadata is None else [1])


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_tracing_needs_neither_a_step_nor_a_device(device: str) -> None:
    with FakeTensorMode():
        fake = [torch.empty(tensor.shape, device=device) for tensor in activations()]
        assert torch.ops.vllm.kimi_delta_attention(*fake, NAME) is None


def test_the_tail_of_a_padded_step_becomes_zeros() -> None:
    layer, (*x, out) = small_layer(), activations()
    out.fill_(float("nan"))
    layer.advance(kda.Activations(*x), out, STEPS["both"])
    assert out[:4].isfinite().all()
    assert not out[4:].any()


@pytest.mark.parametrize("tokens", [1, 2, T], ids=["decode", "both", "prefills"])
def test_the_profiling_run_refuses_what_the_kernels_do_not_take(tokens: int) -> None:
    layer, (*x, out) = small_layer(), [each[:tokens] for each in activations()]
    out.fill_(1)
    layer.rehearse(kda.Activations(*x), out)
    assert not out.any()
    with pytest.raises(ValueError, match=r"out is torch\.float64; it must be torch\.float32"):
        layer.rehearse(kda.Activations(*x), out.double())
    layer.home.pool.layers[0] = replace(layer.pools, cut=replace(layer.pools.cut, state_dtype=torch.float16))
    with pytest.raises(ValueError, match="set state_dtype"):
        layer.rehearse(kda.Activations(*x), out)


def test_parameters_that_a_loader_registered_anew_are_those_of_the_kernels() -> None:
    """Weight cache (``--load-format ipc_cache``) and tensorizer replace all parameters of a model made on meta."""
    layer, (*x, out) = small_layer(), activations()
    loaded = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    for name, parameter in list(layer.named_parameters()):
        module = layer.get_submodule(name.rpartition(".")[0])
        module.register_parameter(name.rpartition(".")[2], nn.Parameter(parameter.to("meta"), requires_grad=False))
    layer.weights = layer._kernel_weights()  # as when it is made
    for name, tensor in loaded.items():
        module, leaf = layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        del module._parameters[leaf]
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    layer.rehearse(kda.Activations(*x), out)
    found = (layer.weights.conv_weight, layer.weights.A_log, layer.weights.dt_bias, layer.weights.norm_weight)
    expected = (layer.conv_weight, layer.A_log, layer.dt_bias, layer.o_norm.weight)
    assert all(ours is theirs for ours, theirs in zip(found, expected, strict=True))


def test_a_rehearsal_touches_no_slot() -> None:
    layer, (*x, out) = small_layer(), activations()
    layer.advance(kda.Activations(*x), out, rehearsal(T, 2, 64, out.device))
    assert not any(pool.any() for pool in layer.pools.dense())
