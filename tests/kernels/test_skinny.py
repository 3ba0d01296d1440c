"""Products of a few rows equal torch's."""

from __future__ import annotations

import pytest
import torch
from triton_case import DEVICE

from kimi_vllm.kernels.cuda import launch
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


def test_the_table_names_no_other_numbers_of_rows():
    assert {rule["tokens"] for rule in launch._table()["skinny"]} == set(launch.SKINNY_ROWS)
