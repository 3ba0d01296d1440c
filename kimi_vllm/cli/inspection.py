"""What the KDA layers of a checkpoint do with a prompt: their states, how fast they fade, whether a step can grow one.

The model is transformers' `KimiLinearForCausalLM`, with hooks on the projections of each KDA layer. From there on
everything is `kernels/reference.py` in float64, so no formula is stated twice. The whole model must fit into memory in
the checkpoint's dtype, with one layer's activations.

A step maps S to A·S + write, with A = (I - beta·k·k^T)·Diag(alpha). With |k| <= 1 and beta in [0, 1] the spectral norm
of A is at most the largest alpha, hence at most 1; that bound is checked by singular values. The product
max(alpha)·(1 + beta·|k|^2), sometimes used instead, exceeds 1 in sound models.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kimi_vllm.geometry import GeometryError, KimiGeometry
from kimi_vllm.kernels.contract import Activations, Weights
from kimi_vllm.kernels.reference import Features, features, kda_chunk, kda_recurrent

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
DEFAULT_SAMPLES = 32
SLACK = 1e-9
"""Tolerance for rounding of singular values in float64; a broken gate exceeds the bound by far more."""


class InspectionError(ValueError):
    """The checkpoint or prompt cannot be inspected. Says what to do."""


@dataclass(frozen=True, slots=True)
class Head:
    """One head of one KDA layer after a prompt. Both are counted from 0.

    Attributes:
        state_norm, state_max: Frobenius norm and largest magnitude of the state after the last token.
        norms: Frobenius norms after each sampled token.
        finite: True if the last state is finite in float32, in which it is served.
        alpha: Quantiles `QUANTILES` of the decay over tokens and channels.
        memory_median, memory_slowest: Tokens until the median and the slowest channel have faded to 1/e, at their mean
            log decay over the prompt.
        beta_mean, beta_min, beta_max: Write strength over tokens.
        spectral_norm, spectral_radius, bound: Largest norm of a sampled transition; the magnitude of its largest
            eigenvalue, and its largest alpha, which the norm must not exceed.
        excess: Maximum of norm minus bound over sampled tokens; negative if there is room.
        bounded: True if no norm exceeds its bound, and no alpha exceeds 1.
    """

    layer: int
    head: int
    state_norm: float
    state_max: float
    norms: list[float]
    finite: bool
    alpha: list[float]
    memory_median: float
    memory_slowest: float
    beta_mean: float
    beta_min: float
    beta_max: float
    spectral_norm: float
    spectral_radius: float
    bound: float
    excess: float
    bounded: bool

    @property
    def sound(self) -> bool:
        """Finite and bounded."""
        return self.finite and self.bounded

    @property
    def badness(self) -> tuple[bool, bool, float]:
        """Sort key: not finite comes first, earliest layer before later ones, because NaN spreads to later layers."""
        if not self.finite:
            return True, False, -self.layer
        return False, not self.bounded, self.state_max


@dataclass(frozen=True, slots=True)
class Inspection:
    """All heads of all KDA layers after one prompt.

    Attributes:
        positions: The sampled tokens, counted from 0, the last token included.
    """

    model: str
    dtype: str
    num_tokens: int
    positions: tuple[int, ...]
    heads: tuple[Head, ...]

    @property
    def sound(self) -> bool:
        """Whether every head is."""
        return all(head.sound for head in self.heads)

    def by_layer(self) -> dict[int, list[Head]]:
        """The heads of each KDA layer."""
        return {layer: list(heads) for layer, heads in groupby(self.heads, attrgetter("layer"))}


@torch.no_grad()
def inspect_state(folder: Path, tokens: Sequence[int], every: int | None = None) -> Inspection:
    """Run a checkpoint over a prompt.

    Args:
        folder: The checkpoint.
        tokens: The prompt.
        every: Sample every N-th token. Default: about `DEFAULT_SAMPLES` samples.

    Raises:
        InspectionError: The checkpoint cannot be loaded whole, or the prompt has tokens outside its vocabulary.
    """
    geometry = read_geometry(folder)
    if not tokens:
        raise InspectionError("the prompt has no tokens.")
    if strangers := [token for token in tokens if not 0 <= token < geometry.vocab_size]:
        raise InspectionError(f"token {strangers[0]} is not in 0..{geometry.vocab_size - 1}, the model's vocabulary.")
    model = load_model(folder)
    positions = sampled(len(tokens), every)
    heads: list[Head] = []
    for index, layer in enumerate(model.model.layers):
        if geometry.kda[index]:
            _listen(layer.self_attn, partial(describe, index, positions), heads)
    # Without lm_head: logits are not needed.
    model.model(torch.tensor([list(tokens)]), use_cache=False)
    dtype = str(model.dtype).removeprefix("torch.")
    return Inspection(str(folder), dtype, len(tokens), positions, tuple(heads))


def read_geometry(folder: Path) -> KimiGeometry:
    """The checkpoint's geometry, before anything heavy is loaded."""
    path = folder / "config.json"
    if not path.is_file():
        raise InspectionError(f"{path} does not exist: MODEL is the folder of a checkpoint; nothing is downloaded.")
    try:
        return KimiGeometry.from_config(json.loads(path.read_text()))
    except (GeometryError, json.JSONDecodeError) as error:
        raise InspectionError(f"{path}: {error}") from error


def parse_tokens(text: str) -> list[int]:
    """``1,2,3`` to a list."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InspectionError(f"{text!r}: expected token ids with commas between them, such as 1,2,3.") from error


def tokenize(folder: Path, prompt: str, *, trust_remote_code: bool = False) -> list[int]:
    """A text to tokens by the checkpoint's tokenizer, special tokens added as it does by itself."""
    from transformers import AutoTokenizer

    read_geometry(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise InspectionError(
            f"the tokenizer in {folder} does not load ({error}). Give --tokens instead of --prompt; "
            "--trust-remote-code runs the tokenizer's own Python code, if you trust it."
        ) from error
    return list(tokenizer(prompt).input_ids)


def load_model(folder: Path) -> Any:
    """Load it with transformers, in the checkpoint's dtype; what forms the decay stays fp32, as when served."""
    try:
        from transformers import KimiLinearForCausalLM
    except ImportError as error:
        raise InspectionError(f"transformers 5.19 or newer has Kimi Linear; here: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise InspectionError(
            f"the weights take {size / 2**30:.1f} GiB and this machine has {memory / 2**30:.1f}: inspect-state holds "
            "the whole model in memory. Use a bigger machine or a smaller checkpoint."
        )
    options = {"dtype": "auto", "local_files_only": True, "ignore_mismatched_sizes": True}
    try:
        model, report = KimiLinearForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
        raise InspectionError(f"transformers does not load {folder}: {error}") from error
    # transformers goes on, with random numbers for what is missing or does not fit. A_log is read below.
    mismatched = (name for name, *_ in report["mismatched_keys"] if not name.endswith(".A_log"))
    for complaint, names in (
        ("lacks tensors", report["missing_keys"]),
        ("has tensors that belong nowhere", report["unexpected_keys"]),
        ("has tensors of a wrong shape", mismatched),
    ):
        if listed := sorted(names):
            raise InspectionError(f"{folder} {complaint}: {', '.join(listed[:8])}")
    for path in files:
        _load_decay(model, path)
    return model.eval()


def _load_decay(model: Any, path: Path) -> None:
    """A_log and dt_bias again: transformers rounds them to the model's dtype, and knows one of A_log's two shapes."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith((".self_attn.A_log", ".self_attn.dt_bias")):
                *_, layer, _, parameter = name.split(".")
                gate = model.model.layers[int(layer)].self_attn.forget_gate
                exact = file.get_tensor(name).float().view_as(getattr(gate, parameter))
                setattr(gate, parameter, nn.Parameter(exact, requires_grad=False))


def sampled(num_tokens: int, every: int | None) -> tuple[int, ...]:
    """The last of each `every` tokens, and the last of all."""
    every = every or -(-num_tokens // DEFAULT_SAMPLES)
    return tuple(sorted({*range(every - 1, num_tokens, every), num_tokens - 1}))


def _listen(layer: Any, reduce: Callable[[Features], list[Head]], heads: list[Head]) -> None:
    """Reduce a layer's features as soon as it has run: those of all layers would not fit into memory."""
    heard: dict[str, Tensor] = {}
    projections = {
        "q": layer.q_proj,
        "k": layer.k_proj,
        "v": layer.v_proj,
        "gate": layer.forget_gate.f_b_proj,
        "beta": layer.b_proj,
        "out_gate": layer.g_b_proj,
    }

    def hear(name: str, _module: nn.Module, _args: object, output: Tensor) -> None:
        heard[name] = output[0]

    def finish(_module: nn.Module, _args: object, _output: object) -> None:
        qkv = torch.cat([heard["q"], heard["k"], heard["v"]], -1)
        taps = layer.conv1d.weight.squeeze(1).T
        history = torch.zeros(len(taps) - 1, qkv.shape[1], dtype=torch.float64)
        decay, norm = layer.forget_gate, layer.o_norm
        weights = Weights(taps, decay.A_log.flatten(), decay.dt_bias, norm.weight, norm.variance_epsilon)
        x = Activations(qkv, heard["gate"], heard["beta"], heard["out_gate"])
        heads.extend(reduce(features(x, history, weights)))
        heard.clear()

    for name, module in projections.items():
        module.register_forward_hook(partial(hear, name))
    layer.register_forward_hook(finish)


def describe(layer: int, positions: Sequence[int], x: Features) -> list[Head]:
    """Reduce the features of one layer, ``[T, H, ...]`` in float64, to a description of each head."""
    num_heads, head_dim = x.k.shape[1:]
    state = x.k.new_zeros(num_heads, head_dim, head_dim)
    norms, spectral, start = [], [], 0
    for position in positions:
        _, state = kda_chunk(*Features(*(feature[start : position + 1] for feature in x)), state)
        norms.append(state.norm(dim=(-2, -1)))
        spectral.append(spectral_norms(transition(x, position)))
        start = position + 1
    norms_at, spectral_at = torch.stack(norms, 1), torch.stack(spectral, 1)
    bound_at = x.g[list(positions)].exp().amax(-1).T
    excess = (spectral_at - bound_at).amax(1)
    alpha, memory = x.g.exp().transpose(0, 1).flatten(1), -1 / x.g.mean(0)
    every, worst = range(num_heads), spectral_at.argmax(1).tolist()
    radius = [spectral_radius(transition(x, positions[worst[head]])[head]) for head in every]
    described = {
        "state_norm": norms_at[:, -1],
        "state_max": state.abs().amax((1, 2)),
        "norms": norms_at,
        "finite": state.float().isfinite().flatten(1).all(1),
        "alpha": alpha.quantile(torch.tensor(QUANTILES, dtype=alpha.dtype), dim=1).T,
        "memory_median": memory.median(1).values,
        "memory_slowest": memory.amax(1),
        "beta_mean": x.beta.mean(0),
        "beta_min": x.beta.amin(0),
        "beta_max": x.beta.amax(0),
        "spectral_norm": spectral_at[every, worst],
        "spectral_radius": torch.tensor(radius, dtype=alpha.dtype),
        "bound": bound_at[every, worst],
        "excess": excess,
        "bounded": (excess <= SLACK) & (alpha.amax(1) <= 1),
    }
    columns: dict[str, list[Any]] = {name: values.tolist() for name, values in described.items()}
    return [Head(layer, head, **{name: values[head] for name, values in columns.items()}) for head in every]


def transition(x: Features, position: int) -> Tensor:
    """A of one token, ``[H, K, K]``: what a step of the reference makes of the identity when nothing is written.

    The reference's states are ``[V, K]``, so this is the transpose of the paper's A; norm and eigenvalues are the same.
    """
    step = Features(*(feature[position : position + 1] for feature in x._replace(v=torch.zeros_like(x.v))))
    identity = torch.eye(x.k.shape[2], dtype=x.k.dtype).expand(x.k.shape[1], -1, -1)
    _, after = kda_recurrent(*step, identity)
    return after


def spectral_norms(matrices: Tensor) -> Tensor:
    """Largest singular values, ``[N, K, K]`` to ``[N]``; NaN where a matrix is not finite, which LAPACK refuses."""
    finite = matrices.isfinite().all(-1).all(-1)
    norms = torch.full_like(matrices[:, 0, 0], float("nan"))
    norms[finite] = torch.linalg.matrix_norm(matrices[finite], ord=2)
    return norms


def spectral_radius(matrix: Tensor) -> float:
    """Magnitude of the largest eigenvalue; NaN if the matrix is not finite."""
    return float(torch.linalg.eigvals(matrix).abs().max()) if matrix.isfinite().all() else float("nan")
