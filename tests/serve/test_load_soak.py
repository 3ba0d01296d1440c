"""Soaks: the rate that is held, the memory that is watched, and the verdict."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.load import make_record, scenario

from serve.load import __main__ as load_test
from serve.load import record, scrape, verdict
from serve.load.scenario import points, read

EMPTY = dict.fromkeys(("slots_live", "slots_checkpoint", "blocks_page", "blocks_kept", "blocks_loose"), 0.0)
SOAK = """
soak: {part: held}
parts:
  - {name: limit, workload: {kind: random, prompt: 64, output: 8}, concurrency: [2, 4], requests_per_user: 2}
  - {name: held, workload: {kind: random, prompt: 64, output: 8}, rate_of: limit, rate: [0.5], seconds: 100}
"""


def test_a_soak_sends_a_share_of_what_the_server_was_seen_to_do(tmp_path):
    made = make_record(tmp_path, SOAK)
    made.points[1].result["request_throughput"] = 7.0
    point = points(read(scenario(tmp_path, SOAK)))[-1].at(made.limit("limit"))
    assert (point.rate, point.num_requests, point.label) == (3.5, 350, "held, 50% of limit, 3.5/s")
    with pytest.raises(record.RecordError, match="no point of 'warm-up' was measured"):
        made.limit("warm-up")


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, None),
        ({"memory": 1.03}, "memory stayed"),
        ({"samples": 5}, "memory stayed"),
        ({"failed": 1}, "no errors"),
        ({"error": "status 1"}, "no errors"),
        ({"request_throughput": 3.2}, "the rate was kept"),
        *(({"end": EMPTY | {name: 1.0}}, "nothing stayed") for name in EMPTY),
        ({"end": {}}, "nothing stayed"),
    ],
)
def test_the_verdict_names_what_did_not_hold(tmp_path, change, broken):
    made = make_record(tmp_path, SOAK)
    limit, _, held = made.points
    held.rate, held.started, held.ended = 3.5, 100.0, 200.0
    held.result["request_throughput"] = change.get("request_throughput", 3.49)
    limit.result["failed"], limit.error = change.get("failed", 0), change.get("error", "")
    # Memory doubles before the part that is judged, which is no leak, and grows evenly within it.
    number = change.get("samples", 50)
    grown = change.get("memory", 1.01)
    made.samples = [{"t": 50.0, "rss_bytes": 1e9}] + [
        {"t": 100.0 + 99 * i / number, "rss_bytes": 2e9 * (1 + (grown - 1) * i / number / 0.9)} for i in range(number)
    ]
    end = change.get("end", EMPTY | {"blocks_state": 3.0, "blocks_clean": 16.0})
    checks = verdict.judge(made, "held", 0.02, end)
    assert [check["name"] for check in checks if not check["passed"]] == ([broken] if broken else [])
    assert len(checks) == 4


def test_memory_is_that_of_a_process_and_of_those_it_started():
    keep = "data = b'x' * 50_000_000; print('here', flush=True); input()"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {keep!r}])"
    with subprocess.Popen([sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        alone, all_of_them = psutil.Process(process.pid).memory_info().rss, scrape.resident_bytes(process.pid)
        process.stdin.close()
    assert all_of_them > alone + 50_000_000


def test_the_committed_soak_passed_and_its_verdict_follows_from_its_numbers():
    kept = record.load(Path(load_test.__file__).parent / "results" / "soak-cpu.json")
    held = [point for point in kept.points if point.part == kept.scenario["soak"]["part"]]
    assert all(point.ended - point.started >= 1200 for point in held)
    assert kept.complete
    # When it was made, states had slots of their own and the last check counted those.
    assert verdict.judge(kept, "held", 0.02, EMPTY)[:-1] == kept.verdict[:-1]
    assert all(check["passed"] for check in kept.verdict)
