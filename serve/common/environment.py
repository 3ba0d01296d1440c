"""Variables of the processes that run vLLM here. They are read when torch and vLLM are imported: set them before."""

import os

SERVER = {
    "HF_HUB_OFFLINE": "1",  # the checkpoints are in the repository, and nothing here may depend on a network
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",  # the log is read: for progress, and for the line of our plugin
    # A model of a few MB is fastest on one thread, and pinned threads wait for each other on a busy machine.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM's n-gram proposer sets numba's threads, and with them OpenMP's. oneDNN then lays out the weights of the next
    # engine in the process otherwise, and vLLM multiplies them by what it compiled for the first one's.
    "NUMBA_NUM_THREADS": "1",
    # Start-up is Python importing vLLM, once per process. A worker inside the engine saves one of three.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""A `vllm serve` of a tiny checkpoint."""

ENGINE = SERVER | {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "KIMI_VLLM_STRICT": "1",  # else vLLM's own model could answer
}
"""An engine whose scheduler and worker are in this process, within reach."""

UNCOMPILED = {
    "TORCHDYNAMO_DISABLE": "1",  # the first generation of every engine would compile for ten seconds
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # on GPUs it would be compiled first
}
"""In addition, for processes that start many engines."""


def prepare(environment: dict[str, str]) -> None:
    """Set these variables, unless the caller of the process has set them."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)
