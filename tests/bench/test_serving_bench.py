"""serve/bench/engine: its arithmetic, its tables, and one run of it with a real engine."""

import json
from pathlib import Path

import pytest

from serve.bench.engine.floor import floor_ms, step_bytes
from serve.bench.engine.plan import IN_TREE, OURS, Plan
from serve.bench.engine.profile_steps import Kernel, categorise, summarise
from serve.bench.engine.rows import Rows, latest, read
from serve.bench.engine.step_clock import StepClock, percentile, summary_ms
from serve.bench.engine.tables import tables

ROOT = Path(__file__).parents[2]

LARGE = Plan.for_model(ROOT / "configs" / "models" / "48b-a3b")


@pytest.mark.parametrize(("context", "published"), [(4096, 1.47), (131072, 1.71), (1048576, 3.43)])
def test_floor_of_the_48b_model_on_an_h200(context, published):
    assert floor_ms(step_bytes(LARGE.geometry(), 1, context), 4.8) == pytest.approx(published, rel=0.02)


def test_floor_of_a_batch_reads_more_experts_but_none_twice():
    geometry = LARGE.geometry()
    one, many, endless = (step_bytes(geometry, batch, 4096) for batch in (1, 64, 10_000))
    assert many.kv == 64 * one.kv == 64 * 4096 * 8064
    assert many.state == 64 * one.state
    assert one.state - step_bytes(geometry, 1, 4096, state_itemsize=2).state == 2 * 20 * 2**20
    assert one.weights < many.weights < 64 * one.weights
    embedding = geometry.vocab_size * geometry.hidden_size
    assert endless.weights == 2 * (49_122_681_728 - embedding)


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("_decode", "KDA"),
        ("extend", "KDA"),
        ("inter_chunk", "KDA"),
        ("_norm", "KDA"),
        ("_causal_conv1d_update_kernel", "KDA"),
        ("fused_recurrent_kda_packed_decode_kernel", "KDA"),
        ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "KDA"),
        ("layer_norm_gated_fwd_kernel1", "KDA"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...", "MLA"),
        ("void flash::FlashAttnFwdCombine<...>", "MLA"),
        ("void vllm::concat_and_cache_mla_kernel<__nv_bfloat16, ...>", "MLA"),
        ("fused_moe_kernel", "MoE"),
        ("void vllm::moe::grouped_topk_fused_kernel<float, ...>", "MoE"),
        ("void vllm::moe::moe_align_block_size_kernel<int>", "MoE"),
        ("void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel", "MoE"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_...", "GEMM"),
        ("void gemvx::kernel<int, int, __nv_bfloat16", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "GEMM"),
        ("void vllm::rms_norm_kernel<c10::BFloat16>", "other"),
        ("_combine_sampled_and_draft_tokens_kernel", "other"),
        ("Memcpy DtoH (Device -> Pinned)", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name, category):
    assert categorise(name) == category


def test_kernels_that_overlap_are_busy_once():
    kernels = [Kernel("_decode", 0, 10), Kernel("nvjet_x", 5, 10), Kernel("strange", 30, 10)]
    summary = summarise(kernels, steps=2, wall_ms=0.04)
    assert summary["gpu_ms"] == {"MLA": 0, "KDA": 0.005, "MoE": 0, "GEMM": 0.005, "other": 0.005}
    assert (summary["kernel_sum_ms"], summary["busy_ms"], summary["gaps_ms"]) == (0.015, 0.0125, 0.0275)
    assert summary["kernels"] == 1.5
    assert summary["other_kernels_ms"] == {"strange": 0.005}


def test_percentiles():
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([0, 10], 0.9) == pytest.approx(9)
    assert percentile([], 0.5) != percentile([], 0.5)
    assert summary_ms([0.001, 0.003])["p50_ms"] == 2


def test_latency_of_a_token_counts_from_the_same_requests_last():
    steps = iter([(1.0, {"a": 1}), (1.5, {}), (2.0, {"a": 1, "b": 1}), (4.0, {"b": 1, "c": 1})])
    clock = StepClock()
    clock.run(lambda: next(steps), count=3, deadline=99)
    assert clock.intervals() == [1.0, 2.0]
    assert sorted(clock.inter_token_latencies(["a", "b"])) == [1.0, 2.0]


def test_what_happens_between_two_runs_is_nobodys_latency():
    steps = iter([(1.0, {"a": 1}), (2.0, {"a": 1}), (60.0, {"a": 1}), (63.0, {"a": 1})])
    clock = StepClock()
    clock.run(lambda: next(steps), count=2, deadline=99)
    clock.pause()
    clock.run(lambda: next(steps), count=2, deadline=99)
    assert clock.inter_token_latencies(["a"]) == clock.intervals() == [1.0, 3.0]


def test_plan_travels_as_json():
    assert Plan.model_validate_json(LARGE.model_dump_json()) == LARGE
    assert LARGE.model_len == 1048576


@pytest.fixture
def two_providers(tmp_path):
    path = tmp_path / "rows.jsonl"
    for provider, ms, running in ((OURS, 2.0, 30), (IN_TREE, 5.0, 20)):
        rows = Rows(path, provider)
        for batch, requests in (("1", 1), ("largest", 8)):
            fields = {
                "requests": requests,
                "tpot": {"p50_ms": ms},
                "tokens_per_s": requests / ms * 1e3,
                "floor_ms": 1.47,
                "profile": {"skipped": "no device"},
            }
            rows.write("tpot", {"context": 4096, "batch": batch}, {"tpot": {"p50_ms": 99}} | fields)
        rows.write("concurrency", {"prompt": 1024}, {"running": running})
        rows.write("prefill", {"prompt": 8192}, {"error": "out of memory"})
    with path.open("a") as file:
        file.write('{"bench": "cut o')
    return path


def test_tables_compare_the_providers(two_providers):
    text = "\n".join(table.markdown() for table in tables(read(two_providers)))
    assert "| 4K | 2.00 | 5.00 | 1.47 | 2.50× |" in text
    assert "| 1K | 30 | 20 | 1.50× |" in text
    assert text.count("out of memory") == 2
    assert "| 4K | 8 | 2.00 | 4,000 | 1.47 | 8 | 5.00 | 1,600 | 1.47 | 2.50× |" in text


def test_the_last_good_row_counts(two_providers):
    Rows(two_providers, OURS).write("concurrency", {"prompt": 1024}, {"running": 31})
    Rows(two_providers, OURS).write("concurrency", {"prompt": 1024}, {"error": "later"})
    found = latest(read(two_providers), "concurrency")
    assert found[OURS, json.dumps({"prompt": 1024})]["running"] == 31


def test_plots_are_drawn(two_providers, tmp_path):
    pytest.importorskip("matplotlib")
    from serve.bench.engine.plots import plot

    drawn = plot(read(two_providers), tmp_path / "plots")
    assert {path.name for path in drawn} == {"tpot.png", "tpot-amortised.png", "concurrency.png"}


def test_a_profile_written_before_a_kernel_was_known_is_sorted_again():
    from serve.bench.engine.profile_steps import categorise_again

    written = {"gpu_ms": {"GEMM": 0.5, "other": 1.0}, "other_kernels_ms": {"_skinny": 0.75, "gumbel": 0.25}, "steps": 5}
    again = categorise_again(written)
    assert again["gpu_ms"] == {"GEMM": 1.25, "other": 0.25}
    assert again["other_kernels_ms"] == {"gumbel": 0.25}
    assert categorise_again({"skipped": "no GPU"}) == {"skipped": "no GPU"}


def test_each_category_of_kernels_has_its_times_below_its_own_name(tmp_path):
    """Whatever the order in which a profile lists them."""
    gpu_ms = {"other": 5.0, "KDA": 2.0, "MoE": 3.0, "MLA": 1.0, "GEMM": 4.0}
    profile = {"gpu_ms": gpu_ms, "kernel_sum_ms": 15.0, "gaps_ms": 0.5, "kernels": 100}
    Rows(tmp_path / "rows", OURS).write(
        "tpot",
        {"context": 4096, "batch": "1"},
        {"requests": 1, "tpot": {"p50_ms": 1.0}, "tokens_per_s": 1e3, "floor_ms": None, "profile": profile},
    )
    [table] = [one for one in tables(read(tmp_path / "rows")) if one.title.startswith("GPU time")]
    found = dict(zip(table.columns, table.cells[0], strict=True))
    assert {name: float(found[name]) for name in gpu_ms} == gpu_ms
