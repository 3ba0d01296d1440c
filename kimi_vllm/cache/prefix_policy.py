"""Which prefixes requests load from the folder of sessions, and leave there, without naming them.

Reading one must spare so many tokens, and so must one that is written beyond those that are there. Of a request that
ends, what it has found in the cache is written first, then what it shares with others, then what serves its prompt
again, then all of it. Knows neither torch nor vLLM: a request is vLLM's, and its boundaries come from who knows them.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from kimi_vllm.cache.prefix_files import PrefixFiles, prefix_tokens
from kimi_vllm.cache.session_folder import Session, salted

logger = logging.getLogger("vllm.kimi_vllm")

_LOOK_EVERY_S = 30.0
"""Between two looks at what other processes have written."""
_AT_ONCE = 2
"""That are being written: each holds the blocks of a request that ended."""
_REST_S = 60.0
"""For which none is written after one could not be, as on a full disk."""


class PrefixPolicy:
    """Decides for requests that name no session.

    Args:
        files: What is there.
        least: The tokens that reading or writing one must gain. 0 does neither.
        counts: Of prefixes_loaded, _saved, _failed (either way), and _skipped because others were being written, or one
            could not be a while ago.
    """

    def __init__(self, files: PrefixFiles, least: int, counts: Counter[str]) -> None:
        self._files, self._least, self._counts = files, least, counts
        # Requests, to what memory had of them, the prefix that was found and its tenant, and what they leave.
        self._hits: dict[str, int] = {}
        self._found: dict[str, tuple[str | None, str]] = {}
        self._leaving: dict[str, tuple[str, str]] = {}
        self._looked = self._resting = float("-inf")
        # Saved since the folder was last looked at.
        self._fresh: set[str] = set()

    def due(self) -> bool:
        """Whether it is time for `look`; True once."""
        now = time.monotonic()
        if not self._least or now - self._looked <= _LOOK_EVERY_S:
            return False
        self._looked = now
        return True

    def look(self, found: Sequence[Session], deleted: Sequence[Session]) -> bool:
        """Learn what is in the folder and what was deleted from it, in any thread.

        Returns:
            Whether what was saved here is gone already, so that saving more would only wear the disk for a while.
        """
        if not self._least:
            return False
        gone = {session.name for session in deleted}
        self._files.look(session for session in found if session.name not in gone)
        fresh, self._fresh = self._fresh, set()
        if not fresh & gone:
            return False
        self._resting = time.monotonic() + _REST_S
        return True

    def find(self, request: Any, num_computed: int) -> str | None:
        """The prefix to load for a request of whose tokens so many are computed; the same whenever it is asked for."""
        name, tenant = request.request_id, salted(request.cache_salt)
        if not self._least or request.skip_reading_prefix_cache or not _is_known_by_tokens(request):
            return None
        self._hits.setdefault(name, num_computed)
        if name not in self._found:
            # The next token comes of one more.
            there = self._files.there(request.all_token_ids, tenant, num_computed + self._least, request.num_tokens - 1)
            self._found[name] = there[max(there)] if there else None, tenant
        prefix, _ = self._found[name]
        return prefix if prefix_tokens(prefix) - num_computed >= self._least else None

    def found(self, name: str) -> str | None:
        """What was found for a request."""
        return self._found.get(name, (None, ""))[0]

    def loaded(self, name: str, *, failed: bool) -> None:
        """A request's prefix has been loaded, or cannot be."""
        prefix, tenant = self._found[name]
        assert prefix is not None
        self._counts["prefixes_failed" if failed else "prefixes_loaded"] += 1
        if failed:
            self._files.forget(prefix, tenant)

    def choose(self, request: Any, last_kept: Callable[[int], int]) -> tuple[str, int] | None:
        """What to save of a request that ends: its name and its number of tokens.

        Args:
            last_kept: The last boundary with a state within so many tokens of the request.
        """
        if not self._least or not _is_known_by_tokens(request):
            return None
        # The last token is sampled, and not computed: of what ends behind it another request may have a state.
        hit, most = self._hits.get(request.request_id, 0), request.num_tokens - 1
        ends = (hit, request.shared_prefix_boundary, request.num_prompt_tokens - 1, most)
        counts = [count for end in ends if (count := last_kept(min(end, most))) >= self._least]
        if not counts:
            return None
        if len(self._leaving) >= _AT_ONCE or time.monotonic() < self._resting:
            self._counts["prefixes_skipped"] += 1
            return None
        tokens, tenant = request.all_token_ids, salted(request.cache_salt)
        there = self._files.there(tokens, tenant, 1, max(counts))
        for count in counts:
            if count - max([known for known in there if known <= count], default=0) >= self._least:
                chosen = self._files.named(tokens, [count])[count], tenant
                if chosen in self._leaving.values():
                    return None
                self._leaving[request.request_id] = chosen
                return chosen[0], count
        return None

    def leaves(self, name: str) -> bool:
        """Whether what is being saved of a request was chosen here."""
        return name in self._leaving

    def saved(self, name: str, *, failed: bool) -> None:
        """A request's prefix has been saved, or cannot be."""
        prefix, tenant = self._leaving.pop(name)
        self._counts["prefixes_failed" if failed else "prefixes_saved"] += 1
        if failed:
            self._resting = time.monotonic() + _REST_S
            logger.warning("No prefix without a name is saved for %d s.", _REST_S)
        else:
            self._fresh.add(prefix)
            self._files.add(prefix, tenant)

    def ended(self, name: str) -> None:
        """A request needs nothing more, and nothing is being loaded for it."""
        self._found.pop(name, None)
        self._hits.pop(name, None)


def _is_known_by_tokens(request: Any) -> bool:
    return request.prompt_embeds is None and not request.resumable
