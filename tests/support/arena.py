"""Requests on a pool of blocks, without vLLM's scheduler and managers."""

from types import SimpleNamespace

from vllm.v1.core.block_pool import BlockPool

from kimi_vllm.cache.arena import ArenaPool, Kind
from kimi_vllm.cache.arena_check import check_arena
from kimi_vllm.cache.slot_pool import SlotPool

BLOCK, STATE, GROUP = 4, 3, 0


def make_pool(num_blocks, host=0, caching=True, eviction="value"):
    """An arena of so many blocks beside the null block and so many in host memory, and the slots that share it."""
    arena = ArenaPool.like(BlockPool(1 + num_blocks, caching, BLOCK, enable_kv_cache_events=True), GROUP, host)
    slots = SlotPool(1 + num_blocks // STATE, STATE, BLOCK, BLOCK, host, eviction)
    slots.share(arena)
    return arena, slots


class Request(SimpleNamespace):
    """As much of vLLM's request as a pool looks at; `tokens` decide the hashes."""

    def __init__(self, tokens):
        hashes = [repr(tokens[: end + BLOCK]).encode().ljust(32) for end in range(0, len(tokens) - BLOCK + 1, BLOCK)]
        super().__init__(block_hashes=hashes, all_token_ids=tokens, lora_request=None, mm_features=[], session_id=None)
        self.cache_salt = self.prompt_embeds = None
        self.pages, self.states = [], []


class Traffic:
    """Requests on a pool: their pages and slots, as the managers would hold them."""

    def __init__(self, num_blocks, parts=None, **options):
        self.arena, self.slots = parts or make_pool(num_blocks, **options)
        self.running = []

    def start(self, tokens, publish=True, cold=False):
        """Compute a prompt, from its longest kept prefix unless it is to be cold; None if there is no room."""
        request = Request(tokens)
        hashes = request.block_hashes
        length = 0 if cold else self.slots.longest(hashes, len(hashes))
        found = [self.arena.get_cached_block(key, [GROUP]) for key in hashes[:length]]
        if not all(found):
            length, found = 0, []
        states = 1 + (length > 0)
        idle = sum(page.ref_cnt == 0 for [page] in found)
        if len(hashes) - length + idle + states * STATE > self.arena.get_num_free_blocks():
            return None
        request.pages = [page for [page] in found]
        self.arena.touch(request.pages)
        if length:
            [block] = self.slots.get_cached_block(hashes[length - 1], [1])
            if self.slots.is_on_host(block):
                request.states.append(self.slots.load(block, 1))
            else:
                self.slots.touch([block])
                request.states.append(block)
            self.arena.load_pages(request.pages)
        request.pages += self.arena.get_new_blocks(len(hashes) - length)
        self.arena.cache_full_blocks(request, request.pages, length, len(hashes), BLOCK, GROUP)
        request.states.append(self.slots.take())
        if publish and hashes:
            self.slots.publish(request.states[-1], hashes, len(hashes), 1)
        self.running.append(request)
        return request

    def finish(self, request):
        self.running.remove(request)
        self.arena.free_blocks([*reversed(request.pages), *request.states])

    def check(self, held=()):
        """Verify all counts; `held` are pages of nobody in `running`."""
        self.slots.check(request.states for request in self.running)
        check_arena(self.arena, [held, *(request.pages for request in self.running)])
        counts = self.arena.counts()
        assert sum(counts.values()) == self.arena.num_gpu_blocks - 1
        live = {block.block_id for request in self.running for block in request.states}
        used = counts["page"] + STATE * len(live)
        assert self.arena.get_num_free_blocks() == self.arena.num_gpu_blocks - 1 - used

    def pages(self, tokens):
        """The cached pages of a prompt, or None."""
        self.arena.counts()  # settles what it was told of states
        found = [self.arena.get_cached_block(key, [GROUP]) for key in Request(tokens).block_hashes]
        return [page and page[0] for page in found]

    def kind(self, tokens):
        """Kinds of the cached pages of a prompt."""
        return [page and Kind(self.arena._kinds[page.block_id]) for page in self.pages(tokens)]
