"""Checks whether vLLM on this machine would serve Kimi Linear with our code.

vLLM ignores a plugin that fails to import and serves its own model, so the checks look at what counts: metadata of
distributions, and the model registry after vLLM has loaded its plugins.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.version import Version

from kimi_vllm import ARCHITECTURE, _vllm, nccl

Status = Literal["OK", "WARN", "FAIL"]

PLUGIN = "kimi_vllm"
MIN_SHM_BYTES = 256 * 2**20
_INSTALL = "pip install 'kimi-vllm[cpu]' or pip install 'kimi-vllm[cuda]'"
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: What was checked.
        status: FAIL: our code would not serve. WARN: something is missing or slow.
        found: What was found.
        fix: What to do; empty if the status is OK.
    """

    check: str
    status: Status
    found: str
    fix: str = ""


def diagnose() -> Iterator[Finding]:
    """Run all checks, cheap ones first. Imports vLLM and the model, and logs nothing to stdout.

    A check that raises is reported as FAIL; the others still run.
    """
    # vLLM logs to stdout, which --json needs. It reads these variables when it is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    for check in CHECKS:
        try:
            yield check()
        except Exception as error:
            what = check.__name__.removeprefix("check_").replace("_", " ").capitalize()
            found = f"{type(error).__name__}: {error}"
            yield Finding(what, "FAIL", found, "if the error does not name the cause, please report it")


def check_python() -> Finding:
    """Operating system, and Python: the version with which the installed extra was tested."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}"
    if platform.system() != "Linux":
        return Finding("Python", "FAIL", found, "vLLM runs on Linux only; use a Linux machine or container")
    installed = _vllm.installed_vllm()
    extras = ("cpu", "cuda") if installed is None else ("cpu" if "cpu" in " ".join(installed) else "cuda",)
    if ".".join(platform.python_version_tuple()[:2]) not in (_vllm.TESTED_PYTHON[extra] for extra in extras):
        tested = ", ".join(f"kimi-vllm[{extra}] with Python {_vllm.TESTED_PYTHON[extra]}" for extra in extras)
        return Finding("Python", "WARN", f"{found}: untested version", f"tested: {tested}")
    return Finding("Python", "OK", found)


def check_processor() -> Finding:
    """Cores of this process, and the vector instructions that vLLM's CPU build uses."""
    cores = len(os.sched_getaffinity(0))
    if platform.machine() != "x86_64":
        return Finding("CPU", "OK", f"{cores} cores, {platform.machine()}")
    flags = set(Path("/proc/cpuinfo").read_text().split())
    present = [flag for flag in CPU_FLAGS if flag in flags]
    found = f"{cores} cores, {' '.join(present) or 'no AVX2'}"
    if missing := [flag for flag in ("avx2", "f16c") if flag not in flags]:
        fix = f"vllm-cpu and our kernels need {' and '.join(missing)}: serving on this CPU will fail"
        return Finding("CPU", "WARN", found, fix)
    return Finding("CPU", "OK", found)


def check_shared_memory() -> Finding:
    """/dev/shm, which vLLM's processes share; containers often have 64 MB."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("Shared memory", "WARN", "no /dev/shm", "mount it; docker run --shm-size=1g")
    free = shutil.disk_usage(path).free
    found = f"{free / 2**20:.0f} MB free in /dev/shm"
    if free < MIN_SHM_BYTES:
        return Finding("Shared memory", "WARN", found, "docker run --ipc=host, or --shm-size=1g")
    return Finding("Shared memory", "OK", found)


def check_torch() -> Finding:
    """The torch build and its device."""
    if find_spec("torch") is None:
        return Finding("torch", "FAIL", "not installed", _INSTALL)
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return Finding("torch", "OK", f"{torch.__version__}, {device}")


def check_triton() -> Finding:
    """Triton is needed on GPUs only."""
    on_gpu = _device_type() == "cuda"
    try:
        found = version("triton")
    except PackageNotFoundError:
        if on_gpu:
            return Finding("Triton", "FAIL", "not installed", "pip install triton")
        return Finding("Triton", "OK", "not installed, and not used on CPUs")
    return Finding("Triton", "OK", found if on_gpu else f"{found}, not used on CPUs")


def check_nccl() -> Finding:
    """Whether vLLM's NCCL communicator works: it turns itself off without a message if the library lacks a function."""
    import torch

    if torch.cuda.device_count() < 2:
        return Finding("NCCL", "OK", "not used with fewer than two GPUs")
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    if why := nccl.why_unusable():
        found = f"vLLM cannot use it: {why}; pipeline parallelism and data-parallel experts are refused"
        return Finding("NCCL", "WARN", found, nccl.REMEDY)
    return Finding("NCCL", "OK", NCCLLibrary().ncclGetVersion())


def check_vllm() -> Finding:
    """The distribution of vLLM: tested on this device, merely in the supported range, or unsupported."""
    installed = _vllm.installed_vllm()
    if installed is None:
        return Finding("vLLM", "FAIL", "not installed", _INSTALL)
    name, release = installed
    found = f"{name} {release} (supported: {_vllm.SUPPORTED_VLLM})"
    if not _vllm.SUPPORTED_VLLM.contains(release, prereleases=True):
        return Finding("vLLM", "FAIL", found, f"pip install '{name}{_vllm.SUPPORTED_VLLM}'")
    import vllm  # noqa: F401

    device = _device_type()
    served = [tested for tested, devices in _vllm.TESTED.items() if device in devices]
    if Version(release).public in served:
        return Finding("vLLM", "OK", f"{found}, tested on {device}")
    found += f", in range but not tested on {device}"
    return Finding("vLLM", "WARN", found, f"tested: {', '.join(served) or 'none'}; others may fail at start")


def check_vllm_command() -> Finding:
    """The `vllm` command needs a distribution named vllm, which the CPU wheel is not."""
    try:
        release = version("vllm")
    except PackageNotFoundError:
        server = "python -m vllm.entrypoints.openai.api_server"
        fix = f"pip install --no-deps ./requirements/vllm-cpu-alias (make setup does), or {server}"
        return Finding("vllm command", "WARN", "no distribution named vllm: `vllm serve` will not start", fix)
    return Finding("vllm command", "OK", f"vllm {release}")


def check_environment() -> Finding:
    """Variables that turn the plugin off."""
    if os.environ.get("KIMI_VLLM_DISABLE") == "1":
        return Finding("Environment", "FAIL", "KIMI_VLLM_DISABLE=1: the plugin is off", "unset KIMI_VLLM_DISABLE")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        found = f"VLLM_PLUGINS={allowed!r} does not name {PLUGIN}: the plugin is off"
        return Finding("Environment", "FAIL", found, f"unset VLLM_PLUGINS, or add {PLUGIN} to it")
    strict = " (KIMI_VLLM_STRICT=1)" if os.environ.get("KIMI_VLLM_STRICT") == "1" else ""
    return Finding("Environment", "OK", f"the plugin is on{strict}")


def check_entry_point() -> Finding:
    """The entry point through which vLLM finds the plugin."""
    ours = [point for point in _plugin_entry_points() if point.name == PLUGIN]
    if not ours:
        found = "no entry point kimi_vllm in vllm.general_plugins"
        return Finding("Entry point", "FAIL", found, "pip install kimi-vllm (in a clone: make setup)")
    return Finding("Entry point", "OK", f"{ours[0].group}: {ours[0].value}")


def check_model_class() -> Finding:
    """The class that vLLM resolves after it has loaded its plugins."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    entry = ModelRegistry.models.get(ARCHITECTURE)
    if entry is None:
        return Finding("Model class", "FAIL", f"vLLM knows no {ARCHITECTURE}", "reinstall vLLM and kimi-vllm")
    resolved = entry.load_model_cls()
    found = f"{resolved.__module__}.{resolved.__qualname__}"
    if resolved.__module__.split(".")[0] != PLUGIN:
        return Finding("Model class", "FAIL", f"{found}: vLLM's own model would serve", "fix the other failures first")
    return Finding("Model class", "OK", found)


def check_kernels() -> Finding:
    """The implementation of the KDA kernels for this device."""
    from kimi_vllm.kernels.dispatch import load_backend

    try:
        return Finding("KDA kernels", "OK", f"{_device_type()}: {load_backend(_device_type()).name}")
    except RuntimeError as error:
        return Finding("KDA kernels", "FAIL", str(error), "see the message; KIMI_VLLM_DISABLE=1 leaves it to vLLM")


def check_quantised_weights() -> Finding:
    """Quantised checkpoints that this CPU does not support."""
    if _device_type() != "cpu":
        return Finding("Quantised weights", "OK", "as vLLM supports them on this device")
    from kimi_vllm.cpu_quantization import instruction_sets, lacking_for

    lacking = lacking_for(instruction_sets())
    refused = [f"no {needed}: {kind} are refused" for kind, needed in lacking.items()]
    return Finding("Quantised weights", "OK", "; ".join(["int8 and FP8 with a scale per output are served", *refused]))


def check_threads() -> Finding:
    """Threads of torch, which also run the CPU kernels."""
    if _device_type() != "cpu":
        return Finding("CPU threads", "OK", "not used on this device")
    import torch

    cores = len(os.sched_getaffinity(0))
    found = f"{torch.get_num_threads()} threads on {cores} cores"
    if torch.get_num_threads() > cores:
        return Finding("CPU threads", "WARN", found, f"export OMP_NUM_THREADS={cores}")
    return Finding("CPU threads", "OK", found)


def check_compiler() -> Finding:
    """The C++ compiler, which torch.compile needs on CPUs."""
    wanted = os.environ.get("CXX", "g++")
    path = shutil.which(wanted)
    if path is None:
        fix = "apt-get install g++, or serve with --enforce-eager"
        return Finding("C++ compiler", "WARN", f"{wanted} not found: torch.compile will fail", fix)
    return Finding("C++ compiler", "OK", path)


def check_intrusions() -> Finding:
    """What the plugin changes in other packages, or uses of them although it is private; see `kimi_vllm.intrusions`."""
    from kimi_vllm.intrusions import INTRUSIONS

    return Finding("Intrusions", "OK", "; ".join(intrusion.what for intrusion in INTRUSIONS))


def _plugin_entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group="vllm.general_plugins"))


def _device_type() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_processor,
    check_shared_memory,
    check_compiler,
    check_environment,
    check_entry_point,
    check_torch,
    check_vllm,
    check_vllm_command,
    check_triton,
    check_nccl,
    check_model_class,
    check_kernels,
    check_quantised_weights,
    check_threads,
    check_intrusions,
)
