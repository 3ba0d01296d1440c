"""The plugin's options: ``--additional-config '{"kimi": {...}}'`` as a validated, immutable object."""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kimi_vllm.cache.eviction import Eviction

_SHARED = "states and KV cache share one memory. Drop the option."
_REPLACED = {
    "state_slots": "replaced. --max-num-seqs limits running requests; --kv-cache-memory-bytes and "
    "--num-gpu-blocks-override set the memory that states and KV cache share.",
    "typical_tokens": f"nothing to set: {_SHARED}",
    "checkpoint_share": f"nothing to set: {_SHARED}",
}
"""Options of earlier versions, and what to do instead."""


class OptionsError(ValueError):
    """An option that does not exist or has an unusable value. The message names the option and what it accepts."""


class KimiOptions(BaseModel):
    """Everything that can be set, with defaults. The descriptions are the options table of the documentation."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    state_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Dtype in which KDA's recurrent state is kept. `float32` is what the checkpoint was trained with. "
        "`bfloat16` and `float16` (GPUs only) halve the state of a request, but not its records of drafts. The state "
        "is rounded once a step: for each decoded token, or once for all tokens that a step with drafts yields.",
    )
    checkpoint_interval: int = Field(
        default=0,
        ge=0,
        description="With prefix caching, also keep the state every N tokens of a prompt, rounded up to the attention "
        "block. 0 keeps only the boundaries at which a later request is likely to resume.",
    )
    eviction: Eviction = Field(
        default="value",
        description="Which checkpoint is evicted first: `value`, the one that saves the least computation, or `lru`, "
        "the least recently used.",
    )
    host_memory_gib: float = Field(
        default=0,
        ge=0,
        description="Host memory per worker, in GiB, for what would be evicted: KDA states of checkpoints and of "
        "preempted requests, and the KV cache blocks with which they can be resumed. 0 recomputes them.",
    )
    session_dir: str | None = Field(
        default=None,
        min_length=1,
        description="An existing folder for [named sessions](sessions.md): a request saves its state and KV cache, and "
        "a later one, after a restart too, goes on where it ended. On CPUs and on one GPU.",
    )
    session_gib: float = Field(
        default=0,
        ge=0,
        description="The most that sessions may take in `session_dir`, in GiB. After each save the least recently used "
        "are deleted until they do, those without a name first. 0 is no limit.",
    )
    session_prefix_tokens: int = Field(
        default=0,
        ge=0,
        description="Also keep [prefixes of requests that name no session](sessions.md#automatic-prefixes) in "
        "`session_dir`: save one that has N tokens more than those on disk, load one that has N more than memory. "
        "Needs `session_gib` and prefix caching. 0 keeps named sessions only.",
    )
    on_nonfinite: Literal["abort", "resume"] = Field(
        default="abort",
        description="What happens to a request whose state becomes NaN or infinite: `abort` ends it with an error, "
        "`resume` recomputes it once from its last good checkpoint.",
    )

    mixed_step_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Token limit of a step that mixes prompts with decoding requests, which wait for the whole step. "
        "Prompts get at least a quarter of it, even if the step then exceeds the limit. A step has up to "
        "`--max-num-batched-tokens` where nothing decodes, and where more than four prompts, and more than a quarter "
        "as many as requests decode, could be computed. 0 sets no limit, as in vLLM. Default: 2048 where CUDA graphs "
        "of that size exist, as on one GPU and with tensor parallelism; else 0.",
    )
    least_drafts_accepted: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="With `--speculative-config`: while a smaller share of drafts is accepted, steps go without, as "
        "verifying drafts may cost more than they yield; after every 64 steps some are tried. 0 always drafts, which "
        "answers with a `seed` need to be reproducible. By default 0.15 on CPUs, measured with three and five drafts, "
        "and 0 on GPUs, where other values are untried, and with `--data-parallel-size`, where they are refused.",
    )

    def least_accepted(self, *, on_cpu: bool) -> float:
        """`least_drafts_accepted`, or the default of the device."""
        return 0.15 * on_cpu if self.least_drafts_accepted is None else self.least_drafts_accepted

    @classmethod
    def of(cls, vllm_config: Any) -> Self:
        """The ``kimi`` entry of vLLM's ``--additional-config``, which nothing else reads and nobody changes.

        Args:
            vllm_config: A `VllmConfig`, or engine arguments.

        Raises:
            OptionsError: The entry is not a mapping, has an unknown key, or a value of the wrong type or range.
        """
        given = vllm_config.additional_config
        values = given.get("kimi", {}) if isinstance(given, Mapping) else {}
        if not isinstance(values, Mapping):
            raise OptionsError('--additional-config: expected {"kimi": {"option": value}}.')
        return cls.checked(values)

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """Options by name.

        Raises:
            OptionsError: See `of`.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as invalid:
            error = invalid.errors()[0]
            name = str(error["loc"][0])
            if name in _REPLACED:
                raise OptionsError(f"kimi.{name}: {_REPLACED[name]}") from None
            if name not in cls.model_fields:
                raise OptionsError(f"kimi.{name}: no such option. Known: {', '.join(cls.model_fields)}.") from None
            requirement = error["msg"].replace("Input should be", "must be")
            described = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", str(cls.model_fields[name].description))
            raise OptionsError(f"kimi.{name}={error['input']!r}: {requirement}. {described}") from None
