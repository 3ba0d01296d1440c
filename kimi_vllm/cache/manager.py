"""Adapter between vLLM's scheduler and the slots: a cache manager with a pool of slots, whose blocks are pages' too.

vLLM keeps a table of blocks per request and cache group. In the state group, entry i is the slot with the state after
min((i + 1)·block_size, n) tokens, or the null slot where no state was kept. The last entry is the *live* slot. When a
request enters its next block it moves to a fresh slot, and the slot that it leaves holds the state at the boundary: an
immutable checkpoint, made without copying. Workers look up their slots in the same table (`metadata.py`).

A slot costs as many blocks of vLLM's pool as a state has, and vLLM is asked for them as for pages. When they run out, a
new request waits and a running one keeps writing where it is, unless another request resumes from that very slot: then
somebody is preempted, as where pages have run out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from kimi_vllm.cache.arena import ArenaPool
from kimi_vllm.cache.checkpoints import boundaries_to_keep
from kimi_vllm.cache.eviction import Eviction
from kimi_vllm.cache.layout import num_slots
from kimi_vllm.cache.slot_pool import SlotPool
from kimi_vllm.cache.slots import NULL_SLOT

GROWING = 2
"""Of so many running requests, one is expected to need a page before another ends."""


@dataclass(frozen=True, kw_only=True)
class KDAStateSpec(AttentionSpec):
    """The state group in vLLM's cache configuration: a table of slot ids; a slot has blocks of the shared pool.

    It copies the page of the MLA layer beside it, because vLLM enlarges the attention block where pages are unequal.

    Attributes:
        state_blocks: Blocks of a slot, on the pipeline stage that needs the most.
        num_host_blocks: Blocks that fit into host memory on every rank.
        checkpoint_interval, eviction: See `KimiOptions`.
        window: See `window.window_of`.
    """

    dcp_sharded: bool = False
    state_blocks: int = 0
    num_host_blocks: int = 0
    checkpoint_interval: int = 0
    eviction: Eviction = "value"
    window: int = 0

    @classmethod
    def beside(cls, attention: AttentionSpec, **values: Any) -> Self:
        """The spec beside the given MLA layers; `values` are the attributes above."""
        page: dict[str, Any] = {
            field.name: getattr(attention, field.name) for field in fields(AttentionSpec) if field.init
        }
        page["dcp_sharded"] = False
        return cls(**page, **values)

    @property
    def uses_slot_mapping(self) -> bool:
        """False: a token has no place of its own in a state."""
        return False

    @property
    def block_table_token_alignment(self) -> int | None:
        """None: entries are looked up one by one, so rows need no padding."""
        return None

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """A state for one request, and with prefix caching the one that it resumes from."""
        states = 2 if vllm_config.cache_config.enable_prefix_caching else 1
        return int(states * self.state_blocks * self.page_size_bytes)


class KDAStateManager(SingleTypeKVCacheManager):
    """Decides step by step which slots a request reads and writes, in the scheduler's process.

    Attributes:
        scheduling: Whether a step is being scheduled; what is published at other times has been written.
    """

    block_pool: SlotPool

    def __init__(self, kv_cache_spec: KDAStateSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        # More pages than there are means "not now", as for Mamba's manager.
        self._not_now: int = block_pool.num_gpu_blocks + 1
        self._state_blocks = kv_cache_spec.state_blocks
        self.block_pool = SlotPool(
            num_slots(block_pool.num_gpu_blocks, kv_cache_spec.state_blocks),
            kv_cache_spec.state_blocks,
            block_pool.hash_block_size,
            self.block_size,
            kv_cache_spec.num_host_blocks,
            kv_cache_spec.eviction,
        )
        self._null_block = self.block_pool.null_block
        self._interval = kv_cache_spec.checkpoint_interval
        self._new_entries: dict[str, tuple[int, list[KVCacheBlock]]] = {}
        self._num_retired: dict[str, int] = {}
        self._rolling: dict[str, tuple[int, KVCacheBlock, Any]] = {}
        # It begins with a prefix hit, in the call that allocates its blocks.
        self._resuming: str | None = None
        self._expected_pages = self._step_pages = 0
        # Published while a step is being scheduled, so written only when that step runs.
        self._unsettled: set[int] = set()
        self.scheduling = True

    def share(self, arena: ArenaPool, pages: SingleTypeKVCacheManager) -> None:
        """States come out of this pool, which the pages of this manager come out of. Before the first request.

        A hit's pages are referenced before the states and pages that it needs evict anything.
        """
        assert pages.kv_cache_group_id < self.kv_cache_group_id
        self.block_pool.share(arena)
        self._arena, self._page_tables = arena, pages.req_to_blocks

    def expect(self, num_tokens: int, step_tokens: int) -> None:
        """Say, before a step is scheduled, what running requests are about to need.

        Args:
            num_tokens: Tokens of theirs that are known and not computed.
            step_tokens: The most tokens that a step may have.
        """
        self._expected_pages = cdiv(num_tokens, self.block_size)
        self._step_pages = cdiv(step_tokens, self.block_size)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: SlotPool,  # type: ignore[override]
        kv_cache_spec: KDAStateSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix of at most `max_length` tokens with a state at its end.

        Returns:
            Per group, null entries followed by the checkpoint; and the length of the prefix in tokens.
        """
        block_size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, block_size)
        num_blocks = block_pool.longest(hashes, max_length // block_size)
        while num_blocks:
            length = num_blocks * block_size
            found = block_pool.get_cached_block(hashes[num_blocks - 1], kv_cache_group_ids)
            if found and not length % alignment_tokens:
                return tuple([block_pool.null_block] * (num_blocks - 1) + [block] for block in found), length
            num_blocks = block_pool.longest(hashes, num_blocks - 1)
        return tuple([] for _ in kv_cache_group_ids), 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks of the states that this step cannot do without; or more than there are: "not now"."""
        table = self.req_to_blocks.get(request_id)
        if table:
            if cdiv(num_tokens_main_model, self.block_size) <= len(table):
                return 0
            return 0 if self._can_stay(table) else self._state_blocks
        wanted = 1
        if new_computed_blocks:
            checkpoint = new_computed_blocks[-1]
            if checkpoint.block_id in self._unsettled:
                # It is written in this very step: wait for the next one.
                return self._not_now
            # A state on the host is loaded into a slot of its own; an idle one can no longer be evicted for us.
            wanted += self.block_pool.is_on_host(checkpoint) or not self.block_pool.slots.references(
                checkpoint.block_id
            )
        return wanted * self._state_blocks + self._growth()

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Start a request's table with a prefix hit, reference the checkpoint that it resumes from, and load pages."""
        table = self.req_to_blocks[request_id]
        table.extend(new_computed_blocks)
        if table and self.block_pool.is_on_host(table[-1]):
            table[-1] = self.block_pool.load(table[-1], self.kv_cache_group_id)
        else:
            self.block_pool.touch(block for block in new_computed_blocks if not block.is_null)
        if table:
            self._arena.load_pages(self._page_tables[request_id])
        self._resuming = request_id if table else None
        self.num_cached_block[request_id] = len(new_computed_blocks)
        self._num_retired[request_id] = max(0, len(new_computed_blocks) - 1)  # all before the checkpoint are null

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """A slot of its own for the state that a session brings, wherever in a block it ends."""
        table = self.req_to_blocks[request_id]
        num_blocks = cdiv(num_local_computed_tokens + num_external_computed_tokens, self.block_size)
        table.extend([self._null_block] * (num_blocks - len(table) - 1))
        table.append(self.block_pool.take())
        self._resuming = None

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Extend the table to cover the step: null entries, then the slot that this step writes last.

        The scheduler turns the returned list into ids later; before that, `cache_blocks` turns null entries of it into
        checkpoints.
        """
        table = self.req_to_blocks[request_id]
        num_old = len(table)
        # Not for tokens that only a draft model looks ahead to: the last entry is the block in which the step ends.
        num_new = cdiv(num_tokens_main_model, self.block_size) - num_old
        if num_new <= 0:
            return []
        self._expected_pages -= num_new
        live = self._next_slot(table, resumes=request_id == self._resuming)
        self._resuming = None
        new = [self._null_block] * (num_new - 1) + [live]
        table.extend(new)
        self._new_entries[request_id] = (num_old, new)
        return new

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Choose and publish the boundaries passed by this step that are worth a slot.

        A boundary at which a step ends costs nothing: the request leaves that slot anyway. Of those only the latest
        stays published, so that a long prefill or decode does not evict all other checkpoints.
        """
        request_id, block_size = request.request_id, self.block_size
        num_cached, num_full = self.num_cached_block.get(request_id, 0), num_tokens // block_size
        if num_full <= num_cached and request_id not in self._new_entries:
            return
        table = self.req_to_blocks[request_id]
        kept = boundaries_to_keep(
            request.num_prompt_tokens,
            block_size,
            request.shared_prefix_boundary or 0,
            self._interval,
            start=num_cached * block_size,
            end=len(table) * block_size,
        )
        num_pages = cdiv(request.num_tokens, block_size) - len(table)
        self._add_checkpoints(request_id, table, kept, num_pages)
        hashes = resolve_block_hashes(request.block_hashes, self.block_pool.hash_block_size, block_size)
        for index in range(num_cached, num_full):
            block = table[index]
            if block.is_null:
                continue
            if not self.block_pool.publish(block, hashes, index + 1, self.kv_cache_group_id):
                continue
            if self.scheduling:
                self._unsettled.add(block.block_id)
            if (index + 1) * block_size not in kept:
                self._roll(request_id, index, hashes[index])
        self.num_cached_block[request_id] = max(num_full, num_cached)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Drop the request's references to states before the one that this step reads."""
        table = self.req_to_blocks.get(request_id)
        if not table:
            return
        first = self._num_retired.get(request_id, 0)
        last = min(max(0, processed_computed_tokens - 1) // self.block_size, len(table))
        if self.kv_cache_spec.window and self.enable_caching:
            # Drafts that turn out to count carry a request past boundaries that `cache_blocks` is told of later.
            last = min(last, self.num_cached_block.get(request_id, 0))
        for index in range(first, last):
            block, table[index] = table[index], self._null_block
            if not block.is_null:
                self.block_pool.free_blocks([block])
        self._num_retired[request_id] = max(first, last)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request and return the slots that it still references."""
        self._new_entries.pop(request_id, None)
        self._num_retired.pop(request_id, None)
        self._rolling.pop(request_id, None)
        blocks = [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]
        for block in blocks:
            if block.block_id in self._unsettled:
                # Preempted in the step that was to write it: the state will never exist.
                self._unsettled.discard(block.block_id)
                self.block_pool.withdraw(block)
        return blocks

    def take_new_block_ids(self) -> list[int]:
        """No pages to zero. Called when a step is complete, so what it published will be written."""
        self._unsettled.clear()
        self._new_entries.clear()
        return []

    def accessed_slots(self, request_id: str, first_token: int) -> tuple[int, tuple[int, ...]]:
        """The slot read and the slots written by a step that computes a request's tokens from `first_token` on."""
        table, block_size = self.req_to_blocks[request_id], self.block_size
        index = first_token // block_size
        if index == len(table) - 1:
            written: tuple[int, ...] = () if table[index].is_null else (table[index].block_id,)  # most decodes
        else:
            written = tuple([block.block_id for block in table[index:] if not block.is_null])
        if not first_token:
            return NULL_SLOT, written
        before = table[(first_token - 1) // block_size]
        # A request that could not leave its slot at a boundary has taken it along.
        return next(iter(written), NULL_SLOT) if before.is_null else before.block_id, written

    def _next_slot(self, table: list[KVCacheBlock], *, resumes: bool) -> KVCacheBlock:
        # Who resumes must leave the checkpoint. Without prefix caching nobody resumes from a boundary.
        if not table or resumes or not self._can_stay(table) or (self.enable_caching and self._has_room()):
            return self.block_pool.take()
        block, table[-1] = table[-1], self._null_block
        self.block_pool.withdraw(block)
        return block

    def _has_room(self, num_pages: int = 0) -> bool:
        """Whether a boundary may be kept: not in blocks that running requests are about to need.

        Steps in flight hold on to what they write, so the next chunk of a prompt could not evict it.

        Args:
            num_pages: Pages that the request needs beyond this step. It may have begun in it.
        """
        expected = min(max(self._expected_pages, num_pages, 0), self._step_pages)
        return self.block_pool.slots.can_take(1, reserve=self._growth() + expected)

    def _growth(self) -> int:
        """Blocks left for running requests, which may need their next page before a new one is through.

        One for every second: with none, memory filled to the last block means preempting at the next boundary; with one
        for each, half a hundredth less runs (`python -m serve.bench.cache fragmentation`).
        """
        return int(cdiv(len(self.req_to_blocks), GROWING))

    def _can_stay(self, table: list[KVCacheBlock]) -> bool:
        live = table[-1]
        return not live.is_null and self.block_pool.slots.references(live.block_id) == 1

    def _add_checkpoints(self, request_id: str, table: list[KVCacheBlock], kept: Iterable[int], num_pages: int) -> None:
        num_old, new = self._new_entries.pop(request_id, (0, []))
        for boundary in sorted(kept, reverse=True):
            index = boundary // self.block_size - 1
            inside = num_old <= index < num_old + len(new) - 1
            if inside and table[index].is_null and self._has_room(num_pages):
                table[index] = new[index - num_old] = self.block_pool.take()

    def _roll(self, request_id: str, index: int, key: Any) -> None:
        """Withdraw the request's previous step-end boundary, unless another request resumes from it."""
        table = self.req_to_blocks[request_id]
        previous = self._rolling.get(request_id)
        self._rolling[request_id] = (index, table[index], key)
        if previous is None:
            return
        old_index, block, old_key = previous
        slots = self.block_pool.slots
        # It may have been evicted and reused since: what is published under its key decides.
        others = slots.references(block.block_id) - (table[old_index] is block)
        if slots.find(old_key) == block.block_id and not others:
            self.block_pool.withdraw(block)


# vLLM registers its own specs into an empty registry only, and workers never do it explicitly. At import, because
# unpickling the spec in another process imports this module and runs nothing else.
KVCacheSpecRegistry._ensure_registered(None)
KVCacheSpecRegistry.register(KDAStateSpec, KDAStateManager, uniform_type_base_spec=KDAStateSpec)
