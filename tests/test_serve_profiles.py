"""configs/serve: vLLM's own parser reads each profile, each value arrives, and as many requests fit as it says."""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kimi_vllm.cli.plan import parse_memory
from kimi_vllm.cli.plan_data import Plan, read_model
from kimi_vllm.planning import Demand
from kimi_vllm.quantization import WeightFormat

ROOT = Path(__file__).parents[1]
RECALL = ROOT / "configs" / "models" / "recall"
PROFILES = sorted((ROOT / "configs" / "serve").glob("*.yaml"))
ON_GPUS = [path for path in PROFILES if not path.stem.startswith("cpu")]
MILLION = 2**20
# What a profile is for, in words of vLLM's EngineArgs.
INTENDED: dict[str, dict[str, Any]] = {
    "cpu-demo": {
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 256 * 2**20,
        "enforce_eager": True,
        "override_generation_config": {"temperature": 0},
        "shutdown_timeout": 20,
    },
    "h200-1gpu-1m": {
        "dtype": "bfloat16",
        "max_num_seqs": 32,
        "max_model_len": MILLION,
        "tensor_parallel_size": 1,
        "shutdown_timeout": 300,
        "additional_config": {"kimi": {"checkpoint_interval": 65536}},
    },
    "h100-1gpu-fp8": {
        "quantization": "fp8",
        "dtype": "bfloat16",
        "max_num_seqs": 192,
        "max_model_len": 131072,
        "tensor_parallel_size": 1,
        "shutdown_timeout": 120,
    },
    "h100-4gpu": {"max_num_seqs": 128, "max_model_len": MILLION, "tensor_parallel_size": 4, "shutdown_timeout": 120},
    "throughput": {
        "max_num_seqs": 384,
        "max_model_len": 32768,
        "max_num_batched_tokens": 16384,
        "additional_config": {"kimi": {"mixed_step_tokens": 0}},
        "shutdown_timeout": 120,
    },
    "latency": {
        "max_num_seqs": 8,
        "max_model_len": 131072,
        "performance_mode": "interactivity",
        "shutdown_timeout": 60,
    },
}


def parser() -> Any:
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))


def parse(path: Path) -> Namespace:
    """As `vllm serve MODEL --config path` does."""
    args: Namespace = parser().parse_args([str(RECALL), "--config", str(path)])
    args.model = args.model_tag
    return args


def engine_args(path: Path) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs.from_cli_args(parse(path))


def test_every_profile_has_its_intentions_written_here() -> None:
    assert {path.stem for path in PROFILES} == set(INTENDED)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_key_is_an_option_of_vllm_by_its_full_name(path: Path) -> None:
    # The parser alone would not do: it drops `false` for a key it does not know, and takes abbreviations.
    known = parser()._option_string_actions
    assert [key for key in yaml.safe_load(path.read_text()) if f"--{key}" not in known] == []


@pytest.mark.parametrize("line", ["max-num-sequences: 8", "no-such-option: true"])
def test_an_unknown_key_fails(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text((ROOT / "configs" / "serve" / "latency.yaml").read_text() + line)
    with pytest.raises(SystemExit):
        parse(profile)
    assert f"unrecognized arguments: --{line.split(':')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_values_arrive(path: Path) -> None:
    args = engine_args(path)
    intended = INTENDED[path.stem]
    assert {name: getattr(args, name) for name in intended} == intended
    written = yaml.safe_load(path.read_text())
    for key, value in written.items():
        arrived = getattr(parse(path), key.replace("-", "_"))
        if isinstance(value, dict) and not isinstance(arrived, dict):
            arrived = {name: getattr(arrived, name) for name in value}
        assert arrived == value, key


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_option_has_its_reason_above_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    first = [number for number, line in enumerate(lines) if re.match(r"[a-z]", line)]
    assert len(first) == len(yaml.safe_load(path.read_text()))
    # The two options of tool calling share one.
    bare = [lines[n] for n in first if not lines[n - 1].startswith("#")]
    assert bare == ["tool-call-parser: kimi_k2"]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_tool_calls_are_parsed_and_reasoning_is_not(path: Path) -> None:
    args = parse(path)
    assert (args.enable_auto_tool_choice, args.tool_call_parser) == (True, "kimi_k2")
    assert not args.reasoning_parser


def planned(path: Path) -> Plan:
    """What `kimi-vllm plan` says for the profile's GPUs."""
    args = engine_args(path)
    geometry, dtype, *_ = read_model(ROOT / "configs" / "models" / "48b-a3b")
    return Plan(
        model=args.model,
        geometry=geometry,
        itemsize=dtype.itemsize,
        gpu_dtype=torch.bfloat16,
        quantization=WeightFormat.online(args.quantization) if args.quantization else None,
        cache_itemsize=dtype.itemsize,
        ranks=args.tensor_parallel_size,
        state_dtype=torch.float32,
        memory=parse_memory("80GB" if path.stem.startswith("h100") else "141GB"),
        utilization=args.gpu_memory_utilization,
        demand=Demand(args.max_num_seqs, args.max_model_len, 64, bool(args.enable_prefix_caching)),
        contexts=(args.max_model_len,),
        lengths={},
    )


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_one_request_of_full_length_fits_and_all_that_may_run_do_if_they_are_short(path: Path) -> None:
    plan = planned(path)
    plan.check()
    assert plan.capacity.concurrency(4096) >= plan.demand.max_num_seqs


def test_numbers_in_the_comments_are_those_of_the_planner() -> None:
    fits = {path.stem: planned(path).capacity.concurrency for path in ON_GPUS}
    assert [min(128, fits["h100-4gpu"](tokens)) for tokens in (MILLION, 131072, 32768)] == [5, 45, 128]
    assert fits["h100-4gpu"](4096) >= 1024
    assert fits["throughput"](4096) == 451
    assert fits["h200-1gpu-1m"](131072) == 31
    assert fits["h100-1gpu-fp8"](8192) == 212
    costs = {path.stem: planned(path).costs for path in ON_GPUS}
    assert round(costs["h100-4gpu"].state / 2**20, 1) == 10.5
    assert round(16 * costs["h200-1gpu-1m"].state / 2**30, 1) == 0.7
    assert round(costs["h200-1gpu-1m"].weights / 2**30, 1) == 91.6
    assert round(costs["h100-1gpu-fp8"].weights / 2**30, 1) == 46.5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(RECALL)


def request(**fields: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(messages=[{"role": "user", "content": "?"}], model="m", **fields)


def test_the_parser_of_the_profiles_reads_the_markup_of_kimi(tokenizer: Any) -> None:
    from vllm.tool_parsers import ToolParserManager

    call = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
    calls = call.format("look_up", 0, '{"key": "k"}') + call.format("add", 1, '{"a": 1, "b": [2]}')
    text = f"One moment.<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>"
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("look_up", "add")]
    asked = request(tools=tools)
    found = ToolParserManager.get_tool_parser("kimi_k2")(tokenizer, asked.tools).extract_tool_calls(text, asked)
    assert found.tools_called
    assert found.content == "One moment."
    called = [(call.id, call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls]
    assert called == [("functions.look_up:0", "look_up", {"key": "k"}), ("functions.add:1", "add", {"a": 1, "b": [2]})]


def test_a_reasoning_parser_would_take_the_answer_of_a_model_that_does_not_reason(tokenizer: Any) -> None:
    from vllm.reasoning import ReasoningParserManager

    parser = ReasoningParserManager.get_reasoning_parser("kimi_k2")(tokenizer)
    reasoning, content = parser.extract_reasoning("Paris.", request())
    assert (reasoning, content or "") == ("Paris.", "")
