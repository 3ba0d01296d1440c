"""What is measured and with which engine: one object, made on the command line, read in the engine's process."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from kimi_vllm.geometry import KimiGeometry

OURS, IN_TREE = "kimi-vllm", "in-tree"
MEASUREMENTS = ("routing", "ready", "tpot", "concurrency", "mixed", "prefill", "throughput")
ON_REQUEST = ("drafts", "resume", "again")


class Plan(BaseModel, frozen=True, extra="forbid"):
    """All choices of a run. Lengths are in tokens."""

    model: str  # folder with a config.json
    measurements: tuple[str, ...] = MEASUREMENTS
    load_format: str = "dummy"
    max_model_len: int = 0  # 0 to choose from the lengths below
    batched_tokens: int = 8192  # most tokens of one step (--max-num-batched-tokens)
    max_num_seqs: int = 256  # most requests that run at once
    engine: dict[str, Any] = {}  # further options of vLLM's `LLM`
    contexts: tuple[int, ...] = (4096, 32768, 131072, 262144, 524288, 1048576)  # behind the token that is decoded
    batch_cap: int = 256  # most requests of the larger batch
    # steps, warmup, profiled: decode steps timed, before them, and after them under the profiler
    steps: int = 50
    warmup: int = 10
    profiled: int = 5
    budget_s: float = 20  # most seconds that one point may take
    variant_s: float = 270  # seconds after which a variant starts no further point
    prompts: tuple[int, ...] = (1024, 4096, 32768, 131072)  # for which to count the requests that run at once
    # decoders, decoder_context: requests that decode while prompts of `arrival` tokens arrive
    decoders: int = 64
    decoder_context: int = 4096
    arrival: int = 8192
    # arrivals, every_s: how many prompts, and the seconds between two
    arrivals: int = 6
    every_s: float = 0.75
    # mixed, ours, after the engine's own: limits of a step with prompts in which others decode; 0 for none
    beside: tuple[int, ...] = ()
    prefills: tuple[int, ...] = (4096, 8192, 32768, 131072)  # prompts whose time to the first token is measured
    # requests that come at once, tokens of each prompt, and tokens of each answer
    loads: tuple[tuple[int, int, int], ...] = ((64, 4096, 128), (256, 1024, 128), (24, 32768, 64))
    repeats: int = 3  # how often each of `loads` is timed, after once that is not
    # drafts: requests at once, and the share of drafts that is right, one after another, as often as it is drafted;
    # an engine that does not draft is measured once for all shares
    draft_requests: tuple[int, ...] = (1, 8, 64, 128)
    draft_shares: tuple[float, ...] = (0, 0.5, 0.8, 1)
    draft_context: int = 4096
    resumed: tuple[int, ...] = (32768,)  # prompts whose sessions are saved and resumed; needs kimi.session_dir
    # again: how many prompts of so many tokens are asked for twice; --engine must switch prefix caching on
    repeated: tuple[tuple[int, int], ...] = ((60, 32768),)
    ready_prompts: int = 200  # prompts of mixed lengths that are the engine's first
    # peak of the device's memory, in 10^12 bytes per second, for the floor; 0 if it is known for the device by name,
    # else there is no floor
    bandwidth_tbps: float = 0

    @classmethod
    def for_model(cls, model: Path) -> Self:
        """The defaults for a model of this size: those above, or small ones for a toy that must do on a CPU."""
        plan = cls(model=str(model))
        if plan.geometry().hidden_size >= 1024:
            return plan
        return cls(
            model=plan.model,
            batched_tokens=1024,
            max_num_seqs=16,
            engine={"num_gpu_blocks_override": 300},  # so that long prompts do not all fit
            contexts=(256, 1024, 4096),
            batch_cap=8,
            steps=20,
            warmup=3,
            budget_s=10,
            variant_s=100,
            prompts=(256, 1024, 4096),
            decoders=4,
            decoder_context=256,
            arrival=1024,
            arrivals=3,
            every_s=0.25,
            prefills=(512, 2048),
            loads=((4, 256, 16),),
            draft_requests=(1, 4),
            draft_context=256,
            resumed=(512,),
            repeated=((30, 512),),
            ready_prompts=6,
        )

    @property
    def growth(self) -> int:
        """Steps of a decoding request while a point is measured."""
        return self.warmup + self.steps + self.profiled + 16

    @property
    def model_len(self) -> int:
        """Tokens of the longest request (--max-model-len)."""
        loads = (prompt + output for _, prompt, output in self.loads)
        longest = max(
            *self.contexts,
            *self.prompts,
            *self.prefills,
            *self.resumed,
            *(prompt for _, prompt in self.repeated),
            *loads,
            self.decoder_context,
            self.arrival,
            self.draft_context,
        )
        return self.max_model_len or min(self._config()["model_max_length"], longest + 4096)

    def geometry(self) -> KimiGeometry:
        """The model's."""
        return KimiGeometry.from_config(self._config())

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((Path(self.model) / "config.json").read_text())
        return config
