"""Watches the memory of a running engine: NaN in what nobody owns."""

from typing import Any

import torch

from kimi_vllm.cache.arena import Kind


class Watch:
    """Spoils what is given back.

    A block that nobody owns any more, whether it held tokens or a part of a state, is filled with NaN once the step in
    which it was given back is done, in host memory too. Whoever reads it, or is read from it, shows.

    Attributes:
        spoiled: Blocks filled so far.
    """

    def __init__(self, engine: Any) -> None:
        self._scheduler, self._slots, self.spoiled = engine.scheduler, engine.slots, 0
        self._owned: set[int] = set()
        if engine.llm.llm_engine.vllm_config.parallel_config.world_size == 1:
            self._spoil_after(engine)

    def owned(self) -> set[int]:
        """Blocks with something in them that a request has or may find."""
        arena, slots = self._scheduler.arena, self._slots
        cached = {block for block, kind in enumerate(arena._kinds) if kind not in (Kind.CLEAN, Kind.STATE)}
        held = [blocks for slot, blocks in slots.backing.items() if slots.references(slot) or slots.holds(slot)]
        return cached.union(*held, *arena.states.host_backing.values())

    def _spoil_after(self, engine: Any) -> None:
        worker = engine.worker
        execute = worker.execute_model

        def spoiling(output: Any) -> Any:
            result = execute(output)
            # Copies that were planned for this step have been made, and none is planned yet for the next.
            owned = self.owned()
            gone = sorted(self._owned - owned)
            self._owned = owned
            if any(block >= len(engine.pool.memory) for block in gone) and engine.pool.device.type != "cpu":
                # The processor writes to host memory at once, and the device may not have copied it yet.
                torch.accelerator.synchronize()
            for block in gone:
                engine.pool.block(block).fill_(0xFF)  # NaN in every floating point format
            self.spoiled += len(gone)
            return result

        worker.execute_model = spoiling
