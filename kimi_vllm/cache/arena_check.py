"""Verifies that the blocks of an `ArenaPool` are what they are taken for. For tests, and `KIMI_VLLM_CHECK_MEMORY`."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_block_hash

from kimi_vllm.cache.arena import ArenaPool, Kind


def check_arena(arena: ArenaPool, tables: Iterable[Sequence[KVCacheBlock]]) -> None:
    """Verify that every block has one kind and one owner; raises AssertionError.

    Args:
        tables: The pages of all requests, and of those whose blocks are still to be freed.
    """
    arena._settle()
    owner: dict[int, Kind] = {arena.null_block.block_id: Kind.PAGE}

    def own(ids: Collection[int], kind: Kind) -> None:
        others = len(owner)
        owner.update(dict.fromkeys(ids, kind))
        assert len(owner) == others + len(ids), f"a block is {kind.name} and something else, among {sorted(ids)}"

    for kind, queue in (
        (Kind.CLEAN, arena.free_block_queue),
        (Kind.LOOSE, arena._loose),
        (Kind.KEPT, arena._kept),
    ):
        members = queue.get_all_free_blocks()
        assert len(members) == queue.num_free_blocks, f"{kind.name}: {len(members)} blocks are not counted"
        own([block.block_id for block in members], kind)
        for block in members:
            assert block.ref_cnt == 0, f"block {block.block_id} is {kind.name} and referenced"
            assert (block.block_hash is None) == (kind == Kind.CLEAN), f"{kind.name}: block {block.block_id}"
    references = Counter(block.block_id for table in tables for block in table if not block.is_null)
    own(references.keys(), Kind.PAGE)
    for block_id, count in references.items():
        assert arena.blocks[block_id].ref_cnt == count, f"page {block_id} has {count} references"
    own(arena._host, Kind.CLEAN)
    spilled = {block_id for block_id, kind in enumerate(arena._kinds) if kind == Kind.SPILLED}
    own(spilled, Kind.SPILLED)
    for block_id in (*arena._host, *spilled):
        block = arena.blocks[block_id]
        assert block.ref_cnt == 0, f"block {block_id} is in host memory and referenced"
        assert (block.block_hash is not None) == (block_id in spilled), f"block {block_id} is spilled, or is not"
    for ids in arena.states.host_backing.values():
        own(ids, Kind.STATE)
        assert all(arena.blocks[block_id].block_hash is None for block_id in ids), "a host slot's block is a page"
    for slot, ids in arena.states.backing.items():
        assert len(ids) == arena.states.state_blocks, f"slot {slot} has {len(ids)} blocks"
        own(ids, Kind.STATE)
        for block_id in ids:
            block = arena.blocks[block_id]
            assert (block.ref_cnt, block.block_hash) == (1, None), f"block {block_id} is slot {slot}'s and a page"
    lost = set(range(len(arena.blocks))) - owner.keys()
    assert not lost, f"nobody owns the blocks {sorted(lost)}"
    wrong = [block_id for block_id, kind in enumerate(arena._kinds) if owner[block_id] != kind]
    assert not wrong, f"blocks {wrong} are not what they are taken for"
    assert arena._needed == Counter(arena.states.covered()), "pages are kept for other states than there are"
    _check_cached(arena, owner)


def _check_cached(arena: ArenaPool, owner: dict[int, Kind]) -> None:
    cached: dict[Any, list[Kind]] = {}
    for block_id, kind in owner.items():
        block = arena.blocks[block_id]
        if kind not in (Kind.CLEAN, Kind.STATE) and block.block_hash is not None:
            cached.setdefault(block.block_hash, []).append(kind)
            assert block in arena._copies(block.block_hash), f"cached block {block.block_id} cannot be found"
    for key, kinds in cached.items():
        kept = kinds.count(Kind.KEPT)
        spilled = kinds.count(Kind.SPILLED)
        if get_block_hash(key) in arena._needed:
            assert kept + spilled == 1 or (kept + spilled == 0 and Kind.PAGE in kinds), (
                f"{kept} copies kept and {spilled} spilled of a page that is needed"
            )
        else:
            assert not kept + spilled, "a page is kept that no state needs"
