"""The spec against itself in float64, and against the model that transformers ships."""

from __future__ import annotations

import pytest
import torch
from kda_case import Case, relative_error
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as hf
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig

from kimi_vllm.kernels import reference
from kimi_vllm.kernels.contract import Activations, Weights

LENGTHS = (1, 3, 15, 16, 17, 63, 64, 65, 129, 200)


def inputs(T: int, H: int = 2, D: int = 64, *, extreme: str = "", seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v, g, beta in float64 and a state, as `features` would make them."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, gate = torch.randn(4, T, H, D, dtype=torch.float64, generator=generator)
    beta = torch.rand(T, H, dtype=torch.float64, generator=generator)
    A_log = torch.rand(H, dtype=torch.float64, generator=generator) * 2.7
    if extreme == "fast":
        A_log, gate = torch.full_like(A_log, 16.0).log(), gate + 6
    if extreme == "slow":
        gate = gate - 20
    if extreme == "correlated":
        common = torch.randn(1, H, D, dtype=torch.float64, generator=generator)
        k, beta = 0.9 * common + (1 - 0.9**2) ** 0.5 * k, torch.full_like(beta, 0.95)
    g = reference.log_decay(gate, A_log, torch.full((H, D), -3.0, dtype=torch.float64))
    state = 0.3 * torch.randn(H, D, D, dtype=torch.float64, generator=generator)
    return [reference.l2_normalise(q) * D**-0.5, reference.l2_normalise(k), v, g, beta], state


@pytest.mark.parametrize("T", LENGTHS, ids="T{}".format)
def test_chunk_form_equals_recurrence_in_float64(T: int) -> None:
    x, state = inputs(T)
    for ours, gold in zip(reference.kda_chunk(*x, state), reference.kda_recurrent(*x, state), strict=True):
        assert relative_error(ours, gold) <= 1e-10


@pytest.mark.parametrize("extreme", ["fast", "slow", "correlated"])
def test_chunk_form_survives_extremes(extreme: str) -> None:
    x, state = inputs(200, extreme=extreme)
    gold = reference.kda_recurrent(*x, state)
    for ours, expected in zip(reference.kda_chunk(*x, state), gold, strict=True):
        assert relative_error(ours, expected) <= 1e-10
    in_float32 = reference.kda_chunk(*(tensor.float() for tensor in x), state.float())
    for ours, expected in zip(in_float32, gold, strict=True):
        assert relative_error(ours, expected) <= 1e-5


@pytest.mark.parametrize("extreme", ["", "fast", "slow", "correlated"])
def test_recurrence_in_float32_keeps_six_digits(extreme: str) -> None:
    x, state = inputs(65, H=3, D=128, extreme=extreme)
    gold = reference.kda_recurrent(*x, state)
    ours = reference.kda_recurrent(*(tensor.float() for tensor in x), state.float())
    for result, expected in zip(ours, gold, strict=True):
        assert relative_error(result, expected) <= 1e-6


def test_recurrence_is_the_matrix_form_of_equation_1() -> None:
    x, state = inputs(5, H=1, D=64)
    q, k, v, g, beta = (tensor[:, 0] for tensor in x)
    S = state[0].T  # the paper writes [K, V]
    outputs = []
    for t in range(5):
        transition = torch.eye(64, dtype=torch.float64) - beta[t] * torch.outer(k[t], k[t])
        S = transition @ torch.diag(g[t].exp()) @ S + beta[t] * torch.outer(k[t], v[t])
        outputs.append(S.T @ q[t])
    ours, final = reference.kda_recurrent(*x, state)
    assert relative_error(ours[:, 0], torch.stack(outputs)) <= 1e-13
    assert relative_error(final[0], S.T) <= 1e-13


def test_log_decay_keeps_small_and_large_gates() -> None:
    gate = torch.tensor([-30.0, -15.0, 0.0, 25.0, 200.0], dtype=torch.float64).view(5, 1, 1)
    ours = reference.log_decay(gate.float(), torch.zeros(1), torch.zeros(1, 1)).double()
    gold = -torch.log1p(torch.exp(-gate.abs())) - gate.clamp_min(0)
    assert ((ours - gold) / gold).abs().max() <= 2e-7


@pytest.mark.parametrize("T", [1, 3, 65, 129], ids="T{}".format)
def test_recurrence_and_chunk_form_equal_transformers(T: int) -> None:
    x, state = inputs(T)
    q, k, v, g, beta = (tensor.float()[None] for tensor in x)
    # transformers scales q itself and keeps the state as [K, V].
    arguments = (q * q.shape[-1] ** 0.5, k, v, g, beta)
    initial = state.float().transpose(1, 2)[None]
    ours = reference.kda_recurrent(*(tensor.float() for tensor in x), state.float())
    theirs = hf.recurrent_kimi_delta_attention(*arguments, initial, True)
    chunked = hf.chunk_kimi_delta_attention(*arguments, initial_state=initial, output_final_state=True)
    for result in (theirs, chunked):
        assert relative_error(result[0][0], ours[0]) <= 1e-5
        assert relative_error(result[1][0].transpose(1, 2), ours[1]) <= 1e-5


def test_prefill_equals_the_attention_module_of_transformers() -> None:
    torch.manual_seed(0)
    H, D, T = 2, 64, 70
    linear = {
        "num_heads": H,
        "head_dim": D,
        "short_conv_kernel_size": 4,
        "kda_layers": [1],
        "full_attn_layers": [2],
    }
    config = KimiLinearConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, linear_attn_config=linear
    )
    module = hf.KimiLinearDeltaAttention(config, 0).float().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, T, 96)
    case = Case(T, H, D, S=2)
    gate = module.forget_gate
    with torch.no_grad():
        expected = module(x)
        case.x = Activations(
            qkv=torch.cat([module.q_proj(x), module.k_proj(x), module.v_proj(x)], -1)[0],
            gate=gate.f_b_proj(gate.f_a_proj(x))[0],
            beta=module.b_proj(x)[0],
            out_gate=module.g_b_proj(module.g_a_proj(x))[0],
        )
        case.weights = Weights(
            conv_weight=module.conv1d.weight.squeeze(1).T.contiguous(),
            A_log=gate.A_log.flatten().float(),
            dt_bias=gate.dt_bias.flatten().float(),
            norm_weight=module.o_norm.weight,
            norm_eps=config.rms_norm_eps,
        )
        for spec in (True, False):
            out = case.copy().prefill([T], [0], [[1]], spec=spec)
            assert relative_error(module.o_proj(out)[None], expected) <= 1e-5


def test_shapes_of_the_spec_are_enforced_here() -> None:
    x, state = inputs(3)
    with pytest.raises(Exception, match="Type-check"):
        reference.kda_recurrent(*x, state[:, :, :32])


def test_spec_carries_history_and_state_between_steps() -> None:
    case = Case(9, S=3).copy(torch.float64)
    whole, pieces = case.copy(), case.copy()
    expected = whole.prefill([9], [0], [[1]], spec=True)
    first = pieces.rows(0, 5).prefill([5], [0], [[2]], spec=True)
    rest = [pieces.rows(t, t + 1).decode([2], [2], [t], spec=True) for t in range(5, 9)]
    assert relative_error(torch.cat([first, *rest]), expected) <= 1e-12
    assert relative_error(pieces.state[2], whole.state[1]) <= 1e-12
