"""A `vllm serve` process: started, waited for, and stopped with all its children."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx
from rich.console import Console
from rich.text import Text

from serve.common.environment import SERVER

HOST = "127.0.0.1"
TERM_SECONDS = 15
TAIL_LINES = 12
ERROR = re.compile(r"\b\w+(Error|Exception): .+|(^|(?<=[)\]] ))\w+(Error|Exception)$")
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


class ServerError(Exception):
    """The server could not start or stopped too early; the message is for the user."""


def root_of(url: str) -> str:
    """The address of a server, given that or, as clients want it, the API's with ``/v1``; no slash at the end."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


class Server:
    """`vllm serve` as a context manager; leaving it stops the whole process group.

    Attributes:
        url: base of the OpenAI-compatible API, without a trailing slash.
        log: file that receives the output of the server.
        command: the command line.
        port: on 127.0.0.1.
        process: the server, once it is started; its id is that of its process group.
        keep: set it to True to leave the server running.
    """

    def __init__(
        self,
        model: Path | str,
        log: Path,
        *options: str,
        name: str | None = None,
        port: int = 0,
        environment: Mapping[str, str] = SERVER,
        dies_with_us: bool = False,
    ) -> None:
        """Describe a server; entering it starts it.

        Args:
            options: Options of `vllm serve`, word by word.
            name: what clients call the model; None for the same as the checkpoint.
            port: on 127.0.0.1; 0 for a free one.
            environment: set for the server beside what it inherits.
            dies_with_us: whether the kernel ends it when this process is killed and cannot.
        """
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log = log
        self.keep = False
        self.command = [program("vllm"), "serve", str(model), "--host", HOST, "--port", str(self.port)]
        self.command += [*(["--served-model-name", name] if name else []), *options]
        self._environment = environment
        self._dies_with_us = dies_with_us
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        """Start the server without waiting for it.

        Raises:
            ServerError: the port is taken.
        """
        _refuse_taken_port(self.port)
        self.start()
        return self

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server, whoever has its port."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,  # its own process group: workers are stopped with it
                preexec_fn=_end_with_parent if self._dies_with_us else None,
            )
        return self.process

    def __exit__(self, *reason: object) -> None:
        """Stop the server, unless `keep` is set."""
        if not self.keep:
            self.stop()

    def wait_ready(self, timeout_seconds: float, console: Console | None = None) -> float:
        """Wait until the server answers, and return the seconds that took.

        Args:
            console: shows the newest line of the log meanwhile.

        Raises:
            ServerError: the server ended, or did not answer in time; with the end of its log.
        """
        start = time.monotonic()
        with (console or Console(quiet=True)).status("") as status:
            while (elapsed := time.monotonic() - start) < timeout_seconds:
                code = self.process.poll()
                if code is not None:
                    raise ServerError(f"the server ended (status {code}) before it was ready.\n{self.why()}")
                try:
                    if httpx.get(f"{self.url}/health", timeout=2).is_success:
                        return elapsed
                except httpx.TransportError:
                    line = "".join(self._lines()[-1:])
                    status.update(Text.assemble(f"starting vLLM, {elapsed:.0f} s  ", (line[-90:], "dim")))
                time.sleep(0.1)
        raise ServerError(f"the server was not ready after {timeout_seconds:.0f} s.\n{self.why()}")

    def why(self) -> str:
        """The first error in the log, which later ones follow from, and the end of the log."""
        lines = self._lines()
        found = [
            (at, match[0]) for at, line in enumerate(lines) if "WARNING" not in line and (match := ERROR.search(line))
        ]
        cause: list[str] = []
        for at, error in found[:1]:
            # An assertion says what it is about in the lines before it only.
            cause = [error] if ":" in error else [*lines[max(0, at - 2) : at], error]
        return "\n".join([*cause, f"The end of {self.log}:", *lines[-TAIL_LINES:]])

    def _lines(self) -> list[str]:
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]

    def stop(self) -> None:
        """Ask the server to end; kill what is left of its process group after `TERM_SECONDS`."""
        # To the parent alone: it stops its children in order, and would report a signal to all as a crash.
        end(self.process, TERM_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # children that outlived it


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask a process to end, and kill it if it has not ended after so many seconds."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.wait()


def interrupt_on_sigterm() -> None:
    """Do on SIGTERM as on Ctrl-C: leave through the context managers, so that results are kept and servers stop."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))


def program(name: str) -> str:
    """The program beside this Python, or the first on the path."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def models(url: str, key: str = "none") -> list[dict[str, Any]]:
    """What a server says of its models, as the API lists them.

    Raises:
        ServerError: it does not answer as a server of models.
    """
    try:
        listed = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=30)
        found: list[dict[str, Any]] = listed.raise_for_status().json()["data"]
        assert all("id" in model for model in found)
    except (httpx.HTTPError, KeyError, ValueError, AssertionError) as error:
        raise ServerError(f"{url} does not answer as a server of models: {error}") from error
    return found


def free_port() -> int:
    """A port on 127.0.0.1 nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _refuse_taken_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(
                f"port {port} on {HOST} cannot be used ({error.strerror}). "
                f"Choose another: make demo PORT={port + 1} (or --port {port + 1})."
            ) from error
