"""The CPU kernels on processors that this machine is not: with fewer instructions they run, with more they compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILE = """
from kimi_vllm.kernels import cpu_worker
assert all(cpu_worker.compile_worker(decode, 128) for decode in (True, False))
"""


def run(arguments: list[str], cpu: str, features: str, cache: Path) -> None:
    target = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | target, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_least_processor_computes_the_same(tmp_path: Path) -> None:
    """AVX2 without a fused multiply-add has the spec's numbers, within the same tolerances."""
    chosen = "elementary or low_precision or many_rows or prefill_then_decode"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_cpu.py", "-k", chosen]
    run(command, "haswell", "+avx2,+f16c,-fma", tmp_path)


@pytest.mark.parametrize("cpu", ["sapphirerapids", "znver4"])
def test_they_compile_for_wider_vectors(cpu: str, tmp_path: Path) -> None:
    run(["-c", COMPILE], cpu, "", tmp_path)
