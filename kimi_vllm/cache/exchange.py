"""What the processes of an engine tell each other about slots, beside what vLLM lets them say.

Each item is an attribute of an object that vLLM passes on, pickled where the two ends are different processes.
"""

MOVES = "kimi_moves"
"""On a `SchedulerOutput`: list of ``(source, target)`` slot ids to copy before the step (see `SlotPool.moves`)."""

NONFINITE = "kimi_nonfinite"
"""On a `ModelRunnerOutput`: list of the slot ids that the step left with NaN or infinity in them."""

STATS = "kimi_state:"
"""Prefix of our keys in `SchedulerStats.running_lora_adapters`. LoRA is refused with KDA state, so the field is
free, and no other open dictionary goes from the engine to the API servers without a connector."""
