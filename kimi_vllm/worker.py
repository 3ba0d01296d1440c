"""The worker: vLLM's own for this platform, with the few things a step needs that vLLM has no words for.

When it starts, it compiles our kernels. Before a step it makes the copies between the pool and host memory that the
scheduler planned. After it, it tells the scheduler which slots are no longer finite. Both travel as attributes of what
the two exchange anyway.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from kimi_vllm.cache.exchange import MOVES, NONFINITE
from kimi_vllm.cache.guard import StateGuard
from kimi_vllm.cache.pool import StatePool

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker

Output: TypeAlias = ModelRunnerOutput | AsyncModelRunnerOutput


class KimiWorker(PlatformWorker):
    """Serves the state pool's part of a step. Any other model runs as it would without."""

    _pending: Callable[[], list[int]] | None = None

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compile our kernels for all kinds of steps, then what vLLM compiles: no request waits for a compiler."""
        if not current_platform.is_cpu():
            self._warm_up_kernels()
        return super().compile_or_warm_up_model()  # type: ignore[no-any-return]

    def execute_model(self, scheduler_output: SchedulerOutput) -> Output | None:
        """Make the step's copies, run it, and report sick slots with its result, now or in `sample_tokens`."""
        pool = self._state_pool()
        if pool is None:
            return super().execute_model(scheduler_output)  # type: ignore[no-any-return]
        for source, target in getattr(scheduler_output, MOVES, ()):
            pool.move(source, target)
        output: Output | None = super().execute_model(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return output
        sick = StateGuard(pool.nonfinite).after_step()
        if output is None:
            self._pending = sick
            return None
        return _with_sick_slots(output, sick)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Output:
        """Sample, and report what `execute_model` could not."""
        output: Output = super().sample_tokens(grammar_output)
        sick, self._pending = self._pending, None
        return output if sick is None else _with_sick_slots(output, sick)

    def _warm_up_kernels(self) -> None:
        from kimi_vllm.layers import skinny
        from kimi_vllm.layers.kda import KimiDeltaAttention

        model = self.get_model()
        if getattr(model, "skinny", False):
            with torch.inference_mode():
                skinny.warm_up(model, self.model_config.dtype)
        for module in model.modules():
            if isinstance(module, KimiDeltaAttention):
                with torch.inference_mode():
                    module.warm_up(self.scheduler_config.max_num_batched_tokens, self.model_config.dtype)
                return  # the layers are alike

    def _state_pool(self) -> StatePool | None:
        home = getattr(getattr(self.get_model(), "model", None), "state_home", None)
        return None if home is None else home.pool


class _AsyncOutput(AsyncModelRunnerOutput):
    """An output that is still on its way from the device, and the flags that were sent before it."""

    def __init__(self, inner: AsyncModelRunnerOutput, sick: Callable[[], list[int]]) -> None:
        self._inner, self._sick = inner, sick

    def get_output(self) -> ModelRunnerOutput:
        output = self._inner.get_output()
        if slots := self._sick():
            setattr(output, NONFINITE, slots)
        return output

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        return self._inner.get_kv_connector_output()  # type: ignore[no-any-return]  # vLLM asks since 0.33


def _with_sick_slots(output: Output, sick: Callable[[], list[int]]) -> Output:
    if isinstance(output, AsyncModelRunnerOutput):
        return _AsyncOutput(output, sick)
    if isinstance(output, ModelRunnerOutput) and output is not EMPTY_MODEL_RUNNER_OUTPUT and (slots := sick()):
        setattr(output, NONFINITE, slots)
    return output
