"""Names of what scheduler and workers tell each other about slots, beside what vLLM lets them say.

Each is an attribute of an object that vLLM passes between the two, pickled where they are different processes.
"""

MOVES = "kimi_moves"
"""On a `SchedulerOutput`: list of ``(source, target)`` slot ids to copy before the step (see `SlotPool.moves`)."""

NONFINITE = "kimi_nonfinite"
"""On a `ModelRunnerOutput`: list of slot ids that the step left with NaN or infinity in them."""

STATS = "kimi_state:"
"""Prefix of our keys in `SchedulerStats.running_lora_adapters`. LoRA is refused with KDA state, so the field is
free, and no other open dictionary goes from the engine to the API servers without a connector."""
