"""Sizing is arithmetic: held against numbers that were published or computed by hand, and against its own promises."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimi_vllm.cache.layout import SlotLayout
from kimi_vllm.cli.plan_data import InTree, Plan
from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.planning import Costs, Demand, PlanError, allowance, cache_bytes, memory_needed, size
from kimi_vllm.weight_bytes import num_parameters

CONFIG = Path(__file__).parents[1] / "configs" / "models" / "48b-a3b" / "config.json"
GEOMETRY = KimiGeometry.from_config(json.loads(CONFIG.read_text()))
MIB, GIB = 2**20, 2**30

DEMAND = Demand(
    max_num_seqs=256, max_model_len=2**20, block_size=64, prefix_caching=True, checkpoint_share=0.1, fill=True
)


def plan(**changes):
    values = {
        "model": "48B",
        "geometry": GEOMETRY,
        "itemsize": 2,
        "gpu_dtype": torch.bfloat16,
        "quantization": None,
        "cache_itemsize": 2,
        "ranks": 1,
        "state_dtype": torch.float32,
        "memory": 141 * 10**9,
        "utilization": 0.92,
        "demand": DEMAND,
        "contexts": (4096,),
    }
    return Plan(**(values | changes))


def test_weights_of_the_48b_model():
    """The hub's index counts 49,122,681,728 parameters; 15.4 million of router and 6.5 of KDA are held in float32."""
    assert num_parameters(GEOMETRY) == 49_122_681_728
    router = 26 * 256 * (2304 + 1)
    small = 20 * (3 * 4096 * 4 + 32 + 4096 + 128)
    assert Costs.of(GEOMETRY, 2, 64).weights == 2 * 49_122_681_728 + 2 * (router + small)
    on_gpu = Costs.of(GEOMETRY, 2, 64, gpu_dtype=torch.bfloat16)
    # There a bfloat16 product has a float32 result: of the router only the bias that corrects the choice is float32.
    # And vLLM's MLA keeps its up-projections twice.
    absorbed = 7 * 32 * (128 + 128) * 512 * 2
    assert on_gpu.weights == 2 * 49_122_681_728 + 2 * (26 * 256 + small) + absorbed
    in_float16 = Costs.of(GEOMETRY, 2, 64, gpu_dtype=torch.float16).weights
    assert in_float16 == Costs.of(GEOMETRY, 2, 64).weights + absorbed


def test_two_ranks_split_all_but_router_latents_low_ranks_and_norms():
    whole = (
        26 * 256 * 2305 * 4  # router
        + 20 * (2 * 128 * 2304 * 2 + 128 * 4)  # f_a, g_a, output norm
        + 7 * (576 * 2304 + 512) * 2  # latent projection and its norm
        + (2 * 27 + 1) * 2304 * 2  # layer norms
    )
    one, two = (Costs.of(GEOMETRY, 2, 64, ranks=ranks) for ranks in (1, 2))
    assert 2 * two.weights - one.weights == whole
    assert 2 * two.slot == one.slot
    assert two.page == one.page, "the latent is on all ranks"
    experts = 26 * 256 * 3 * 1024 * 2304 * 2
    assert two.weights - Costs.of(GEOMETRY, 2, 64, ranks=2, expert_ranks=8).weights == experts // 2 - experts // 8


def test_cache_of_the_48b_model():
    costs = Costs.of(GEOMETRY, 2, 64)
    assert costs.page == 64 * 8064
    # Ours: 20 layers of 32 heads, 128 x 128 float32, and a ring of 4 columns of 12,288 channels in float32.
    assert costs.slot == 20 * (2 * MIB + 4 * 12_288 * 4) == 45_875_200
    # On a GPU the ring is in the model's dtype.
    on_gpu = Costs.of(GEOMETRY, 2, 64, gpu_dtype=torch.bfloat16)
    assert on_gpu.slot == 20 * (2 * MIB + 4 * 12_288 * 2) == 43_909_120
    half = Costs.of(GEOMETRY, 2, 64, gpu_dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    assert half.slot == 20 * (1 * MIB + 4 * 12_288 * 2) == 22_937_600
    with pytest.raises(PlanError, match=r"kimi.state_dtype: on CPUs states are float32, not torch.float16"):
        Costs.of(GEOMETRY, 2, 64, state_dtype=torch.float16)


@pytest.mark.parametrize(("dtype", "mebibytes"), [(torch.float32, 41.41), (torch.bfloat16, 21.41)])
def test_published_state_has_a_conv_of_three_columns_in_bfloat16(dtype, mebibytes):
    """The usual figure counts W - 1 columns; our ring has W, 0.47 MiB more on a GPU."""
    published = SlotLayout(20, 32, 128, ring=3, state_dtype=dtype, conv_dtype=torch.bfloat16).slot_bytes
    assert round(published / MIB, 2) == mebibytes
    ours = Costs.of(GEOMETRY, 2, 64, state_dtype=dtype, gpu_dtype=torch.bfloat16)
    assert ours.slot - published == 20 * 12_288 * 2


PUBLISHED = [
    ("4K", 0.119, 0.071, 40.0),
    ("16K", 0.475, 0.163, 65.6),
    ("32K", 0.949, 0.287, 69.8),
    ("128K", 3.797, 1.025, 73.0),
    ("512K", 15.19, 3.978, 73.8),
    ("1M", 30.38, 7.915, 73.9),
]


@pytest.mark.parametrize(("context", "all_mla", "hybrid", "saved"), PUBLISHED)
def test_memory_of_one_request_against_all_mla(context, all_mla, hybrid, saved):
    tokens = {"K": 2**10, "M": 2**20}[context[-1]] * int(context[:-1])
    made = plan()
    row = made.row(tokens)["bytes"]
    published = row["ours"] - made.costs.slot + 43_417_600  # with the published state
    digits = 3 if all_mla < 10 else 2
    assert round(row["all_mla"] / GIB, digits) == pytest.approx(all_mla, abs=0.0006)
    assert round(published / GIB, 3) == hybrid
    assert 100 * (1 - published / row["all_mla"]) == pytest.approx(saved, abs=0.06)
    assert row["ours"] - published == 491_520


def test_break_even():
    made = plan()
    assert made.break_even == 43_909_120 // 23_040 == 1905
    published = replace(made.costs, slot=43_417_600)
    made.__dict__["costs"] = published
    assert made.break_even == 1884


@pytest.mark.parametrize(("ranks", "block_size"), [(1, 1920), (2, 1024), (4, 512), (8, 256)])
def test_in_tree_block_size(ranks, block_size):
    assert InTree.of(GEOMETRY, 2, 2, ranks, prefix_caching=True).block_size == block_size


@pytest.mark.parametrize(("caching", "mebibytes"), [(False, 59.1), (True, 103.4)])
def test_least_that_a_request_holds_in_tree(caching, mebibytes):
    """One block of the MLA group, and one or two of each of three KDA groups: 20 layers in groups of 7."""
    in_tree = InTree.of(GEOMETRY, 2, 2, 1, prefix_caching=caching)
    assert (in_tree.mla_groups, in_tree.kda_groups) == (1, 3)
    assert round(in_tree.request_bytes(1) / MIB, 1) == mebibytes


def test_an_h200_by_hand():
    """141 GB: each live slot comes with 8,192 tokens; the checkpoints get a tenth; the rest is KV cache."""
    sizing = plan().sizing
    available = 129_720_000_000 - 9 * GIB // 2 - 98_306_233_344
    assert plan().available == available
    assert sizing.live == (available - available // 10 - 43_909_120 - 516_096) // (43_909_120 + 8192 * 8064)
    assert sizing.checkpoints == available // 10 // 43_909_120
    assert sizing.num_pages == (available - sizing.state_bytes) // 516_096
    assert sizing.longest(sizing.live) >= 8192
    assert sizing.concurrency(2**20) == 1


def test_longer_typical_requests_get_fewer_slots_and_more_pages():
    """Divided for requests of 8,192 tokens, 54 of 32,768 run at once; divided for those, 77."""
    short, long = plan().sizing, plan(demand=replace(DEMAND, typical_tokens=32768)).sizing
    assert (short.live, short.concurrency(32768)) == (217, 54)
    assert (long.live, long.concurrency(32768)) == (77, 77)
    assert long.state_bytes + long.kv_bytes <= plan().available
    # Never more slots than sequences, however short requests are.
    assert plan(demand=replace(DEMAND, typical_tokens=64)).sizing.live == DEMAND.max_num_seqs


def test_a_small_cpu_model_gets_one_slot_per_sequence_and_as_many_for_checkpoints():
    costs = Costs(weights=10**6, slot=10**5, page=10**4)
    demand = replace(DEMAND, max_num_seqs=8, max_model_len=1000, fill=False)
    sizing = size(costs, demand, 10**10)
    assert (sizing.live, sizing.checkpoints, sizing.num_pages) == (8, 8, 1 + 8 * 16)
    assert size(costs, replace(demand, prefix_caching=False), 10**10).checkpoints == 0
    assert size(costs, replace(demand, checkpoint_share=0.0), 10**10).checkpoints == 0


def test_one_sequence_still_has_two_slots():
    sizing = size(Costs(1, 1000, 100), replace(DEMAND, max_num_seqs=1, max_model_len=64, prefix_caching=False), 10**6)
    assert (sizing.live, sizing.state_slots) == (1, 2)


def test_what_the_user_fixed_is_kept():
    costs = Costs(weights=0, slot=1000, page=100)
    fixed = replace(DEMAND, max_num_seqs=8, max_model_len=640, state_slots=5, num_pages=77)
    sizing = size(costs, fixed, 10**9)
    assert (sizing.live, sizing.checkpoints, sizing.num_pages) == (5, 0, 77)
    sizing = size(costs, replace(fixed, state_slots=20), 10**9)
    assert (sizing.live, sizing.checkpoints) == (8, 12)
    sizing = size(costs, replace(fixed, state_slots=None, prefix_caching=False), 77 * 100 + 1000 + 3 * 1000)
    assert (sizing.live, sizing.num_pages) == (3, 77)


@given(
    slot=st.integers(0, 10**5),
    page=st.integers(1, 10**4),
    available=st.integers(-(10**6), 10**8),
    max_num_seqs=st.integers(1, 300),
    max_model_len=st.integers(1, 20_000),
    prefix_caching=st.booleans(),
    share=st.floats(0, 0.99),
    fill=st.booleans(),
)
def test_whatever_is_chosen_fits_and_serves(
    slot, page, available, max_num_seqs, max_model_len, prefix_caching, share, fill
):
    demand = Demand(max_num_seqs, max_model_len, 64, prefix_caching, share, fill=fill)
    try:
        sizing = size(Costs(0, slot, page), demand, available)
    except PlanError:
        least = 3 * slot + (1 + demand.blocks(max_model_len)) * page
        assert available * (1 - share * prefix_caching) < least + slot + page
        return
    assert sizing.state_bytes + sizing.kv_bytes <= available
    assert 1 <= sizing.live <= max_num_seqs
    assert sizing.state_slots >= 2
    assert sizing.concurrency(max_model_len) >= 1
    assert sizing.checkpoints * slot <= max(share * available, slot) or not prefix_caching
    if sizing.live < max_num_seqs and fill:
        assert sizing.longest(sizing.live) >= min(max_model_len, 8192) // 64 * 64


def test_out_of_memory_begins_where_it_says():
    for changes in ({}, {"demand": replace(DEMAND, max_model_len=8192, prefix_caching=False)}):
        made = plan(**changes)
        least = memory_needed(made.costs, made.demand, made.utilization)
        bare = replace(made.demand, checkpoint_share=0.0)
        assert plan(memory=round(least * 1.001), demand=bare).sizing.live >= 1
        with pytest.raises(PlanError, match=r"--max-model-len \d+: one request and its state slots need"):
            plan(memory=round(least * 0.999), demand=bare).sizing  # noqa: B018


def test_allowance_is_smaller_on_small_devices():
    assert allowance(141 * 10**9) == 9 * GIB // 2
    assert allowance(9 * GIB) == GIB // 2
    assert cache_bytes(18 * GIB, 0.5, Costs(GIB, 1, 1)) == 9 * GIB - GIB - GIB


def test_a_stage_without_mla_is_refused():
    with pytest.raises(PlanError, match="a pipeline stage with KDA layers needs at least one MLA layer"):
        Costs.of(replace(GEOMETRY, kda=(True,) * 3, sparse=(True,) * 3), 2, 64)


def test_the_heaviest_stage_decides():
    assert Costs.heaviest([Costs(1, 20, 3), Costs(2, 10, 3)]) == Costs(2, 20, 3)
