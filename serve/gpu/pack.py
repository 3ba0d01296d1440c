"""Pack vLLM, what it needs and this plugin for a GPU machine that reaches no package registry; see README.md."""

import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import fatbin
import typer
from packaging.utils import canonicalize_name
from parts import MANIFEST, Piece, cut, read_manifest, write_archive, write_manifest
from wheels import CACHE, ROOT, build_plugin, read_lock, read_names, unzip, wheels_of, write_plugin_info

HERE = Path(__file__).parent
LOCK = ROOT / "requirements" / "cuda.lock"
PACKAGES = HERE / "packages.txt"
CARRIED = ("install.sh", "parts.py", "check.py", "smoke.py")  # what the GPU machine runs
SITE = "site"
HOPPER = 90
# The checksums of an installation, which no longer hold, and C++ headers of libraries that compile kernels when asked.
NEVER_NEEDED = (r"^vllm-[^/]+\.dist-info/RECORD$", r"^vllm/.*\.(hpp|cuh|h|cu)$", r"^vllm/vllm-rs$")
# Hopper serves Kimi Linear without these: FlashAttention 2 (it has 3), what only Blackwell has, sparse attention of
# DeepSeek, FP8 matrix products of DeepGEMM, API pages, and launch parameters of other GPUs and of Helion kernels.
NOT_ON_HOPPER = (
    r"^vllm/vllm_flash_attn/_vllm_fa2_C", r"^vllm/_qutlass_C", r"^vllm/third_party/fmha_sm100/", r"^vllm/_deepselect_C",
    r"^vllm/third_party/deep_gemm/", r"^vllm/entrypoints/serve/instrumentator/static/",
    r"^vllm/kernels/helion/configs/", r"/configs/.*device_name=(?!NVIDIA_G?H\d).*\.json$",
)  # fmt: skip

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@dataclass(frozen=True, slots=True)
class Cut:
    """How vLLM's CUDA code is made smaller.

    Attributes:
        arch: the compute capability that is kept, without the dot.
        small: whether kernels for quantised weights go too.
    """

    arch: int
    small: bool

    def leave_out(self) -> tuple[str, ...]:
        """Patterns of the files that are not packed."""
        return NEVER_NEEDED + (NOT_ON_HOPPER if self.arch == HOPPER else ())


@app.command()
def pack(
    out: Annotated[Path, typer.Argument(help="Folder for the parts; an earlier pack in it is replaced.")],
    vllm: Annotated[str, typer.Option(help="Version of vLLM; by default the lock's.")] = "",
    python: Annotated[str, typer.Option(help="Version of Python on the GPU machine.")] = "3.12",
    arch: Annotated[int, typer.Option(help="Compute capability of its GPU, without the dot.")] = HOPPER,
    prune: Annotated[bool, typer.Option(help="Leave out what this architecture does not run.")] = True,
    small: Annotated[bool, typer.Option(help="Leave out kernels for quantised weights too.")] = False,
    plugin: Annotated[bool, typer.Option(help="Pack kimi-vllm as it is in this checkout.")] = True,
    add: Annotated[list[str] | None, typer.Option(help="One more package of the lock; may be repeated.")] = None,
    max_mib: Annotated[int, typer.Option(min=1, help="Largest size of a piece.")] = 60,
) -> None:
    """Download wheels, prune them, and write pieces with a MANIFEST."""
    if small and not prune:
        raise typer.BadParameter("--small needs pruning; leave out --no-prune")
    if small and shutil.which("zstd") is None:
        raise typer.BadParameter("--small reads the names of kernels with the program zstd (apt-get install zstd)")
    pins = _pins(vllm, add or [])
    how = Cut(arch, small) if prune else None
    CACHE.mkdir(parents=True, exist_ok=True)
    _clear(out)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="pack-") as folder:
        stage = Path(folder)
        site = stage / SITE
        groups = stage_wheels(wheels_of(pins, python), site, how)
        if plugin:
            groups["kimi-vllm"] = unzip(build_plugin(stage), site)
        listed = _write(site, groups, out, max_mib << 20, _notes(pins, python, how, plugin=plugin))
    for name in CARRIED:
        shutil.copy(HERE / name, out)
    for piece in listed:
        print(f"{piece.size / 2**20:7.2f} MiB  {piece.name}")
    print(f"{sum(piece.size for piece in listed) / 2**20:7.2f} MiB  in {len(listed)} pieces, {out}")


@app.command()
def plugin_info(folder: Annotated[Path, typer.Argument(help="Put this and the checkout on PYTHONPATH.")]) -> None:
    """Write the metadata by which vLLM finds the plugin in a checkout that is not installed."""
    print(write_plugin_info(folder))


def stage_wheels(wheels: Sequence[Path], site: Path, how: Cut | None) -> dict[str, list[str]]:
    """Unzip wheels into one folder and prune vLLM's.

    Returns:
        The files, relative to `site`, by the archive they go to: vLLM's libraries, the rest of vLLM, other packages.
    """
    groups: dict[str, list[str]] = {"native": [], "vllm": [], "packages": []}
    for wheel in wheels:
        if not wheel.name.startswith("vllm-"):
            groups["packages"] += unzip(wheel, site)
            continue
        for name in unzip(wheel, site, how.leave_out() if how else ()):
            groups["native" if name.endswith(".so") else "vllm"].append(name)
    if how is not None:
        for name in groups["native"]:
            _prune_library(site / name, how)
    # Like beside like: a solid stream finds repetitions the sooner the closer they are.
    groups["vllm"].sort(key=lambda name: (Path(name).suffix, name))
    groups["packages"].sort(key=lambda name: (Path(name).suffix, Path(name).name, name))
    return groups


def _prune_library(library: Path, how: Cut) -> None:
    counts: Counter[str] = fatbin.prune(library, how.arch, drop_quantised=how.small)
    if not counts:
        return
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-all", library], check=True)
    print(f"{library.name}: {', '.join(f'{count} {what}' for what, count in sorted(counts.items()))}")


def _pins(vllm: str, add: Sequence[str]) -> dict[str, str]:
    lock = read_lock(LOCK)
    names = ["vllm", *read_names(PACKAGES), *map(canonicalize_name, add)]
    if unknown := [name for name in names if name not in lock]:
        raise typer.BadParameter(f"{LOCK.name} has no {', '.join(unknown)}")
    pins = {name: lock[name] for name in names}
    return {**pins, "vllm": vllm or pins["vllm"]}


def _clear(out: Path) -> None:
    """Remove an earlier pack, and nothing else."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / MANIFEST).is_file():
        for piece in read_manifest(out):
            (out / piece.name).unlink(missing_ok=True)
        (out / MANIFEST).unlink()


def _write(site: Path, groups: dict[str, list[str]], out: Path, max_bytes: int, notes: Sequence[str]) -> list[Piece]:
    archives = [out / f"{name}.tar.xz" for name in groups]
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_archive, [site] * len(archives), groups.values(), archives))
    pieces = [piece for archive in archives for piece in cut(archive, max_bytes)]
    return write_manifest(out, pieces, notes)


def _notes(pins: dict[str, str], python: str, how: Cut | None, *, plugin: bool) -> list[str]:
    cuda = "CUDA code as shipped"
    if how is not None:
        cuda = f"CUDA code for sm_{how.arch}" + (" without kernels for quantised weights" if how.small else "")
    packages = [f"{name} {version}" for name, version in pins.items()]
    return [f"Python {python}, Linux x86_64; {cuda}", f"kimi-vllm: {'packed' if plugin else 'not packed'}", *packages]


if __name__ == "__main__":
    app()
