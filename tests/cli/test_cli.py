"""The command line: what it imports, and what plan says."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kimi_vllm.cli import app
from kimi_vllm.cli.plan import parse_cache_memory

CONFIG_48B = Path(__file__).parents[2] / "configs" / "models" / "48b-a3b"
HEAVY = ("torch", "vllm", "numba", "transformers")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from kimi_vllm.cli import app; "
        "assert 'doctor' in CliRunner().invoke(app, ['--help']).stdout; "
        f"assert not set(sys.modules) & set({HEAVY})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def run_plan(*arguments: str, model: Path = CONFIG_48B, memory: str = "141GB") -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", "--model", str(model), "--memory", memory, *arguments])
    return result.exit_code, result.output


def plan_json(*arguments: str) -> dict[str, Any]:
    status, output = run_plan("--json", *arguments)
    assert status == 0, output
    report: dict[str, Any] = json.loads(output)
    return report


def test_plan_of_the_48b_model() -> None:
    report = plan_json("--contexts", "4k,1M,1000")
    assert report["parameters"] == 49_122_681_728
    assert report["memory"] == 150_109_880_320, "what CUDA hands out on a card sold as 141 GB"
    assert [row["tokens"] for row in report["contexts"]] == [4096, 2**20, 1000]
    assert report["contexts"][1]["bytes"] == {
        "ours": 86 * 64 * 8064 + 2**20 * 8064,
        "all_mla": 2**20 * 31_104,
        "in_tree": (547 + 3) * 7 * 1920 * 1152,
    }
    assert (report["costs"]["state"], report["costs"]["state_blocks"]) == (43_909_120, 86)
    assert (report["lengths"], report["average_concurrency"]) == ({}, None)
    assert report["out_of_memory"]["longest_context"] == 2**20
    blocks = report["capacity"]["blocks"]
    assert blocks * 64 * 8064 <= report["available"] < 0.92 * report["memory"] - 98_245_363_456
    assert report["contexts"][0]["concurrency"]["ours"] == (blocks - 1) // (86 + 64)


def test_plan_of_a_mixture_of_lengths() -> None:
    report = plan_json("--lengths", "1K:5,8k:4,128K:1")
    assert report["lengths"] == {"1024": 0.5, "8192": 0.4, "131072": 0.1}
    held = 86 + 0.5 * 16 + 0.4 * 128 + 0.1 * 2048
    ours, in_tree = report["average_concurrency"].values()
    assert ours == pytest.approx((report["capacity"]["blocks"] - 1) / held)
    _, text = run_plan("--lengths", "1K:0.5,8K:0.4,128K:0.1")
    assert f"50% of 1K, 40% of 8K, 10% of 128K: {ours:,.1f} run at once on average, in-tree {in_tree:,.1f}." in text


def test_plan_takes_a_file_half_the_state_and_a_binary_size() -> None:
    status, output = run_plan("--json", "--state-dtype", "bfloat16", model=CONFIG_48B / "config.json", memory="131GiB")
    report = json.loads(output)
    assert status == 0
    assert report["memory"] == 131 * 2**30
    assert report["costs"]["state"] == 20 * (2**20 + 4 * 12_288 * 2)
    assert report["in_tree_block_size"] == 1920, "vLLM's own model keeps float32 states whatever is asked"


def test_plan_on_two_devices_halves_the_state_but_not_the_latents() -> None:
    costs = plan_json("--tp", "2")["costs"]
    assert (costs["state"], costs["block"]) == (43_909_120 // 2, 64 * 8064)


def test_plan_counts_records_of_drafts() -> None:
    report = plan_json("--speculative-tokens", "3")
    assert (report["speculative_tokens"], report["costs"]["state_blocks"]) == (3, 99)
    assert report["in_tree_block_size"] == 2048
    assert report["contexts"][1]["bytes"]["in_tree"] == (2 + 4 * 3) * 7 * 2048 * 1152, "vLLM keeps a state per draft"
    _, text = run_plan("--speculative-tokens", "3")
    assert "whose blocks have 2,048 tokens here, 4 states a request." in text


@pytest.mark.parametrize(("device", "most"), [("cuda", "7 on GPUs"), ("cpu", "15 on CPUs")])
def test_plan_says_how_many_drafts_there_can_be(device: str, most: str) -> None:
    status, output = run_plan("--speculative-tokens", "16", "--device", device)
    assert (status, f"--speculative-tokens 16: at most {most}." in output) == (1, True)


def test_plan_estimates_nothing_if_the_memory_of_the_cache_is_given() -> None:
    report = plan_json("--kv-cache-memory-bytes", "3GiB", "--max-model-len", "8K")
    assert (report["available"], report["capacity"]["blocks"]) == (3 * 2**30, 3 * 2**30 // (64 * 8064))
    _, text = run_plan("--kv-cache-memory-bytes", "3GiB", "--max-model-len", "8K")
    assert ("an estimate" in text, "does not start" in text, "memory left  3.00 GiB" in text) == (False, False, True)
    status, text = run_plan("--kv-cache-memory-bytes", "1GiB", "--max-model-len", "1M")
    assert (status, "or raise --kv-cache-memory-bytes." in text) == (1, True)


@pytest.mark.parametrize("text", ["34000000000", "32G", "32g", "3T", "500000M", "31.5g"])
def test_memory_of_the_cache_is_read_as_vllm_reads_it(text: str) -> None:
    from vllm.utils.argparse_utils import human_readable_int

    assert parse_cache_memory(text) == human_readable_int(text)


@pytest.mark.parametrize(("text", "count"), [("31.5GiB", 63 * 2**29), ("80GB", 80 * 10**9)])
def test_memory_of_the_cache_is_no_card(text: str, count: int) -> None:
    assert parse_cache_memory(text) == count


def test_plan_table_says_what_the_json_says() -> None:
    report = plan_json("--max-num-seqs", "400")
    _, text = run_plan("--max-num-seqs", "400")
    assert f"{report['capacity']['blocks']:,} of 516,096 B, each 64 tokens" in text
    assert "86 blocks a request: 41.88 MiB, 98.9% of its blocks" in text
    assert round(report["state_fill"], 3) == 0.989
    assert f"{report['capacity']['tokens']:,} in all blocks" in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("4K "))
    assert row[-3:] == [str(count) for count in report["contexts"][1]["concurrency"].values()]
    assert report["contexts"][1]["concurrency"]["ours"] == 400, "no more than --max-num-seqs"


def test_plan_of_quantised_weights(tmp_path: Path) -> None:
    """FP8 fits one card of 80 GB, by option and as a checkpoint says of itself; latents of FP8 take half the pages."""
    status, output = run_plan("--json", "--quantization", "fp8", memory="80GB")
    assert status == 0, output
    fp8 = json.loads(output)
    assert fp8["memory"] == 85_017_493_504
    assert fp8["quantization"] == "fp8"
    assert fp8["costs"]["block"] == 64 * 8064
    status, output = run_plan("--json", "--quantization", "fp8", "--kv-cache-dtype", "fp8", memory="80GB")
    assert json.loads(output)["costs"]["block"] == 64 * 4032
    assert json.loads(output)["costs"]["state_blocks"] == 171
    config = json.loads((CONFIG_48B / "config.json").read_text())
    written = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": written}))
    for option in ((), ("--quantization", "fp8")):
        status, output = run_plan("--json", *option, model=tmp_path, memory="80GB")
        assert json.loads(output)["capacity"] == fp8["capacity"]
    status, output = run_plan("--quantization", "fp8_per_block", model=tmp_path, memory="80GB")
    assert "--quantization fp8_per_block: the checkpoint is quantised by fp8. Drop the option." in output


def test_plan_draws_a_picture(tmp_path: Path) -> None:
    assert run_plan("--plot", str(tmp_path / "plan.png"))[0] == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "memory", "message"),
    [
        ((), "80GB", "--max-model-len 1048576: one request with its state needs 16,557 blocks (7.96 GiB), and"),
        ((), "lots", "'lots': expected 141GB, 80GiB or a number of bytes"),
        ((), "141XB", "'141XB': expected 141GB"),
        (("--contexts", "4k,long"), "141GB", "'long': expected 4k, 1M or a number of tokens"),
        (("--tp", "3"), "141GB", "--tensor-parallel-size 3: the model's 32 KDA heads do not divide by it"),
        (("--lengths", "4k"), "141GB", "'4k': expected a length and its share, as 8K:0.4"),
        (("--lengths", "4k:half"), "141GB", "'4k:half': expected a length and its share"),
        (("--lengths", "4k:0,8k:0"), "141GB", "'4k:0,8k:0': expected shares above 0"),
        (("--lengths", "4k:2,8k:-1"), "141GB", "'4k:2,8k:-1': expected shares above 0"),
        (
            ("--kv-cache-dtype", "fp8", "--device", "cpu"),
            "80GB",
            "--kv-cache-dtype fp8: kimi-vllm on CPUs and in float32",
        ),
        (("--quantization", "nvfp4"), "80GB", "quantisation nvfp4: the size of its weights is unknown."),
        (("--dtype", "int3"), "141GB", "'int3' is not one of 'auto', 'bfloat16'"),
    ],
)
def test_plan_errors_name_what_is_wrong(
    arguments: Sequence[str], memory: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, output = run_plan(*arguments, memory=memory)
    assert status != 0
    assert message in output


def test_plan_of_a_folder_without_a_config_names_it(tmp_path: Path) -> None:
    status, output = run_plan(model=tmp_path)
    assert status == 1
    assert f"--model {tmp_path}: expected a config.json or a folder with one" in output


def test_plan_needs_no_vllm_and_draws_only_when_asked() -> None:
    arguments = ["plan", "--model", str(CONFIG_48B), "--memory", "141GB"]
    code = (
        "import sys; from typer.testing import CliRunner; from kimi_vllm.cli import app; "
        f"assert CliRunner().invoke(app, {arguments}).exit_code == 0; "
        "assert not set(sys.modules) & {'vllm', 'numba', 'transformers', 'matplotlib'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
