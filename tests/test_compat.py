"""What we use of vLLM is there; and the check that says so can say no."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("compat", Path(__file__).parents[1] / "requirements" / "compat.py")
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)

VLLM = Path(importlib.util.find_spec("vllm").origin).parents[1]
MANAGER = "vllm/v1/core/single_type_kv_cache_manager.py"
POOL = "vllm/v1/core/block_pool.py"


def test_the_installed_vllm_has_all_we_use():
    assert list(compat.problems(compat.Sources("installed", VLLM))) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        (
            MANAGER,
            "def take_new_block_ids",
            "def take_ids",
            "SingleTypeKVCacheManager.take_new_block_ids: not found",
        ),
        (MANAGER, "drop_eagle_block: bool,", "drop_last: bool,", "find_longest_cache_hit: expected"),
        (POOL, "class BlockPool:", "class PagePool:", "from vllm.v1.core.block_pool import BlockPool"),
    ],
)
def test_a_change_in_vllm_is_reported_by_name(file, old, new, problem):
    class Changed(compat.Sources):
        def _read(self, path):
            source = super()._read(path)
            return source.replace(old, new) if path == file and source else source

    found = list(compat.problems(Changed("changed", VLLM)))
    assert any(problem in line for line in found), found
