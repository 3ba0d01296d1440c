"""What the processes of an engine tell each other about slots, beside what vLLM lets them say.

Each item is an attribute of an object that vLLM passes on, pickled where the two ends are different processes.
"""

Operation = tuple[int, int | list[int]] | tuple[list[int], list[int]]
"""``(slot, [blocks])``: the slot has these blocks from now on, and nothing in it is read before it is written.
``(source, target)``: copy a state. ``([sources], [targets])``: copy pages. Ids from the number of slots on are host
slots, and ids from the number of blocks on are blocks in host memory."""

OPERATIONS = "kimi_operations"
"""On a `SchedulerOutput`: list of `Operation`, to be done in order, and on the stream of the steps, before the step.

A block given to a slot, or to a request as a page, may have been another's. Whatever still reads or writes it for its
former owner is before it in this order: steps in flight, and copies to the host."""

NEW_PAGES = "kimi_new_pages"
"""On a `SchedulerOutput`: list of the blocks that are pages from this step on, to be cleared after its operations.

An attention kernel may read a page to its end and multiply what an earlier owner left there by weights of 0. The bits
of a state, and the latents of a broken request, can be NaN."""

Sick = tuple[int, int]
"""``(slot, token)``: with the token of this number, of those that the step computed from the slot, NaN or infinity
came up. It is 0 unless drafts follow the first, and of a draft that was rejected nothing is in the slot."""

NONFINITE = "kimi_nonfinite"
"""On a `ModelRunnerOutput`: list of `Sick`."""

STATS = "kimi_state:"
"""Prefix of our keys in `SchedulerStats.running_lora_adapters`. LoRA is refused with KDA state, so the field is
free, and no other open dictionary goes from the engine to the API servers without a connector."""
