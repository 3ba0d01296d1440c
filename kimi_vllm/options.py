"""The user's wishes: ``--additional-config '{"kimi": {...}}'`` as a validated object."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


class OptionsError(ValueError):
    """An option that does not exist or has a value that cannot be used. Names the option."""


@dataclass(frozen=True, slots=True)
class KimiOptions:
    """What can be set, each with its default.

    Attributes:
        state_slots: slots of the KDA state pool that requests and checkpoints share. Default: one per running
            sequence (``--max-num-seqs``), and as many again for checkpoints when prefix caching is on.
        checkpoint_interval: with prefix caching, also keep the state every so many tokens of a prompt, rounded up
            to the attention block. 0 keeps only the boundaries that a later request is likely to resume at.
    """

    state_slots: int | None = None
    checkpoint_interval: int = 0

    def __post_init__(self) -> None:
        if self.state_slots is not None and (not _is_int(self.state_slots) or self.state_slots < 2):
            raise OptionsError(
                f"kimi.state_slots={self.state_slots!r}: expected an integer of at least 2. A request that resumes "
                "from a checkpoint reads one slot and writes another, so one slot could wait for itself."
            )
        if not _is_int(self.checkpoint_interval) or self.checkpoint_interval < 0:
            raise OptionsError(
                f"kimi.checkpoint_interval={self.checkpoint_interval!r}: expected a number of tokens, or 0."
            )

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
