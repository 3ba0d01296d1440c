"""Which prefixes of prompts are in the folder of sessions without having been named.

Their names are digests of their tokens, for vLLM's hashes of blocks differ from process to process. Who finds one by
its name still compares its tokens. Knows neither torch nor vLLM.
"""

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from kimi_vllm.cache.session_folder import Session, is_prefix_name, prefix_name


class PrefixFiles:
    """Finds saved prefixes of a prompt, by what the folder had when it was last looked at.

    Args:
        ranks: Workers of the engine; each has its own file.
        engine: What tells engines apart that cannot read each other's files. Where it does not, a load fails.
    """

    def __init__(self, ranks: int, engine: str) -> None:
        self._ranks, self._engine = ranks, engine
        # By tenant and number of tokens.
        self._names: dict[str, dict[int, set[str]]] = {}
        # The inodes of files, and of those that could not be read: they are not looked at until they are replaced.
        self._inodes: dict[tuple[str, str], frozenset[int]] = {}
        self._unreadable: dict[tuple[str, str], frozenset[int]] = {}

    def look(self, found: Iterable[Session]) -> None:
        """Learn what is in the folder, in any thread."""
        names: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        inodes = {}
        for session in found:
            key = session.tenant, session.name
            if not session.is_prefix or not session.whole or session.ranks != self._ranks:
                continue
            inodes[key] = frozenset(session.inodes)
            if self._unreadable.get(key) != inodes[key]:
                names[session.tenant][prefix_tokens(session.name)].add(session.name)
        self._inodes, self._names = inodes, {tenant: dict(by_count) for tenant, by_count in names.items()}

    def there(self, tokens: Sequence[int], tenant: str, least: int, most: int) -> dict[int, str]:
        """The prefixes that are there, of at least and at most so many tokens, by this number."""
        by_count = self._names.get(tenant, {})
        counts = [count for count in list(by_count) if least <= count <= most]
        return {count: name for count, name in self.named(tokens, counts).items() if name in by_count.get(count, ())}

    def named(self, tokens: Sequence[int], counts: Iterable[int]) -> Mapping[int, str]:
        """What the prefixes of these numbers of tokens are called; reads no more than the longest has."""
        digest, start, names = hashlib.sha256(self._engine.encode()), 0, {}
        for count in sorted(counts):
            digest.update(array("q", tokens[start:count]).tobytes())
            start, names[count] = count, prefix_name(digest.hexdigest(), count)
        return names

    def add(self, name: str, tenant: str) -> None:
        """It has been written."""
        self._unreadable.pop((tenant, name), None)
        self._names.setdefault(tenant, {}).setdefault(prefix_tokens(name), set()).add(name)

    def forget(self, name: str, tenant: str) -> None:
        """It cannot be read."""
        self._unreadable[tenant, name] = self._inodes.get((tenant, name), frozenset())
        self._names.get(tenant, {}).get(prefix_tokens(name), set()).discard(name)


def prefix_tokens(name: str | None) -> int:
    """How many tokens a prefix of this name has; 0 for none."""
    if name is None:
        return 0
    assert is_prefix_name(name)
    return int(name.rpartition("-")[2])
