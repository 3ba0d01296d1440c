"""Which prefixes of prompts are in the folder of sessions without having been named.

Their names are digests of their tokens, for vLLM's hashes of blocks differ from process to process. Who finds one by
its name still compares its tokens. Knows neither torch nor vLLM.
"""

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kimi_vllm.cache.session_folder import is_prefix_name, prefix_name, sessions


class PrefixFiles:
    """Finds the longest saved prefix of a prompt, by what the folder had when it was last looked at.

    Args:
        folder: Where files are, of other engines too.
        ranks: Workers of the engine; each has its own file.
        engine: What tells engines apart that cannot read each other's files. Where it does not, a load fails.
    """

    def __init__(self, folder: Path, ranks: int, engine: str) -> None:
        self._folder, self._ranks, self._engine = folder, ranks, engine
        # By tenant and number of tokens.
        self._names: dict[str, dict[int, set[str]]] = {}

    def look(self) -> None:
        """Read the folder, in any thread. Raises OSError."""
        names: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for session in sessions(self._folder):
            if session.is_prefix and session.whole and session.ranks == self._ranks:
                names[session.tenant][_count_of(session.name)].add(session.name)
        self._names = {tenant: dict(by_count) for tenant, by_count in names.items()}

    def longest(self, tokens: Sequence[int], most: int, tenant: str) -> tuple[str | None, str]:
        """The name of the longest prefix that is there, of at most so many tokens; and of that with all of these."""
        by_count = self._names.get(tenant, {})
        counts = sorted({most, *(count for count in list(by_count) if count < most)})
        found, name = None, ""
        for count, name in zip(counts, self._called(tokens, counts), strict=True):
            if name in by_count.get(count, ()):
                found = name
        return found, name

    def add(self, name: str, tenant: str) -> None:
        """It has been written."""
        self._names.setdefault(tenant, {}).setdefault(_count_of(name), set()).add(name)

    def forget(self, name: str, tenant: str) -> None:
        """It cannot be read."""
        self._names.get(tenant, {}).get(_count_of(name), set()).discard(name)

    def _called(self, tokens: Sequence[int], counts: Iterable[int]) -> Iterator[str]:
        """The names of prefixes that get longer."""
        digest, start = hashlib.sha256(self._engine.encode()), 0
        for count in counts:
            digest.update(array("q", tokens[start:count]).tobytes())
            start = count
            yield prefix_name(digest.hexdigest(), count)


def prefix_tokens(name: str | None) -> int:
    """How many tokens a prefix of this name has; 0 for none."""
    return 0 if name is None else _count_of(name)


def _count_of(name: str) -> int:
    assert is_prefix_name(name)
    return int(name.rpartition("-")[2])
