"""What a number means nothing without: the machine, versions, the commit, the time."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from kimi_vllm._vllm import installed_vllm


def facts(*packages: str) -> dict[str, Any]:
    """Processor and cores or GPU and driver; versions of Python, vLLM and these packages; commit, time."""
    import torch

    from kimi_vllm.kernels.bench.common import machine

    device: dict[str, Any] = {"device": processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {
            "device": properties.name,
            "device_bytes": properties.total_memory,
            "driver": nvidia_smi("driver_version").split(", ")[0],
            "cuda": torch.version.cuda,
            "cores": os.cpu_count(),
        }
    return {**device, **machine(*packages), "vllm": " ".join(installed_vllm() or ("not installed",))}


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def nvidia_smi(field: str) -> str:
    """What ``nvidia-smi`` says of every GPU, or nothing where there is none. It takes no memory of theirs."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(done.stdout.split("\n")).strip(", ")
