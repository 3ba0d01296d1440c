"""A `vllm serve` process: started, waited for, and stopped with all its children."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

HOST = "127.0.0.1"
TERM_SECONDS = 15
TAIL_LINES = 12
ERROR = re.compile(r"\b\w+(Error|Exception): .+")
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
ENVIRONMENT = {
    # The demo must not depend on a network: the checkpoint is in the repository.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",  # the log is read: for progress, and for the line of our plugin
    # A model of 6 MB is fastest on one thread, and pinned threads wait for each other on a busy machine.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Start-up is Python importing vLLM, once per process. A worker inside the engine saves one of three.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


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
        keep: set it to True to leave the server running.
    """

    def __init__(
        self,
        model: Path | str,
        name: str | None,
        port: int,
        log: Path,
        options: dict[str, str],
        *,
        more: Sequence[str] = (),
        environment: Mapping[str, str] = ENVIRONMENT,
        dies_with_us: bool = False,
    ) -> None:
        """Describe a server; entering it starts it.

        Args:
            model: the checkpoint.
            name: what clients call it; None for the same as the checkpoint.
            port: on 127.0.0.1.
            log: file that receives the output of the server.
            options: of `vllm serve`, with their values; an empty value for a flag.
            more: further words for the command line, as the user wrote them.
            environment: set for the server beside what it inherits.
            dies_with_us: whether the kernel ends it when this process is killed and cannot.
        """
        self.url = f"http://{HOST}:{port}"
        self.log = log
        self.keep = False
        self._port = port
        arguments = [part for option, value in options.items() for part in (option, value) if part]
        self._command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--host", HOST]
        self._command += ["--port", str(port), *(["--served-model-name", name] if name else []), *arguments, *more]
        self._environment = environment
        self._dies_with_us = dies_with_us
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the server without waiting for it.

        Raises:
            ServerError: the port is taken.
        """
        _refuse_taken_port(self._port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,  # its own process group: workers are stopped with it
                preexec_fn=_end_with_parent if self._dies_with_us else None,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the server, unless `keep` is set."""
        if not self.keep:
            self.stop()

    @property
    def command(self) -> list[str]:
        """The command line."""
        return self._command

    @property
    def pid(self) -> int:
        """Process id of the server and id of its process group."""
        assert self._process is not None
        return self._process.pid

    def wait_ready(self, timeout_seconds: float, report: Callable[[str], None]) -> float:
        """Wait until the server answers, and return the seconds that took.

        Args:
            timeout_seconds: when to give up.
            report: is told the newest line of the log from time to time.

        Raises:
            ServerError: the server ended, or did not answer in time; with the end of its log.
        """
        assert self._process is not None
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < timeout_seconds:
            status = self._process.poll()
            if status is not None:
                raise ServerError(f"the server ended (status {status}) before it was ready.\n{self.why()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2).is_success:
                    return elapsed
            except httpx.TransportError:
                report("".join(self._lines()[-1:]))
            time.sleep(0.1)
        raise ServerError(f"the server was not ready after {timeout_seconds:.0f} s.\n{self.why()}")

    def why(self) -> str:
        """The first error in the log, which later ones follow from, and the end of the log."""
        lines = self._lines()
        causes = [match[0] for line in lines if "WARNING" not in line and (match := ERROR.search(line))]
        return "\n".join([*causes[:1], f"The end of {self.log}:", *lines[-TAIL_LINES:]])

    def _lines(self) -> list[str]:
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]

    def stop(self) -> None:
        """Ask the server to end; kill what is left of its process group after `TERM_SECONDS`."""
        if self._process is None:
            return
        # To the parent alone: it stops its children in order, and would report a signal to all as a crash.
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(TERM_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # also children that outlived it
        self._process.wait()


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
