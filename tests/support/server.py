"""`vllm serve` as users start it, in processes of its own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

from serve.common.server import Server, free_port
from support.engine import DRAFTS, ngram

__all__ = ["free_port", "serving", "serving_process"]

START_SECONDS = 240
SMALL = [
    *("--dtype", "float32", "--max-num-seqs", "8", "--max-model-len", "2048"),
    *("--enforce-eager", "--enable-prompt-tokens-details"),
]


def _server(checkpoint: Path, log: Path, *options: str, port: int = 0) -> Server:
    """Small unless `options` bring a ``--config``, which the command line would overrule."""
    drafts = ["--speculative-config", json.dumps(ngram(DRAFTS))] if DRAFTS else []
    words = [*([] if "--config" in options else SMALL), *drafts, *options]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    return Server(checkpoint, log, *words, name="recall", port=port, environment=environment)


@contextmanager
def serving(checkpoint: Path, log: Path, *options: str) -> Iterator[int]:
    """A server that answers, on the port given; stopped afterwards."""
    with serving_process(checkpoint, log, *options) as (port, _):
        yield port


@contextmanager
def serving_process(checkpoint: Path, log: Path, *options: str) -> Iterator[tuple[int, Popen[bytes]]]:
    """Like `serving`, with the process too, for tests that end it themselves."""
    with _server(checkpoint, log, *options) as server:
        server.wait_ready(START_SECONDS)
        yield server.port, server.process
