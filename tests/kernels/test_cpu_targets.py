"""The CPU kernels on processors that this machine is not: with fewer instructions they run, with more they compile.

And where what was compiled is kept.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from numba.core import config
from numba.core.caching import FunctionCache

from kimi_vllm.kernels.cpu import worker

HERE = Path(__file__).parent
COMPILE = """
from kimi_vllm.kernels.cpu import worker
assert all(worker.compile_worker(decode, 128) for decode in (True, False))
"""


def run(arguments: list[str], cpu: str, features: str, cache: Path) -> None:
    target = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | target, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_least_processor_computes_the_same(tmp_path: Path) -> None:
    """AVX2 without a fused multiply-add has the spec's numbers, within the same tolerances."""
    chosen = "elementary or many_rows or prefill_then_decode"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_cpu.py", "test_cpu_math.py", "-k", chosen]
    run(command, "haswell", "+avx2,+f16c,-fma", tmp_path)


@pytest.mark.parametrize("cpu", ["sapphirerapids", pytest.param("znver4", marks=pytest.mark.slow)])
def test_they_compile_for_wider_vectors(cpu: str, tmp_path: Path) -> None:
    run(["-c", COMPILE], cpu, "", tmp_path)


@pytest.mark.parametrize("by_user", [False, True], ids=["by-default", "NUMBA_CACHE_DIR"])
def test_compiled_code_is_kept_in_the_users_cache(
    by_user: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Path] = []

    def look(signature: str, cache: bool = False) -> Any:
        def decorate(function: Any) -> Any:
            found.append(Path(FunctionCache(function)._impl.locator.get_cache_path()))
            return SimpleNamespace(address=1)

        return decorate

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "given") if by_user else "")
    monkeypatch.setattr(worker, "cfunc", look)
    before = config.CACHE_LOCATOR_CLASSES
    worker.compile_worker(True, 64)
    [folder] = found
    assert folder.is_relative_to(tmp_path / ("given" if by_user else "user/numba"))
    assert before == config.CACHE_LOCATOR_CLASSES
