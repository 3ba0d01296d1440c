"""Packing for a machine without a registry: pieces and their manifest, pruned device code, metadata of a checkout."""

import struct
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kimi_vllm._vllm import SUPPORTED_VLLM

sys.path.insert(0, str(Path(__file__).parents[1] / "serve" / "gpu"))
import fatbin
import pack
import parts
import wheels

ROOT = Path(__file__).parents[1]
GPU = ROOT / "serve" / "gpu"
MARLIN, OTHER = b"_ZN6marlin6MarlinE", b"_Z5other"


def entry(kind: int, arch: int, kernel: bytes, size: int = 64) -> bytes:
    """Device code as nvcc stores it: a header of 64 bytes, then a payload that names its kernel."""
    mark = b".entry " if kind == fatbin.PTX else b".text."
    header = struct.pack("<HHIQI8xI", kind, 0x101, 64, size, 0, arch)
    return header.ljust(64, b"\0") + (mark + kernel + b"\0").ljust(size, b"\0")


def container(*entries: bytes) -> bytes:
    data = b"".join(entries)
    return struct.pack("<IHHQ", fatbin.CONTAINER_MAGIC, 1, 16, len(data)) + data


def library(path: Path, section: bytes) -> Path:
    """An ELF file with a table of three sections: none, .nv_fatbin, and their names."""
    names = b"\0.nv_fatbin\0.names\0"
    start = 64
    table = start + len(section) + len(names)
    rows = [(0, 0, 0), (1, start, len(section)), (12, start + len(section), len(names))]
    header = bytearray(b"\x7fELF\x02".ljust(64, b"\0"))
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, len(rows), 2)
    table_bytes = b"".join(struct.pack("<I20xQQ24x", *row) for row in rows)
    path.write_bytes(bytes(header) + section + names + table_bytes)
    return path


def kept(path: Path) -> list[list[tuple[int, int]]]:
    """Kind and architecture of every entry that a CUDA loader would see, container by container."""
    image = path.read_bytes()
    section = fatbin.find_section(image, fatbin.SECTION)
    assert section is not None
    found, at = [], section.start
    while at < section.stop:
        if image[at : at + 4] != struct.pack("<I", fatbin.CONTAINER_MAGIC):
            at += 8
            continue
        (size,) = struct.unpack_from("<Q", image, at + 8)
        found.append([(e.kind, e.arch) for e in fatbin._entries(image, at + 16, at + 16 + size)])
        at += 16 + size
    return found


def test_pruning_keeps_machine_code_of_the_architecture_or_the_newest_ptx_it_can_load(tmp_path):
    cubin, ptx = fatbin.CUBIN, fatbin.PTX
    section = b"".join([
        container(entry(cubin, 80, OTHER), entry(cubin, 90, OTHER), entry(ptx, 120, OTHER)),
        container(entry(ptx, 75, OTHER), entry(ptx, 80, OTHER), entry(ptx, 120, OTHER)),
        container(entry(cubin, 100, OTHER, size=256), entry(cubin, 120, OTHER, size=128)),
    ])  # fmt: skip
    path = library(tmp_path / "lib.so", section)
    before = path.stat().st_size
    assert fatbin.prune(path, 90) == {"cubin": 1, "ptx": 1, "foreign": 1}
    # The last container can not run on this architecture; it holds the smallest code of another one in the file.
    assert kept(path) == [[(cubin, 90)], [(ptx, 80)], [(cubin, 80)]]
    assert path.stat().st_size == before


def test_pruning_twice_is_pruning_once(tmp_path):
    path = library(tmp_path / "lib.so", container(entry(fatbin.CUBIN, 80, OTHER), entry(fatbin.CUBIN, 90, OTHER)))
    fatbin.prune(path, 90)
    once = path.read_bytes()
    fatbin.prune(path, 90)
    assert path.read_bytes() == once


def test_quantised_kernels_go_only_when_asked_and_only_where_alone(tmp_path):
    def section() -> bytes:
        mixed = entry(fatbin.CUBIN, 90, MARLIN + b"\0.text." + OTHER)
        return container(entry(fatbin.CUBIN, 80, OTHER), entry(fatbin.CUBIN, 90, MARLIN)) + container(mixed)

    asked, not_asked = library(tmp_path / "a.so", section()), library(tmp_path / "b.so", section())
    assert fatbin.prune(asked, 90, drop_quantised=True) == {"quantised": 1, "cubin": 1}
    assert kept(asked) == [[(fatbin.CUBIN, 80)], [(fatbin.CUBIN, 90)]]
    assert fatbin.prune(not_asked, 90) == {"cubin": 2}


@pytest.mark.parametrize("content", [b"no ELF file", b""])
def test_what_has_no_device_code_is_left_alone(tmp_path, content):
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    assert not fatbin.prune(path, 90)
    assert path.read_bytes() == content


def test_device_code_in_an_unknown_form_is_an_error(tmp_path):
    path = library(tmp_path / "lib.so", container(entry(7, 90, OTHER)))
    with pytest.raises(ValueError, match=r"unknown fatbin entry.*kind 7"):
        fatbin.prune(path, 90)


@pytest.fixture
def packed(tmp_path):
    """Two archives with a folder in common, the second one cut into pieces, and the tree they were made from."""
    tree, folder = tmp_path / "tree", tmp_path / "parts"
    folder.mkdir()
    contents = {"vllm/a.py": b"a", "vllm/lib/c.so": bytes(range(256)) * 40, "vllm/lib/d.py": b"", "e.txt": b"e" * 5000}
    for name, content in contents.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    groups = {"python": ["vllm/a.py", "e.txt"], "native": ["vllm/lib/c.so", "vllm/lib/d.py"]}
    pieces = []
    for (name, names), size in zip(groups.items(), (10**6, 100), strict=True):
        archive = folder / f"{name}.tar.xz"
        parts.write_archive(tree, names, archive)
        pieces += parts.cut(archive, size)
    parts.write_manifest(folder, pieces, ["a note"])
    return folder, contents


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and parts.DONE not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_what_is_packed_is_unpacked(packed, tmp_path):
    folder, contents = packed
    names = [piece.name for piece in parts.read_manifest(folder)]
    assert names[:3] == ["python.tar.xz", "native.tar.xz.00", "native.tar.xz.01"]
    assert max(piece.size for piece in parts.read_manifest(folder)[1:]) <= 100
    assert parts.unpack(folder, tmp_path / "target") == ["python.tar.xz", "native.tar.xz"]
    assert files(tmp_path / "target") == contents


def test_what_is_there_is_not_unpacked_again_and_need_not_travel_again(packed, tmp_path):
    folder, contents = packed
    parts.unpack(folder, tmp_path / "target")
    for piece in parts.read_manifest(folder):
        (folder / piece.name).unlink()
    assert parts.unpack(folder, tmp_path / "target") == []
    assert files(tmp_path / "target") == contents


def test_the_same_files_give_the_same_bytes(packed):
    folder, _ = packed
    again = folder / "again.tar.xz"
    parts.write_archive(folder.parent / "tree", ["vllm/a.py", "e.txt"], again)
    assert again.read_bytes() == (folder / "python.tar.xz").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "native.tar.xz.01: missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "native.tar.xz.01: 99 bytes instead of 100"),
        (lambda path: path.write_bytes(b"x" * 100), "native.tar.xz.01: the checksum differs"),
    ],
)
def test_a_damaged_piece_is_named_and_nothing_is_unpacked(packed, tmp_path, damage, message):
    folder, _ = packed
    damage(folder / "native.tar.xz.01")
    target = tmp_path / "target"
    done = subprocess.run(
        [sys.executable, GPU / "parts.py", folder, target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert files(target) == {}


def test_clearing_removes_the_earlier_pack_and_nothing_else(packed):
    folder, _ = packed
    (folder / "mine.txt").write_text("keep")
    pack._clear(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def wheel(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_wheels_are_laid_out_as_pip_would_and_grouped(tmp_path):
    vllm = wheel(
        tmp_path / "vllm-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl",
        **{
            "vllm/a.py": b"",
            "vllm/_C.so": b"",
            "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": b"",
            "vllm/configs/E=1,device_name=AMD.json": b"",
            "vllm/configs/E=1,device_name=NVIDIA_H200.json": b"",
            "vllm-0.32.0.dist-info/METADATA": b"",
            "vllm-0.32.0.dist-info/RECORD": b"",
        },
    )
    other = wheel(
        tmp_path / "other-1-py3-none-any.whl",
        **{"other-1.data/purelib/other.py": b"", "other-1.data/scripts/other": b"", "other-1.dist-info/RECORD": b""},
    )
    groups = pack.stage_wheels([vllm, other], tmp_path / "pruned", pack.Cut(arch=90, small=False))
    assert groups == {
        "native": ["vllm/_C.so"],
        "vllm": ["vllm-0.32.0.dist-info/METADATA", "vllm/configs/E=1,device_name=NVIDIA_H200.json", "vllm/a.py"],
        "packages": ["other-1.dist-info/RECORD", "other.py"],
    }
    whole = pack.stage_wheels([vllm], tmp_path / "whole", None)
    assert sum(map(len, whole.values())) == 7


def test_a_wheel_can_not_write_outside_its_folder(tmp_path):
    bad = wheel(tmp_path / "bad-1-py3-none-any.whl", **{"../evil.py": b""})
    with pytest.raises(ValueError, match="outside the folder"):
        wheels.unzip(bad, tmp_path / "site")


def test_a_wheel_is_found_by_version_python_and_platform(tmp_path):
    names = [
        "a-1-cp312-cp312-manylinux_2_17_x86_64.whl",
        "b-1-cp39-abi3-manylinux_2_31_x86_64.whl",
        "c-1-py3-none-any.whl",
    ]
    names += [
        "d-1-cp311-cp311-manylinux_2_17_x86_64.whl",
        "e-1-cp312-cp312-macosx_11_0_arm64.whl",
        "f-2-py3-none-any.whl",
    ]
    (tmp_path / "wheels").mkdir()
    for name in names:
        (tmp_path / "wheels" / name).touch()
    tags = wheels.supported_tags("3.12")
    assert [letter for letter in "abcdef" if wheels.find_wheel(letter, "1", tags, tmp_path)] == ["a", "b", "c"]


def test_plugin_info_is_what_an_installation_says(tmp_path):
    wheels.write_plugin_info(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    assert found.name == "kimi-vllm"
    points = {(point.group, point.name, point.value) for point in found.entry_points}
    assert ("vllm.general_plugins", "kimi_vllm", "kimi_vllm:register") in points
    installed = next(iter(distributions(name="kimi-vllm")))
    assert points == {(point.group, point.name, point.value) for point in installed.entry_points}
    assert found.version == installed.version


def test_the_lock_pins_what_is_packed_and_what_the_plugin_needs():
    lock = wheels.read_lock(pack.LOCK)
    assert set(wheels.read_names(pack.PACKAGES)) <= set(lock)
    assert lock["vllm"] in SUPPORTED_VLLM
    assert lock["transformers"] == wheels.read_lock(ROOT / "requirements" / "cpu.lock")["transformers"]
    needed = [
        Requirement(line) for line in next(iter(distributions(name="kimi-vllm"))).requires or [] if ";" not in line
    ]
    assert [r.name for r in needed if lock.get(r.name, "0") not in r.specifier] == []
