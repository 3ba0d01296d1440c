"""`vllm serve` as users start it, in processes of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_SECONDS = 240
SMALL = [
    *("--dtype", "float32", "--max-num-seqs", "8", "--max-model-len", "2048"),
    *("--enforce-eager", "--enable-prompt-tokens-details"),
]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(checkpoint: Path, port: int, log: Path, *options: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own, writing to `log`; small unless `options` bring a ``--config``."""
    beside = Path(sys.executable).with_name("vllm")
    command = [str(beside) if beside.exists() else "vllm", "serve", str(checkpoint), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "recall"]
    # The command line wins over a --config, which would then not be what is tested.
    command += [*([] if "--config" in options else SMALL), *options]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"} | environment
    return subprocess.Popen(
        command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
    )


@contextmanager
def serving(checkpoint: Path, log: Path, *options: str) -> Iterator[int]:
    """A server that answers, on the port given; stopped afterwards."""
    with serving_process(checkpoint, log, *options) as (port, _):
        yield port


@contextmanager
def serving_process(checkpoint: Path, log: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Like `serving`, with the process too, for tests that end it themselves."""
    port = free_port()
    process = start(checkpoint, port, log, *options)
    deadline = time.monotonic() + START_SECONDS
    try:
        while True:
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield port, process
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
