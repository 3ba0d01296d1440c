"""The command `kimi-vllm plan`: its options. What it says is in `plan_report.py`, imported only when it runs."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from kimi_vllm.geometry import GeometryError
from kimi_vllm.options import KimiOptions
from kimi_vllm.quantization import ONLINE, WeightFormat

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_CARDS = {"80GB": 85_017_493_504, "141GB": 150_109_880_320}
"""What CUDA can hand out on an H100 and on an H200, by the size they are sold as; read with driver 580.159."""
_FACTORS = {"": 1, "K": 2**10, "M": 2**20}


def parse_memory(text: str) -> int:
    """Bytes in "79GiB" or "1000000", or of the cards sold as "80GB" and "141GB"."""
    card = _CARDS.get(text.strip().upper())
    return card or _parse(text, _UNITS, "141GB, 80GiB or a number of bytes")


def parse_tokens(text: str) -> int:
    """Tokens in "4k" (4,096), "1M" or "1000"."""
    return _parse(text, _FACTORS, "4k, 1M or a number of tokens")


def _parse(text: str, units: dict[str, int], examples: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if not found or found[2].upper() not in units or not (number := round(float(found[1]) * units[found[2].upper()])):
        raise typer.BadParameter(f"{text!r}: expected {examples}.")
    return number


def plan(
    model: Annotated[Path, typer.Option(help="A folder with config.json, or the file. No weights are needed.")],
    memory: Annotated[
        str, typer.Option(help="Memory of one device: 80GB for an H100, 141GB for an H200, or exactly, as 79GiB.")
    ],
    tp: Annotated[int, typer.Option(min=1, help="Devices that share the model: --tensor-parallel-size.")] = 1,
    state_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="kimi.state_dtype: of KDA's recurrent state. CPUs serve float32 only."),
    ] = "float32",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Dtype of weights and KV cache; auto: as in config.json."),
    ] = "auto",
    quantization: Annotated[
        str | None,
        typer.Option(
            help=f"As for `vllm serve`: {', '.join(ONLINE)}. Default: what config.json says of the checkpoint."
        ),
    ] = None,
    kv_cache_dtype: Annotated[Literal["auto", "fp8"], typer.Option(help="As for `vllm serve`.")] = "auto",
    contexts: Annotated[str, typer.Option(help="Tokens per request to show.")] = "4k,32k,128k,1M",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="As for `vllm serve`.")] = 256,
    max_model_len: Annotated[str | None, typer.Option(help="As for `vllm serve`; default: the model's.")] = None,
    prefix_caching: Annotated[bool, typer.Option(help="Whether checkpoints are kept for later requests.")] = True,
    checkpoint_share: Annotated[float, typer.Option(help="kimi.checkpoint_share")] = KimiOptions().checkpoint_share,
    state_slots: Annotated[int | None, typer.Option(help="kimi.state_slots; default: chosen.")] = None,
    typical_tokens: Annotated[str, typer.Option(help="kimi.typical_tokens, such as 32k.")] = "8k",
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.1, max=1, help="As for `vllm serve`.")] = 0.92,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block of the KV cache.")] = 64,
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="On a CPU no more is taken than the sequences can use.")
    ] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw this file (.png, .svg, .pdf); needs matplotlib.")] = None,
) -> None:
    """Say how many requests of which length fit into memory, before you have the machine.

    Divides memory exactly as the engine does when it starts (weights, KDA state slots, KV cache), and compares one
    request with the same model made of MLA layers only, and with vLLM's own hybrid cache, whose blocks are padded.

    Example: kimi-vllm plan --model configs/models/48b-a3b --memory 141GB
    """
    import torch

    from kimi_vllm.cli.plan_report import Plan, draw, read_model, show
    from kimi_vllm.planning import Demand, PlanError

    try:
        options = KimiOptions.checked(
            state_slots=state_slots, typical_tokens=parse_tokens(typical_tokens), checkpoint_share=checkpoint_share
        )
        geometry, written, longest, stored = read_model(model)
        if quantization is not None and stored is None:
            stored = WeightFormat.online(quantization)
        if quantization is not None and stored is not None and quantization != stored.method:
            raise PlanError(
                f"--quantization {quantization}: the checkpoint says it is {stored.method}. Drop the option."
            )
        shown = tuple(parse_tokens(context) for context in contexts.split(","))
        weights: torch.dtype = written if dtype == "auto" else getattr(torch, dtype)
        if kv_cache_dtype == "fp8" and (device == "cpu" or weights == torch.float32):
            raise PlanError(
                "--kv-cache-dtype fp8: kimi-vllm on CPUs and in float32 keeps latents in the model's dtype."
            )
        demand = Demand(
            max_num_seqs=max_num_seqs,
            max_model_len=parse_tokens(max_model_len) if max_model_len else longest or max(shown),
            block_size=block_size,
            prefix_caching=prefix_caching,
            checkpoint_share=options.checkpoint_share,
            state_slots=options.state_slots,
            typical_tokens=options.typical_tokens,
            fill=device == "cuda",
        )
        made = Plan(
            model=str(model),
            geometry=geometry,
            itemsize=weights.itemsize,
            gpu_dtype=weights if device == "cuda" else None,
            quantization=stored,
            cache_itemsize=1 if kv_cache_dtype == "fp8" else weights.itemsize,
            ranks=tp,
            state_dtype=getattr(torch, state_dtype),
            memory=parse_memory(memory),
            utilization=gpu_memory_utilization,
            demand=demand,
            contexts=shown,
        )
        made.sizing  # noqa: B018  computed now, so that what does not fit is said here
    except (GeometryError, PlanError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))
    else:
        show(made)
    if plot is not None:
        draw(made, plot)
