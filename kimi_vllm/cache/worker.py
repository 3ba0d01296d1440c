"""vLLM's worker for this platform, extended by what KDA states need; the other end of `scheduler.py`.

At start it compiles our kernels. Before a step it gives slots their blocks and makes the copies that the scheduler
planned; after it, it reports the slots that are not finite (see `exchange.py`).
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from kimi_vllm.cache.exchange import NEW_PAGES, NONFINITE, OPERATIONS, Sick
from kimi_vllm.cache.guard import take_flags
from kimi_vllm.cache.pool import StatePool
from kimi_vllm.cache.session_worker import SessionWorker
from kimi_vllm.cache.warm_up import logprob_columns, sampled_rows, step_sizes
from kimi_vllm.geometry import geometry_of
from kimi_vllm.options import KimiOptions

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker

logger = init_logger("vllm.kimi_vllm")

Output: TypeAlias = ModelRunnerOutput | AsyncModelRunnerOutput


class KimiWorker(PlatformWorker):
    """Does the state pool's part of a step. Models without KDA run as with vLLM's worker."""

    _pending: Callable[[], list[Sick]] | None = None

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compile our kernels for all kinds of steps, then vLLM's, so that no request waits for a compiler."""
        if not current_platform.is_cpu():
            self._warm_up_kernels()
            if self.vllm_config.kernel_config.enable_jit_warmup:
                self._warm_up_steps()
                self._warm_up_sampling()
        self._bind_sessions()
        return super().compile_or_warm_up_model()  # type: ignore[no-any-return]

    def execute_model(self, scheduler_output: SchedulerOutput) -> Output | None:
        """Do what was planned for slots, run the step, and report sick slots, now or in `sample_tokens`."""
        pool = self._state_pool()
        if pool is None:
            return super().execute_model(scheduler_output)  # type: ignore[no-any-return]
        pool.apply(getattr(scheduler_output, OPERATIONS, ()))
        pool.clear(getattr(scheduler_output, NEW_PAGES, ()))
        output: Output | None = super().execute_model(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return output
        sick = take_flags(pool.nonfinite)
        if output is None:
            self._pending = sick
            return None
        return _with_sick_slots(output, sick)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Output:
        """Sample, and report what `execute_model` left pending."""
        output: Output = super().sample_tokens(grammar_output)
        sick, self._pending = self._pending, None
        return output if sick is None else _with_sick_slots(output, sick)

    def reload_weights(self, *args: Any, **named: Any) -> None:
        """Reload weights. Raises WeightsError if a layer is left half loaded."""
        # vLLM finishes layers in torch's default dtype, which it sets for the first load only.
        with set_default_torch_dtype(self.model_config.dtype):
            super().reload_weights(*args, **named)
        self._finish_update()

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Take one bucket of a weight update."""
        with set_default_torch_dtype(self.model_config.dtype):
            super().update_weights(update_info)

    def finish_weight_update(self) -> None:
        """End a weight update. Raises WeightsError if a layer is left half loaded."""
        self._finish_update()
        with set_default_torch_dtype(self.model_config.dtype):
            super().finish_weight_update()

    def _finish_update(self) -> None:
        model = self.get_model()
        if hasattr(model, "finish_update"):
            model.finish_update()
        self._bind_sessions()

    def _bind_sessions(self) -> None:
        pool = self._state_pool()
        if pool is not None and KimiOptions.of(self.vllm_config).session_dir is not None:
            sessions = get_kv_transfer_group()
            assert isinstance(sessions, SessionWorker)
            sessions.bind(self.get_model(), pool)

    def _warm_up_kernels(self) -> None:
        model = self.get_model()
        if hasattr(model, "warm_up_kernels"):
            with torch.inference_mode():
                model.warm_up_kernels(self.scheduler_config.max_num_batched_tokens)

    def _warm_up_steps(self) -> None:
        started = time.perf_counter()
        scheduler = self.scheduler_config
        # A step has no more tokens than its sequences can have.
        most = min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * self.model_config.max_model_len)
        moe = geometry_of(self.model_config).moe
        sizes = step_sizes(most, *((moe.num_experts, moe.num_experts_per_token) if moe else (0, 0)))
        # The largest first: the others reuse its memory. vLLM captures graphs later.
        for size in reversed(sizes):
            self.model_runner._dummy_run(size, skip_eplb=True, cudagraph_runtime_mode=CUDAGraphMode.NONE)
        torch.cuda.synchronize()
        logger.info("kimi-vllm: warmed up %d step sizes in %.1f s.", len(sizes), time.perf_counter() - started)

    def _warm_up_sampling(self) -> None:
        from vllm.distributed import get_pp_group
        from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton
        from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

        if not get_pp_group().is_last_rank or self.model_config.runner_type != "generate":
            return
        started = time.perf_counter()
        model, config = self.get_model(), self.model_config
        rows = sampled_rows(self.scheduler_config.max_num_seqs)
        with torch.inference_mode():
            hidden = torch.zeros(rows[-1], config.get_hidden_size(), dtype=config.dtype, device=self.device)
            logits = model.compute_logits(hidden)
            if logits is None:
                return  # another rank of the tensor parallel group has them
            for columns in logprob_columns(config.max_logprobs, logits.shape[1]):
                compute_token_logprobs(logits[:1], torch.zeros(1, columns, dtype=torch.int64, device=self.device))
            for count in rows:
                k = torch.full((count,), 2, dtype=torch.int32, device=self.device)
                p = torch.full((count,), 0.5, device=self.device)
                for top_k, top_p in ((k, None), (None, p), (k, p)):
                    # As the sampler makes them: of one row, the strides stay those of a padded vocabulary.
                    copied = torch.empty_like(logits[:count], dtype=torch.float32).copy_(logits[:count])
                    apply_top_k_top_p_triton(copied, top_k, top_p)
        torch.cuda.synchronize()
        logger.info("kimi-vllm: compiled vLLM's sampling kernels in %.1f s.", time.perf_counter() - started)

    def _state_pool(self) -> StatePool | None:
        home = getattr(getattr(self.get_model(), "model", None), "state_home", None)
        return None if home is None else home.pool


class _AsyncOutput(AsyncModelRunnerOutput):
    """An output that is still being copied from the device, and the flags that were sent before it."""

    def __init__(self, inner: AsyncModelRunnerOutput, sick: Callable[[], list[Sick]]) -> None:
        self._inner, self._sick = inner, sick

    def get_output(self) -> ModelRunnerOutput:
        output = self._inner.get_output()
        if slots := self._sick():
            setattr(output, NONFINITE, slots)
        return output

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        return self._inner.get_kv_connector_output()  # type: ignore[no-any-return]  # vLLM asks since 0.33


def _with_sick_slots(output: Output, sick: Callable[[], list[Sick]]) -> Output:
    if isinstance(output, AsyncModelRunnerOutput):
        return _AsyncOutput(output, sick)
    if isinstance(output, ModelRunnerOutput) and output is not EMPTY_MODEL_RUNNER_OUTPUT and (slots := sick()):
        setattr(output, NONFINITE, slots)
    return output
