"""The command `kimi-vllm plan`: its options. `plan_data.py` computes, `plan_report.py` shows."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from kimi_vllm.quantization import ONLINE, WeightFormat

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_CARDS = {"80GB": 85_017_493_504, "141GB": 150_109_880_320}
"""Bytes that CUDA can hand out on an H100 and on an H200, by nominal size; read with driver 580.159."""
_FACTORS = {"": 1, "K": 2**10, "M": 2**20}


def parse_memory(text: str) -> int:
    """Bytes in "79GiB" or "1000000", or of the cards sold as "80GB" and "141GB"."""
    card = _CARDS.get(text.strip().upper())
    return card or _parse(text, _UNITS, "141GB, 80GiB or a number of bytes")


def parse_cache_memory(text: str) -> int:
    """Bytes in "32G", which vLLM takes for 32 GiB, "32g" for 32 GB, "31.87GiB" as its log says, or "34000000000"."""
    # Upper case is binary to vLLM.
    text = re.sub(r"(?<=\d)\s*([KMGT])$", r"\1iB", re.sub(r"(?<=\d)\s*([kmgt])$", r"\1B", text.strip()))
    return _parse(text, _UNITS, "32G, 31.87GiB or a number of bytes")


def parse_tokens(text: str) -> int:
    """Tokens in "4k" (4,096), "1M" or "1000"."""
    return _parse(str(text), _FACTORS, "4k, 1M or a number of tokens")


def parse_lengths(text: str) -> dict[int, float]:
    """Shares by tokens in "1K:0.5,8K:0.4,128K:0.1"; scaled so that they add up to 1."""
    shares = {}
    for part in text.split(","):
        tokens, _, share = part.partition(":")
        try:
            shares[parse_tokens(tokens)] = float(share)
        except ValueError:
            raise typer.BadParameter(f"{part!r}: expected a length and its share, as 8K:0.4.") from None
    total = sum(shares.values())
    if not 0 < total < float("inf") or min(shares.values()) < 0:
        raise typer.BadParameter(f"{text!r}: expected shares above 0.")
    return {tokens: share / total for tokens, share in shares.items()}


def _parse(text: str, units: dict[str, int], examples: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if not found or found[2].upper() not in units or not (number := round(float(found[1]) * units[found[2].upper()])):
        raise typer.BadParameter(f"{text!r}: expected {examples}.")
    return number


_Model = Annotated[Path, typer.Option(help="config.json, or a folder with one. No weights are needed.")]
_Memory = Annotated[
    int, typer.Option(parser=parse_memory, help="Memory per device: 80GB (H100), 141GB (H200), or exactly: 79GiB.")
]
_Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(help="Dtype of weights and KV cache; auto: as in config.json."),
]
_Quantization = Annotated[
    str | None, typer.Option(help=f"As for `vllm serve`: {', '.join(ONLINE)}. Default: the checkpoint's own.")
]
_StateDtype = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="kimi.state_dtype; float32 only on CPUs.")
]
_Device = Annotated[
    Literal["cuda", "cpu"], typer.Option(help="On a CPU there are no more blocks than the sequences can fill.")
]
_Lengths = Annotated[
    dict[int, float] | None,
    typer.Option(parser=parse_lengths, help="Lengths of those that run, in shares: 1K:0.5,8K:0.4,128K:0.1."),
]
_Plot = Annotated[Path | None, typer.Option(help="Also draw this file (.png, .svg, .pdf); needs matplotlib.")]
_Drafts = Annotated[
    int,
    typer.Option(min=0, help="num_speculative_tokens of --speculative-config: a state keeps records of so many."),
]
_AS_VLLM = "As for `vllm serve`."
_CacheMemory = Annotated[
    int | None,
    typer.Option(
        parser=parse_cache_memory,
        help="As for `vllm serve` (32G), or what an engine has logged as available (31.87GiB): nothing is estimated.",
    ),
]


def plan(
    model: _Model,
    memory: _Memory,
    tp: Annotated[int, typer.Option(min=1, help="Devices: --tensor-parallel-size.")] = 1,
    state_dtype: _StateDtype = "float32",
    dtype: _Dtype = "auto",
    quantization: _Quantization = None,
    kv_cache_dtype: Annotated[Literal["auto", "fp8"], typer.Option(help=_AS_VLLM)] = "auto",
    contexts: Annotated[str, typer.Option(help="Tokens per request, a table row each.")] = "1k,4k,32k,128k,1M",
    lengths: _Lengths = None,
    speculative_tokens: _Drafts = 0,
    max_num_seqs: Annotated[int, typer.Option(min=1, help=_AS_VLLM)] = 1024,
    max_model_len: Annotated[int | None, typer.Option(parser=parse_tokens, help=_AS_VLLM)] = None,
    prefix_caching: Annotated[bool, typer.Option(help=_AS_VLLM)] = True,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.1, max=1, help=_AS_VLLM)] = 0.92,
    kv_cache_memory_bytes: _CacheMemory = None,
    block_size: Annotated[int, typer.Option(min=1, help=_AS_VLLM)] = 64,
    device: _Device = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: _Plot = None,
) -> None:
    """Size a deployment from config.json: how many requests of which length fit into memory.

    Counts the blocks that are left beside weights and activations, which the engine measures instead, and what a state
    and the KV cache take of them. Compares with the same model made of MLA layers only, and with vLLM's own hybrid
    cache, whose blocks are padded.

    Example: kimi-vllm plan --model configs/models/48b-a3b --memory 141GB
    """
    import torch

    from kimi_vllm.cli import plan_data, plan_report
    from kimi_vllm.planning import Demand

    try:
        geometry, written, longest, stored = plan_data.read_model(model)
        weights: torch.dtype = written if dtype == "auto" else getattr(torch, dtype)
        shown = tuple(map(parse_tokens, contexts.split(",")))
        made = plan_data.Plan(
            model=str(model),
            geometry=geometry,
            itemsize=weights.itemsize,
            gpu_dtype=weights if device == "cuda" else None,
            quantization=_format(quantization, stored),
            cache_itemsize=1 if kv_cache_dtype == "fp8" else weights.itemsize,
            ranks=tp,
            state_dtype=getattr(torch, state_dtype),
            memory=memory,
            utilization=gpu_memory_utilization,
            demand=Demand(
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len or longest or max(shown),
                block_size=block_size,
                prefix_caching=prefix_caching,
            ),
            contexts=shown,
            lengths=lengths or {},
            speculative_tokens=speculative_tokens,
            cache_memory=kv_cache_memory_bytes,
        )
        made.check()
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))
    else:
        plan_report.show(made)
    if plot is not None:
        plan_report.draw(made, plot)


def _format(asked: str | None, stored: WeightFormat | None) -> WeightFormat | None:
    if asked is None:
        return stored
    if stored is not None and asked != stored.method:
        raise ValueError(f"--quantization {asked}: the checkpoint is quantised by {stored.method}. Drop the option.")
    return stored or WeightFormat.online(asked)
