"""Wheels for another machine: which ones, from where, and how they become a folder for PYTHONPATH."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("KIMI_GPU_CACHE", "~/.cache/kimi-gpu")).expanduser()
# glibc 2.35 and older: Ubuntu 22.04 and newer, Debian 12 and newer.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
PLUGIN_SOURCES = ("kimi_vllm", "kernels", "pyproject.toml", "README.md", "LICENSE")
DATA_FOLDER = re.compile(r"^[^/]+\.data/(?P<kind>[^/]+)/(?P<path>.+)$")


def read_lock(path: Path) -> dict[str, str]:
    """Versions by canonical name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def read_names(path: Path) -> list[str]:
    """Canonical names, one a line."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [canonicalize_name(line) for line in lines if line]


def wheels_of(pins: dict[str, str], python: str) -> list[Path]:
    """The wheels of exact versions, downloaded into the cache unless one that fits lies there.

    Args:
        pins: versions by canonical name.
        python: version of the other machine's Python, like ``3.12``.

    Raises:
        subprocess.CalledProcessError: pip found no such wheel; it has said so.
    """
    tags = supported_tags(python)
    found = {name: find_wheel(name, version, tags) for name, version in pins.items()}
    missing = [f"{name}=={pins[name]}" for name, wheel in found.items() if wheel is None]
    if missing:
        _download(missing, python)
        found = {name: find_wheel(name, version, tags) for name, version in pins.items()}
    return [wheel for wheel in found.values() if wheel is not None]


def supported_tags(python: str) -> frozenset[Tag]:
    """What a wheel's name may say for it to be installable on Linux x86_64 under a version of Python."""
    major, minor = map(int, python.split("."))
    return frozenset(
        [*cpython_tags((major, minor), platforms=PLATFORMS), *compatible_tags((major, minor), platforms=PLATFORMS)]
    )


def find_wheel(name: str, version: str, tags: frozenset[Tag], cache: Path = CACHE) -> Path | None:
    """A wheel in the cache, in whichever of its folders."""
    for path in sorted([*cache.glob("*.whl"), *cache.glob("*/*.whl")]):
        found, release, _, its_tags = parse_wheel_filename(path.name)
        if found == name and str(release) == version and its_tags & tags:
            return path
    return None


def _download(requirements: Sequence[str], python: str) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    options += [part for platform in PLATFORMS for part in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(CACHE / "wheels")]
    subprocess.run([*command, *requirements], check=True)


def build_plugin(target: Path) -> Path:
    """Build the wheel of this checkout, committed or not.

    From a copy: a build leaves files behind, and packs what an earlier build left.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in PLUGIN_SOURCES:
            source = ROOT / name
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, Path(folder, name), symlinks=True, ignore=ignore)
            else:
                shutil.copy(source, folder)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), folder]
        subprocess.run(command, check=True)
    (wheel,) = target.glob("kimi_vllm-*.whl")
    return wheel


def unzip(wheel: Path, target: Path, leave_out: Iterable[str] = ()) -> list[str]:
    """Lay a wheel out as pip would, without the scripts and headers, which PYTHONPATH does not reach.

    Metadata (``*.dist-info``) is kept: entry points and versions are read from it.

    Args:
        wheel: the wheel.
        target: the folder that goes on PYTHONPATH.
        leave_out: regular expressions, searched for in each file's path.

    Returns:
        The files written, relative to `target`.
    """
    patterns = [re.compile(pattern) for pattern in leave_out]
    written = []
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename
            if data := DATA_FOLDER.match(name):
                if data["kind"] not in ("purelib", "platlib"):
                    continue
                name = data["path"]
            if member.is_dir() or any(pattern.search(name) for pattern in patterns):
                continue
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{wheel.name}: {name} would be written outside the folder")
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
            written.append(name)
    return written


def write_plugin_info(target: Path, pyproject: Path = ROOT / "pyproject.toml") -> Path:
    """Write the metadata that an installation of this checkout would have: name, version, entry points.

    Python finds the package itself on PYTHONPATH; vLLM finds plugins by metadata only.

    Returns:
        The ``.dist-info`` folder, in `target`.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    name = str(project["name"]).replace("-", "_")
    folder = target / f"{name}-{project['version']}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    metadata = ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {project['version']}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
    (folder / "METADATA").write_text("\n".join(metadata) + "\n")
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    return folder
