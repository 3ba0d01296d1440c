"""The experts of a few tokens equal torch's."""

from __future__ import annotations

import pytest
import torch
from test_skinny import quantised
from triton_case import DEVICE, ON_GPU

from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.scales import Scales
from kimi_vllm.kernels.cuda.skinny_experts import SharedExpert, choose_experts, skinny_experts

pytestmark = pytest.mark.triton

NARROW, WIDE = ((4, 32, 2), (4, 16, 2)), ((2, 128, 4), (8, 64, 1))


def expected(x, w13, w2, weights, ids):
    """In float64, pair by pair."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, (scales, experts) in enumerate(zip(weights.double(), ids.tolist(), strict=True)):
        for scale, expert in zip(scales, experts, strict=True):
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            out[token] += scale * (w2[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return out


def case(tokens, hidden, inner, top_k, experts=7, dtype=torch.float32):
    """Random inputs; experts that nobody chose are NaN."""
    torch.manual_seed(0)
    chosen = torch.randperm(experts)[: experts - 2]
    ids = torch.stack([chosen[torch.randperm(len(chosen))[:top_k]] for _ in range(tokens)]).to(torch.int32)
    w13, w2 = torch.full((experts, 2 * inner, hidden), torch.nan), torch.full((experts, hidden, inner), torch.nan)
    w13[chosen] = torch.randn(len(chosen), 2 * inner, hidden) * hidden**-0.5
    w2[chosen] = torch.randn(len(chosen), hidden, inner) * inner**-0.5
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    moved = [tensor.to(DEVICE, dtype) for tensor in (x, w13, w2)]
    return (*moved, weights.to(DEVICE), ids.to(DEVICE))


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "top_k", "config"),
    [
        (1, 96, 64, 4, NARROW),
        (3, 72, 40, 2, NARROW),
        (2, 130, 33, 1, NARROW),
        (2, 72, 40, 2, WIDE),
        (2, 130, 33, 1, WIDE),
        pytest.param(1, 96, 64, 4, WIDE, marks=ON_GPU),
    ],
)
def test_equals_torch(tokens, hidden, inner, top_k, config):
    inputs = case(tokens, hidden, inner, top_k)
    up, down = (launch.Skinny(*some) for some in config)
    out = skinny_experts(*inputs, launch.SkinnyExperts(up, down))
    torch.testing.assert_close(out.double(), expected(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
@pytest.mark.parametrize(("tokens", "hidden", "inner", "top_k"), [(1, 96, 64, 4), (3, 72, 96, 2), (2, 130, 32, 1)])
def test_fp8_experts_equal_what_their_scales_mean(tokens, hidden, inner, top_k, kind):
    x, w13, w2, weights, ids = case(tokens, hidden, inner, top_k)
    # Experts of different sizes, and gates of other sizes than ups, so that no scale can be taken for another.
    sizes = torch.logspace(-1, 1, 7, device=DEVICE)[:, None, None]
    w13, w2 = w13.nan_to_num() * sizes, w2.nan_to_num() / sizes
    w13[:, inner:] *= 4
    (up, up_scales, up_meant), (down, down_scales, down_meant) = quantised(w13, kind), quantised(w2, kind)
    config = launch.SkinnyExperts(launch.Skinny(4, 32, 2), launch.Skinny(4, 16, 2))
    out = skinny_experts(x, up, down, weights, ids, config, (up_scales, down_scales)).double()
    gold = expected(x, up_meant, down_meant, weights, ids)
    torch.testing.assert_close(out, gold, rtol=1e-5, atol=1e-5 * float(gold.abs().max()))


@pytest.mark.parametrize("kind", [None, "tensor", "channel", "block"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_shared_expert_is_one_more_of_weight_one(tokens, kind):
    x, w13, w2, weights, ids = case(tokens, 96, 64, 4)
    w13, w2 = w13.nan_to_num(1.0), w2.nan_to_num(1.0)
    stored = [quantised(each, kind) if kind else (each, None, each.double()) for each in (w13, w2)]
    (up, up_scales, up_meant), (down, down_scales, down_meant) = stored
    unlike = next(i for i in range(7) if i not in ids.flatten().tolist())
    shared, scales = SharedExpert(up[unlike], down[unlike]), None
    if kind:
        scales = up_scales, down_scales
        own = tuple(Scales(each.values[unlike], each.block) for each in scales)
        shared = SharedExpert(up[unlike], down[unlike], own)
    assert shared.like(up, down, scales)
    config = launch.SkinnyExperts(launch.Skinny(4, 32, 2), launch.Skinny(4, 16, 2))
    out = skinny_experts(x, up, down, weights, ids, config, scales, shared).double()
    all_ids = torch.cat([ids, torch.full_like(ids[:, :1], unlike)], 1)
    gold = expected(x, up_meant, down_meant, torch.cat([weights, torch.ones_like(weights[:, :1])], 1), all_ids)
    torch.testing.assert_close(out, gold, rtol=1e-5, atol=1e-5 * float(gold.abs().max()))


@pytest.mark.parametrize(
    "other",
    [
        SharedExpert(torch.zeros(128, 96), torch.zeros(96, 32)),
        SharedExpert(torch.zeros(128, 96).bfloat16(), torch.zeros(96, 64).bfloat16()),
        SharedExpert(torch.zeros(128, 96), torch.zeros(96, 64).bfloat16()),
        SharedExpert(torch.zeros(128, 96), torch.zeros(96, 64), (Scales(torch.ones(1, 1)), Scales(torch.ones(1, 1)))),
    ],
    ids=["size", "dtype", "dtype of one", "scales"],
)
def test_a_shared_expert_that_is_unlike_the_others_is_told_apart(other):
    assert not other.like(torch.zeros(7, 128, 96), torch.zeros(7, 96, 64), None)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_bfloat16_rounds_only_inner_channels_and_the_result(ids_dtype):
    x, w13, w2, weights, ids = case(2, 96, 64, 4, dtype=torch.bfloat16)
    table = launch.skinny_experts(1, 96, 64)
    out = skinny_experts(x, w13, w2, weights, ids.to(ids_dtype), table)
    gold = expected(x, w13, w2, weights, ids)
    assert out.dtype == torch.bfloat16
    assert float((out.double() - gold).norm() / gold.norm()) < (1e-2 if DEVICE == "cpu" else 5e-3)  # there cut off


def test_a_token_does_not_depend_on_its_neighbours():
    x, w13, w2, weights, ids = case(3, 96, 64, 4)
    results = []
    for other in (0.0, 1e30, torch.nan):
        x[1:] = other
        results.append(skinny_experts(x, w13, w2, weights, ids, launch.skinny_experts(1, 96, 64))[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (33, 5), (256, 8), (3, 3)])
@pytest.mark.parametrize("normalise", [True, False])
def test_chooses_by_biased_scores_and_weighs_by_plain_ones(experts, top_k, normalise):
    torch.manual_seed(0)
    logits, bias = torch.randn(4, experts, device=DEVICE), torch.randn(experts, device=DEVICE)
    weights, ids = choose_experts(logits, bias, top_k, normalise=normalise, scaling=2.5)
    scores = logits.double().sigmoid()
    assert torch.equal(ids.long(), (scores + bias.double()).topk(top_k).indices)
    gold = scores.gather(1, ids.long())
    gold = gold / gold.sum(1, keepdim=True) if normalise else gold
    torch.testing.assert_close(weights.double(), 2.5 * gold, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("others", [0.0, torch.nan, 1e30])
def test_padding_chooses_what_the_first_row_chooses(others):
    torch.manual_seed(0)
    logits, bias = torch.randn(6, 33, device=DEVICE), torch.randn(33, device=DEVICE)
    padding = torch.tensor([False, False, True, False, True, True], device=DEVICE)
    alone = choose_experts(logits, bias, 5, normalise=True, scaling=2.0)
    logits[padding] = others
    chosen = choose_experts(logits, bias, 5, normalise=True, scaling=2.0, padding=padding)
    for before, now in zip(alone, chosen, strict=True):
        assert torch.equal(now[~padding], before[~padding])
        assert torch.equal(now[padding], before[:1].expand(3, -1))


@pytest.mark.parametrize("logit", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_names_experts_that_exist_and_leaves_others_alone(logit):
    torch.manual_seed(0)
    logits, bias = torch.randn(3, 33, device=DEVICE), torch.randn(33, device=DEVICE)
    alone = choose_experts(logits, bias, 5, normalise=True, scaling=1.0)
    logits[1] = logit
    weights, ids = choose_experts(logits, bias, 5, normalise=True, scaling=1.0)
    assert ((ids >= 0) & (ids < 33)).all()
    for before, now in zip(alone, (weights, ids), strict=True):
        assert torch.equal(before[[0, 2]], now[[0, 2]])


def test_the_table_serves_what_was_measured_faster_than_vllm():
    assert launch.skinny_experts(1, 2304, 1024)
    assert not launch.skinny_experts(8192, 2304, 1024)
    assert not launch.skinny_experts(1, 8192, 2048)
