"""`make demo` as a user runs it: what it says when it cannot start, and that all its answers are right.

The last of them comes from a session, after the server was restarted.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = [sys.executable, "-m", "serve.demo"]
LOG = ROOT / ".demo" / "server.log"


def environment(**changes: str) -> dict[str, str]:
    """The caller's environment without what tests/conftest.py or a shell may have set for vLLM."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "KIMI_VLLM_"))}
    return {**inherited, "COLUMNS": "200", **changes}


def run_demo(*arguments: str, timeout: float = 30, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEMO, *arguments],
        env=environment(**changes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_in_group(group: int) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "pgid=,args="], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if line.split()[0] == str(group)]


def test_a_taken_port_is_named_with_the_way_to_another() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        done = run_demo("--port", str(port))
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1 cannot be used" in done.stdout
    assert f"make demo PORT={port + 1}" in done.stdout
    assert f"--port {port + 1}" in done.stdout


def test_a_plugin_that_is_turned_off_is_refused_before_anything_starts() -> None:
    done = run_demo("--port", str(free_port()), KIMI_VLLM_DISABLE="1")
    assert done.returncode == 1
    assert "unset KIMI_VLLM_DISABLE" in done.stdout


def test_a_server_that_cannot_start_is_reported_with_its_first_error() -> None:
    done = run_demo("--port", str(free_port()), timeout=120, VLLM_CPU_KVCACHE_SPACE="a lot")
    assert done.returncode == 1
    assert "the server ended (status 1) before it was ready" in done.stdout
    assert "invalid literal for int() with base 10: 'a lot'" in done.stdout
    assert str(LOG) in done.stdout


@pytest.mark.engine
def test_all_answers_are_right() -> None:
    done = run_demo("--port", str(free_port()), timeout=300)
    assert done.returncode == 0, done.stdout
    assert "All answers are right." in done.stdout
    assert "8 right" in done.stdout
    assert re.search(r"Session 'demo' goes on: 5\d\d of 5\d\d prompt tokens come from disk, .* ✓", done.stdout)


@pytest.mark.engine
def test_an_interrupt_stops_the_server_too() -> None:
    demo = subprocess.Popen(
        [*DEMO, "--port", str(free_port())],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A CI runner in the background ignores interrupts, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children")
    while not (server := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=60) != 0
    assert processes_in_group(int(server[0])) == []
