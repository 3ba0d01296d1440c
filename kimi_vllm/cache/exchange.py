"""What the processes of an engine tell each other about slots, beside what vLLM lets them say.

Each item is an attribute of an object that vLLM passes on, pickled where the two ends are different processes.
"""

from typing import NamedTuple

from vllm.config import ModelConfig

MOVES = "kimi_moves"
"""On a `SchedulerOutput`: list of ``(source, target)`` slot ids to copy before the step (see `SlotPool.moves`)."""

NONFINITE = "kimi_nonfinite"
"""On a `ModelRunnerOutput`: list of the slot ids that the step left with NaN or infinity in them."""

STATS = "kimi_state:"
"""Prefix of our keys in `SchedulerStats.running_lora_adapters`. LoRA is refused with KDA state, so the field is
free, and no other open dictionary goes from the engine to the API servers without a connector."""

_MEMORY = "kimi_memory"


class PlannedMemory(NamedTuple):
    """How the config hook divided memory, so that every worker and the scheduler use the same numbers.

    Attributes:
        state_slots: Slots of the state pool, without the null slot.
        kv_bytes: Bytes of a GPU worker's KV cache; None where vLLM or the user sets its size.
    """

    state_slots: int
    kv_bytes: int | None = None

    def attach(self, model_config: ModelConfig) -> None:
        """Send it to the workers, inside the Hugging Face config."""
        setattr(model_config.hf_config, _MEMORY, tuple(self))

    @classmethod
    def of(cls, model_config: ModelConfig) -> "PlannedMemory | None":
        """What the config hook attached; None for another model."""
        values = getattr(model_config.hf_config, _MEMORY, None)
        return None if values is None else cls(*values)
