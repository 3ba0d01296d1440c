"""The user's wishes: ``--additional-config '{"kimi": {...}}'`` as a validated object."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kimi_vllm.cache.eviction import POLICIES

STATE_DTYPES = ("float32", "bfloat16", "float16")


class OptionsError(ValueError):
    """An option that does not exist or has a value that cannot be used. Names the option."""


@dataclass(frozen=True, slots=True)
class KimiOptions:
    """What can be set, each with its default.

    Attributes:
        state_slots: slots of the KDA state pool that requests and checkpoints share. Default: chosen from
            memory by `planning.size`, at most one per sequence (``--max-num-seqs``) beside those for checkpoints.
        typical_tokens: tokens of a request at its end. Where memory is short of a slot per sequence, `state_slots` is
            chosen so that each running request has a KV cache of so many: 8192 gives the 48B model's state and KV cache
            about half of the memory each. Set it to what your requests have.
        state_dtype: of KDA's recurrent state. "float32", as the checkpoint was trained; on GPUs also "bfloat16" or
            "float16", which halve a request's state and round it after every step.
        checkpoint_interval: with prefix caching, also keep the state every so many tokens of a prompt, rounded up
            to the attention block. 0 keeps only the boundaries that a later request is likely to resume at.
        checkpoint_share: share of the memory for state and KV cache, from 0 to below 1, that slots for checkpoints may
            take beside those for running sequences. A tenth: slots that no running request needs hold checkpoints too,
            so this is what remains of them when every sequence runs, and more would cost pages, without which a
            checkpoint cannot be resumed.
        eviction: which checkpoint goes first when a slot is needed: "value", the one that saves least computation, or
            "lru", the one unused for longest.
        host_memory_gib: host memory per worker for states that were evicted or whose request was preempted, in GiB.
            0 recomputes them. The states only: pages of the KV cache that vLLM has given away are computed again.
        on_nonfinite: what happens to a request whose state becomes NaN or infinite: "abort" ends it with an error,
            "resume" computes it again from its last good checkpoint, once.
    """

    state_slots: int | None = None
    typical_tokens: int = 8192
    state_dtype: str = "float32"
    checkpoint_interval: int = 0
    checkpoint_share: float = 0.1
    eviction: str = "value"
    host_memory_gib: float = 0
    on_nonfinite: str = "abort"

    def __post_init__(self) -> None:
        if self.state_slots is not None and (not _is_int(self.state_slots) or self.state_slots < 2):
            raise OptionsError(
                f"kimi.state_slots={self.state_slots!r}: expected an integer of at least 2. A request that resumes "
                "from a checkpoint reads one slot and writes another, so one slot could wait for itself."
            )
        if not _is_int(self.typical_tokens) or self.typical_tokens < 1:
            raise OptionsError(f"kimi.typical_tokens={self.typical_tokens!r}: expected a number of tokens.")
        if not _is_int(self.checkpoint_interval) or self.checkpoint_interval < 0:
            raise OptionsError(
                f"kimi.checkpoint_interval={self.checkpoint_interval!r}: expected a number of tokens, or 0."
            )
        share = self.checkpoint_share
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share < 1:
            raise OptionsError(f"kimi.checkpoint_share={share!r}: expected a number from 0 to below 1.")
        memory = self.host_memory_gib
        if not isinstance(memory, int | float) or isinstance(memory, bool) or not 0 <= memory < float("inf"):
            raise OptionsError(f"kimi.host_memory_gib={memory!r}: expected a number of GiB, or 0.")
        for name, known in {
            "state_dtype": STATE_DTYPES,
            "eviction": tuple(POLICIES),
            "on_nonfinite": ("abort", "resume"),
        }.items():
            if (value := getattr(self, name)) not in known:
                raise OptionsError(f"kimi.{name}={value!r}: expected one of {', '.join(known)}.")

    @classmethod
    def from_additional_config(cls, additional_config: object) -> "KimiOptions":
        """Read the ``kimi`` entry of vLLM's ``--additional-config``.

        Raises:
            OptionsError: the entry is no mapping, or has a key that does not exist.
        """
        if not isinstance(additional_config, Mapping):
            return cls()
        values: Any = additional_config.get("kimi", {})
        if not isinstance(values, Mapping):
            raise OptionsError('--additional-config: expected {"kimi": {"option": value}}.')
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise OptionsError(f"kimi.{unknown[0]}: no such option. Known: {', '.join(known)}.")
        return cls(**values)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
