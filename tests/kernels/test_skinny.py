"""Products of a few rows equal torch's."""

from __future__ import annotations

import pytest
import torch
from triton_case import DEVICE

from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.scales import Scales
from kimi_vllm.kernels.cuda.skinny import skinny_linear

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize(("N", "K"), [(40, 2304), (33, 128), (16, 1024), (1, 2048), (7, 96)])
@pytest.mark.parametrize("config", [(4, 512, 4), (2, 1024, 4), (8, 256, 2)], ids=str)
def test_equals_the_product(M, N, K, config):
    torch.manual_seed(0)
    wide = torch.randn(M, K + 32, device=DEVICE)
    x, weight = wide[:, :K], torch.randn(N, K, device=DEVICE) * K**-0.5
    wide[:, K:] = torch.nan
    out = torch.full((M, N + 3), torch.nan, device=DEVICE)
    skinny_linear(x, weight, out[:, :N], launch.Skinny(*config))
    torch.testing.assert_close(out[:, :N], (x.double() @ weight.double().T).float(), rtol=1e-5, atol=1e-5)
    assert out[:, N:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_float32_and_so_can_be_the_result(dtype):
    x = torch.ones(1, 1024, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.full((2, 1024), 1 + 2.0**-7, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(1, 2, dtype=dtype, device=DEVICE)
    skinny_linear(x, weight, out, launch.Skinny(2, 512, 2))
    assert out.tolist() == [[1032.0, 1032.0]]


def quantised(weight, kind):
    """`weight` ``[.., N, K]`` in FP8 with scales of one kind, and what the two mean, in float64."""
    N, K = weight.shape[-2:]
    block, rows, columns = {"tensor": (0, N, K), "channel": (0, 1, K), "block": (32, 32, 32)}[kind]
    padded = torch.nn.functional.pad(weight, (0, -K % columns, 0, -N % rows))
    tiles = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # [.., N / rows, rows, K / columns, columns]
    values = tiles.abs().amax(dim=(-3, -1)).float().clamp(min=1e-6) / 448
    spread = values.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :N, :K]
    stored = (weight / spread).to(torch.float8_e4m3fn)
    return stored, Scales(values, block), stored.double() * spread.double()


@pytest.mark.parametrize("M", [1, 4, 8])
@pytest.mark.parametrize(("N", "K"), [(40, 288), (33, 128), (7, 96), (64, 1000)])
@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
def test_fp8_weights_meet_unquantised_activations(M, N, K, kind):
    torch.manual_seed(0)
    x, weight = torch.randn(M, K, device=DEVICE), torch.randn(N, K, device=DEVICE)
    weight *= torch.logspace(-2, 2, N, device=DEVICE)[:, None]
    stored, scales, meant = quantised(weight, kind)
    gold = x.double() @ meant.T
    out = skinny_linear(x, stored, torch.empty(M, N, device=DEVICE), launch.Skinny(4, 256, 4), scales)
    rounding = 1e-6 * (x.double().abs() @ meant.abs().T)
    assert ((out.double() - gold).abs() <= rounding).all()


def test_every_fp8_number_is_read_as_what_it_is():
    """Subnormal ones and the largest, of either sign; e4m3 has no infinity and one NaN."""
    stored = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    finite = stored[~stored.float().isnan()]
    weight = finite[:, None].expand(-1, 16).contiguous()
    x = torch.zeros(1, 16, device=DEVICE)
    x[0, 3] = 1.0
    scales = Scales(torch.ones(1, 1, device=DEVICE))
    out = skinny_linear(x, weight, torch.empty(1, len(finite), device=DEVICE), launch.Skinny(2, 16, 1), scales)
    assert torch.equal(out[0], finite.float())


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 640, device=DEVICE), torch.randn(9, 640, device=DEVICE)
    results = []
    for other in (0.0, 1e30, torch.nan):
        x[1:] = other
        results.append(skinny_linear(x, weight, torch.empty(4, 9, device=DEVICE), launch.Skinny(4, 256, 2))[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_table_serves_what_was_measured_faster_than_cublas():
    o_proj, shared, in_proj, router = (2304, 4096), (2048, 2304), (12576, 2304), (256, 2304)
    assert all(launch.skinny(1, *shape) for shape in (o_proj, shared, router))
    assert all(launch.skinny(2, *shape) for shape in (o_proj, shared, router))
    assert launch.skinny(4, *router)
    assert not launch.skinny(2, 8192, 128)
    assert not any((launch.skinny(1, *in_proj), launch.skinny(4, *o_proj), launch.skinny(3, *router)))
    assert not any(launch.skinny(tokens, *router) for tokens in (0, 5, 8, 8192))


def test_the_table_has_rules_of_their_own_for_fp8():
    in_proj = (12672, 2304)
    assert launch.skinny(1, *in_proj, fp8=True)
    assert not launch.skinny(1, *in_proj)
    assert launch.skinny_experts(1, 2304, 1024, fp8=True)


def test_the_table_names_no_other_numbers_of_rows():
    assert {rule["tokens"] for rule in launch._table()["skinny"]} == set(launch.SKINNY_ROWS)
