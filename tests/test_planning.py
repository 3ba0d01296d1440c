"""Capacity is arithmetic: held against numbers published, computed by hand, or counted with vLLM's real scheduler."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimi_vllm.cache.capacity import Capacity
from kimi_vllm.cli.plan_data import InTree, Plan
from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.planning import (
    Costs,
    Demand,
    PlanError,
    afforded,
    allowance,
    cache_bytes,
    check_one_fits,
    least_block_size,
    memory_needed,
)
from kimi_vllm.weight_bytes import num_parameters

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "models" / "48b-a3b" / "config.json"
COUNTED = ROOT / "serve" / "bench" / "results" / "concurrency.jsonl"
GEOMETRY = KimiGeometry.from_config(json.loads(CONFIG.read_text()))
MIB, GIB = 2**20, 2**30

DEMAND = Demand(max_num_seqs=1024, max_model_len=2**20, block_size=64, prefix_caching=True)
BLOCK = 64 * 8064


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
        "lengths": {},
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
    assert 2 * two.state == one.state
    assert two.state_blocks == one.state_blocks // 2
    assert two.block == one.block, "the latent is on all ranks"
    experts = 26 * 256 * 3 * 1024 * 2304 * 2
    assert two.weights - Costs.of(GEOMETRY, 2, 64, ranks=2, expert_ranks=8).weights == experts // 2 - experts // 8


def test_cache_of_the_48b_model():
    costs = Costs.of(GEOMETRY, 2, 64)
    assert costs.block == BLOCK
    # Ours: 20 layers of 32 heads, 128 x 128 float32, and a ring of 4 columns of 12,288 channels in float32.
    assert costs.state == 20 * (2 * MIB + 4 * 12_288 * 4) == 45_875_200
    # On a GPU the ring is in the model's dtype. Half a head is a unit of 34,304 bytes, 15 to a block.
    on_gpu = Costs.of(GEOMETRY, 2, 64, gpu_dtype=torch.bfloat16)
    assert on_gpu.state == 20 * (2 * MIB + 4 * 12_288 * 2) == 43_909_120
    assert on_gpu.state_blocks == 86 == -(-1280 // 15)
    half = Costs.of(GEOMETRY, 2, 64, gpu_dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    assert half.state == 20 * (1 * MIB + 4 * 12_288 * 2) == 22_937_600
    assert half.state_blocks == 45
    with pytest.raises(PlanError, match=r"kimi.state_dtype: on CPUs states are float32, not torch.float16"):
        Costs.of(GEOMETRY, 2, 64, state_dtype=torch.float16)
    with pytest.raises(ValueError, match="--tensor-parallel-size 3: the model's 32 KDA heads do not divide by it"):
        Costs.of(GEOMETRY, 2, 64, ranks=3)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("cache_itemsize", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_blocks_of_a_state_are_hardly_more_than_its_bytes(block_size, cache_itemsize, ranks):
    shape = {"ranks": ranks, "cache_itemsize": cache_itemsize}
    costs = Costs.of(GEOMETRY, 2, block_size, gpu_dtype=torch.bfloat16, **shape)
    assert costs.block == block_size * 7 * 576 * cache_itemsize
    assert costs.state <= costs.state_blocks * costs.block < 1.01 * costs.state + costs.block


@pytest.mark.parametrize("model", ["48b-a3b", "recall", "synthetic/needle", "synthetic/mqar"])
def test_a_block_of_the_least_size_holds_a_part_of_a_head_and_no_smaller_one_does(model):
    config = ROOT / "configs" / "models" / model / "config.json"
    geometry = KimiGeometry.from_config(json.loads(config.read_text()))
    assert least_block_size(GEOMETRY, 64, 2, gpu_dtype=torch.bfloat16) == 64
    least = least_block_size(geometry, 1, 4)
    assert Costs.of(geometry, 4, least).state_blocks > 0
    with pytest.raises(ValueError, match="holds no part of a KDA head: use a larger --block-size"):
        Costs.of(geometry, 4, least // 2)


def test_a_model_without_kda_has_no_states():
    plain = replace(GEOMETRY, kda=(False,) * GEOMETRY.num_layers)
    costs = Costs.of(plain, 2, 64)
    assert (costs.state_blocks, costs.state) == (0, 0)
    assert Capacity(11, 64, 0).concurrency(128) == 5


@pytest.mark.parametrize(("dtype", "mebibytes"), [(torch.float32, 41.41), (torch.bfloat16, 21.41)])
def test_published_state_has_a_conv_of_three_columns_in_bfloat16(dtype, mebibytes):
    """The usual figure counts W - 1 columns; our ring has W, 0.47 MiB more on a GPU."""
    published = 20 * (32 * 128 * 128 * dtype.itemsize + 3 * 12_288 * 2)
    assert round(published / MIB, 2) == mebibytes
    ours = Costs.of(GEOMETRY, 2, 64, state_dtype=dtype, gpu_dtype=torch.bfloat16)
    assert ours.state - published == 20 * 12_288 * 2


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
    held = made.costs.state_blocks * BLOCK
    published = row["ours"] - held + 43_417_600  # with the published state
    digits = 3 if all_mla < 10 else 2
    assert round(row["all_mla"] / GIB, digits) == pytest.approx(all_mla, abs=0.0006)
    assert round(published / GIB, 3) == hybrid
    assert 100 * (1 - published / row["all_mla"]) == pytest.approx(saved, abs=0.06)
    assert row["ours"] - published == 491_520 + 86 * BLOCK - made.costs.state


def test_break_even():
    made = plan()
    assert made.break_even == 86 * BLOCK // 23_040 == 1926
    row = [plan(contexts=(tokens,)).row(tokens)["bytes"] for tokens in (1856, 1984)]
    assert row[0]["ours"] > row[0]["all_mla"]
    assert row[1]["ours"] < row[1]["all_mla"]


@pytest.mark.parametrize(("ranks", "block_size"), [(1, 1920), (2, 1024), (4, 512), (8, 256)])
def test_in_tree_block_size(ranks, block_size):
    assert InTree.of(GEOMETRY, 2, 2, ranks).block_size == block_size


def test_least_that_a_request_holds_in_tree():
    """One block of the MLA group, and one of each of three KDA groups: 20 layers in groups of 7."""
    in_tree = InTree.of(GEOMETRY, 2, 2, 1)
    assert (in_tree.mla_groups, in_tree.kda_groups) == (1, 3)
    assert round(in_tree.request_bytes(1) / MIB, 1) == 59.1


def test_in_tree_runs_as_many_as_vllms_scheduler_admits():
    in_tree = InTree.of(GEOMETRY, 2, 2, 1)
    rows = [row for row in map(json.loads, COUNTED.read_text().splitlines()) if row["provider"] == "in-tree"]
    assert len(rows) > 8
    for row in rows:
        fit = (row["cache_bytes"] - in_tree.page) // in_tree.request_bytes(row["prompt"])
        assert min(row["max_num_seqs"], fit) == row["running"]


def test_an_h200_by_hand():
    """141 GB: what is left beside the weights and 4.5 GiB are blocks, and a request of 4K holds 86 + 64 of them."""
    made = plan()
    left = 129_720_000_000 - 9 * GIB // 2 - 98_306_233_344
    assert made.available == left
    assert made.capacity == Capacity(left // BLOCK, 64, 86)
    assert made.capacity.tokens == (left // BLOCK - 1) * 64
    assert made.capacity.concurrency(4096) == made.row(4096)["concurrency"]["ours"] == (left // BLOCK - 1) // (86 + 64)
    assert made.state_fill == 43_909_120 / (86 * BLOCK)


def test_requests_at_once_are_what_blocks_hold():
    capacity = Capacity(blocks=101, block_size=64, state_blocks=3)
    assert [capacity.held(tokens) for tokens in (1, 64, 65, 640)] == [4, 4, 5, 13]
    assert [capacity.concurrency(tokens) for tokens in (64, 65, 640, 97 * 64, 97 * 64 + 1)] == [25, 20, 7, 1, 0]
    assert [capacity.longest(requests) for requests in (1, 2, 25, 34)] == [97 * 64, 47 * 64, 64, 0]
    assert Capacity(0, 64, 3).concurrency(64) == Capacity(0, 64, 3).longest(1) == Capacity(0, 64, 3).tokens == 0


def test_a_mixture_runs_as_many_as_the_mean_request_allows():
    capacity = Capacity(blocks=101, block_size=64, state_blocks=3)
    assert capacity.average({64: 1.0}) == 25
    assert capacity.average({64: 0.5, 1024: 0.5}) == 100 / (0.5 * 4 + 0.5 * 19)
    mixed = plan(lengths={64: 0.5, 2**20: 0.5})
    in_tree = mixed.in_tree
    mean = (in_tree.request_bytes(64) + in_tree.request_bytes(2**20)) / 2
    assert mixed.average == {
        "ours": mixed.capacity.average(mixed.lengths),
        "in_tree": (mixed.available - in_tree.page) / mean,
    }


def test_max_num_seqs_limits_what_runs():
    few = plan(demand=replace(DEMAND, max_num_seqs=3), lengths={64: 1.0})
    assert set(few.row(1024)["concurrency"].values()) == set(few.average.values()) == {3}


def test_on_a_cpu_there_are_no_more_blocks_than_sequences_fill():
    demand = Demand(max_num_seqs=8, max_model_len=1000, block_size=64, prefix_caching=False)
    assert (demand.least(5), demand.most(5)) == (1 + 16 + 5, 1 + 8 * (16 + 5))
    caching = replace(demand, prefix_caching=True)
    assert (caching.least(5), caching.most(5)) == (1 + 16 + 10, 1 + 8 * (16 + 10))
    on_cpu = plan(gpu_dtype=None, itemsize=4, cache_itemsize=4, memory=2**40, demand=caching)
    assert on_cpu.capacity.blocks == caching.most(on_cpu.costs.state_blocks)
    assert plan(memory=2**40, demand=caching).capacity.blocks > caching.most(86)


@given(
    block=st.integers(1, 10**4),
    state_blocks=st.integers(0, 200),
    left=st.integers(-(10**6), 10**8),
    max_model_len=st.integers(1, 20_000),
    prefix_caching=st.booleans(),
)
def test_whatever_is_not_refused_serves(block, state_blocks, left, max_model_len, prefix_caching):
    demand = Demand(300, max_model_len, 64, prefix_caching)
    capacity = afforded([Costs(0, block, state_blocks, 0)], [left], 64)
    assert capacity.blocks * block <= max(0, left)
    try:
        check_one_fits(capacity, demand, block, "raise --num-gpu-blocks-override")
    except PlanError:
        assert capacity.blocks < demand.least(state_blocks)
        return
    assert capacity.concurrency(max_model_len) >= 1
    assert capacity.longest(1) >= max_model_len
    running = capacity.concurrency(max_model_len)
    assert running * capacity.held(max_model_len) < capacity.blocks <= (running + 1) * capacity.held(max_model_len)
    assert capacity.longest(running) >= max_model_len


def test_what_does_not_fit_names_what_is_there_and_what_to_change():
    demand = Demand(8, 1024, 64, prefix_caching=True)
    capacity = Capacity(22, 64, 3)
    with pytest.raises(PlanError) as error:
        check_one_fits(capacity, demand, 2**30, "raise --num-gpu-blocks-override")
    assert str(error.value) == (
        "--max-model-len 1024: one request with its state needs 23 blocks (23.00 GiB), and there are 22 (22.00 GiB). "
        "Lower --max-model-len, or raise --num-gpu-blocks-override."
    )
    with pytest.raises(PlanError, match=r"there are 22 \(22.00 GiB\) beside weights of 2.00 GiB\."):
        check_one_fits(capacity, demand, 2**30, "raise --gpu-memory-utilization", 2 * 2**30)
    check_one_fits(replace(capacity, blocks=23), demand, 2**30, "")
    check_one_fits(capacity, replace(demand, prefix_caching=False), 2**30, "")


def test_out_of_memory_begins_where_it_says():
    for changes in ({}, {"demand": replace(DEMAND, max_model_len=8192, prefix_caching=False)}):
        made = plan(**changes)
        least = memory_needed(made.costs, made.demand, made.utilization)
        plan(memory=round(least * 1.001), **changes).check()
        with pytest.raises(PlanError, match=r"--max-model-len \d+: one request with its state needs"):
            plan(memory=round(least * 0.999), **changes).check()


def test_the_log_says_how_many_run():
    shown = Capacity(67_745, 64, 86).table(max_num_seqs=256, max_model_len=40_000)
    assert shown.splitlines() == [
        "kimi-vllm: states and KV cache share 67,745 blocks:",
        "  tokens   4,335,616 in blocks of 64",
        "  state    86 blocks per request",
        "  at once  256 of 1,024, 256 of 4,096, 113 of 32,768, 95 of 40,000 tokens (--max-num-seqs 256)",
    ]


def test_allowance_is_smaller_on_small_devices():
    assert allowance(141 * 10**9) == 9 * GIB // 2
    assert allowance(9 * GIB) == GIB // 2
    assert cache_bytes(18 * GIB, 0.5, GIB) == 9 * GIB - GIB - GIB


def test_a_stage_without_mla_is_refused():
    with pytest.raises(PlanError, match="a pipeline stage with KDA layers needs at least one MLA layer"):
        Costs.of(replace(GEOMETRY, kda=(True,) * 3, sparse=(True,) * 3), 2, 64)


def test_the_poorest_stage_decides_on_blocks_and_the_one_with_most_kda_on_states():
    stages = [Costs(100, 10, 7, 0), Costs(50, 20, 4, 0)]
    assert afforded(stages, [905, 1500], 64) == Capacity(75, 64, 7)
    assert afforded(stages, [305, 1500], 64) == Capacity(30, 64, 7)
    assert afforded(stages, [905, -1], 64).blocks == 0
