"""What a run covered is written only as far as it passed."""

import json
from pathlib import Path

import pytest
from support.record import FEATURES, merge, outcomes


def report(outcome: str, *properties: tuple[str, str], when: str = "call") -> pytest.TestReport:
    return pytest.TestReport("id", ("f", 1, "t"), {}, outcome, None, when, user_properties=list(properties))  # type: ignore[arg-type]


def test_one_failure_among_many_passes_is_a_failure() -> None:
    reports = [
        report("passed", ("covers", "bfloat16")),
        report("failed", ("covers", "bfloat16")),
        report("passed", ("covers", "TP 2"), ("covers", "FP8")),
        report("passed", ("covers", "TP 2"), when="setup"),
        report("skipped", ("covers", "PP 2")),
        report("passed", ("refuses", "4 bits")),
        report("failed", ("covers", "EP 2"), when="teardown"),
    ]
    assert outcomes(reports) == {
        "bfloat16": "failed",
        "TP 2": "tested",
        "FP8": "tested",
        "4 bits": "refused",
        "EP 2": "failed",
    }


def test_a_test_that_breaks_before_it_speaks_fails_what_its_file_covers() -> None:
    reports = [report("passed", ("covers", "FP8")), report("failed", when="setup")]
    assert outcomes(reports) == {"FP8": "failed"}


def test_a_feature_nobody_knows_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"covers 'TP 3', which is not one of {FEATURES[0]}"):
        outcomes([report("passed", ("covers", "TP 3"))])


def test_runs_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "tested.json"
    merge(path, "0.33.0", "H100", {"FP8": "tested", "TP 2": "tested"})
    merge(path, "0.33.0", "H100", {"TP 2": "failed"})
    merge(path, "0.32.0", "CPU", {"FP8": "refused"})
    known = json.loads(path.read_text())
    assert known["0.33.0"]["H100"]["FP8"].startswith("tested 20")
    assert known["0.33.0"]["H100"]["TP 2"].startswith("failed 20")
    assert set(known) == {"0.32.0", "0.33.0"}
