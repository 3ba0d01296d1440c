"""The load generators: `vllm bench serve`, and GuideLLM where it is installed. This file only words their commands."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.common.server import end, program
from serve.load.scenario import Point, RandomWorkload, ScenarioError
from serve.load.traffic import CHUNK, trace

PERCENTILES = (50, 90, 99)
LISTS = ("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "generated_texts")
LISTS += ("errors",)
TERM_SECONDS = 5


class GeneratorError(Exception):
    """A load generator that failed; the message has the end of its output."""


@dataclass(frozen=True, slots=True)
class Target:
    """Who is asked."""

    url: str  # without /v1
    model: str  # as the server calls it
    tokenizer: str  # folder or hub name, for the generator to count with
    # objectives as `vllm bench serve --goodput` takes them, such as `ttft:500`, in milliseconds
    goodput: tuple[str, ...] = ()


def command(point: Point, target: Target, folder: Path) -> list[str]:
    """The command line of a point; writes the trace that it replays, if it has one.

    Raises:
        ScenarioError: the point wants GuideLLM and there is none.
    """
    if point.part.engine == "guidellm":
        if not shutil.which(program("guidellm")):
            raise ScenarioError(f"part {point.part.name!r} wants GuideLLM: pip install guidellm, or engine: vllm")
        return _guidellm(point, target, folder)
    words = [program("vllm"), "bench", "serve", "--backend", "openai", "--base-url", target.url]
    words += ["--model", target.tokenizer, "--served-model-name", target.model, "--tokenizer", target.tokenizer]
    words += ["--num-prompts", str(point.num_requests), "--seed", str(point.number), "--temperature", "0"]
    workload = point.part.workload
    if isinstance(workload, RandomWorkload):
        words += ["--dataset-name", "random", "--ignore-eos", "--random-input-len", str(point.prompt)]
        words += ["--random-output-len", str(workload.output), "--random-prefix-len", str(workload.prefix)]
        words += ["--random-range-ratio", str(workload.spread)]
    else:
        path = folder / f"{point.number:02}.trace.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in trace(workload)))
        words += ["--dataset-name", "timed_trace", "--dataset-path", str(path)]
        words += ["--timed-trace-chunk-hash-size", str(CHUNK)]
    if point.concurrency:
        words += ["--max-concurrency", str(point.concurrency)]
    if point.rate:
        words += ["--request-rate", f"{point.rate:g}", "--burstiness", f"{point.part.burstiness:g}"]
    words += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", ",".join(map(str, PERCENTILES))]
    words += ["--save-result", "--save-detailed", "--result-dir", str(folder), "--disable-tqdm"]
    words += ["--result-filename", result_name(point)]
    return [*words, *(["--goodput", *target.goodput] if target.goodput else [])]


def result_name(point: Point) -> str:
    """File that the generator writes."""
    return f"{point.number:02}.{point.part.engine}.json"


def _guidellm(point: Point, target: Target, folder: Path) -> list[str]:
    """For GuideLLM 0.8, which renamed its options."""
    workload = point.part.workload
    assert isinstance(workload, RandomWorkload)
    if point.concurrency:
        profile = f"kind=concurrent,streams={point.concurrency}"
    else:
        profile = f"kind=poisson,rate={point.rate:g}"
    words = [program("guidellm"), "run", "--profile", profile, "--disable-progress"]
    words += ["--backend", f"kind=openai_http,target={target.url},model={target.model}"]
    words += ["--tokenizer", f"kind=huggingface_auto,model={target.tokenizer}"]
    words += ["--data", f"kind=synthetic_text,prompt_tokens={point.prompt},output_tokens={workload.output}"]
    words += ["--constraint", f"kind=max_requests,count={point.num_requests}"]
    return [*words, "--output", f"kind=json,path={folder / result_name(point)}"]


def run(words: list[str], point: Point, folder: Path, tick: Callable[[], None]) -> dict[str, Any]:
    """Run a generator to its end and return its numbers, lists left out; `tick` is called four times a second.

    Raises:
        GeneratorError: it failed.
    """
    log = folder / f"{point.number:02}.log"
    # A trace names its tokens by Python's hash of texts, which is another in every process unless it is fixed.
    environment = {**os.environ, "PYTHONHASHSEED": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us: we end it and write the report
        )
        try:
            while process.poll() is None:
                time.sleep(0.25)
                tick()
        finally:
            end(process, TERM_SECONDS)
    result = folder / result_name(point)
    if process.returncode != 0 or not result.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise GeneratorError(f"status {process.returncode}; the end of {log}:\n{tail}")
    if point.part.engine == "guidellm":
        return guidellm_numbers(json.loads(result.read_text()))
    return {name: value for name, value in json.loads(result.read_text()).items() if name not in LISTS}


def guidellm_numbers(report: dict[str, Any]) -> dict[str, Any]:
    """GuideLLM's numbers under the names of `vllm bench serve`; times in milliseconds."""
    metrics = report["benchmarks"][0]["metrics"]

    def of(name: str) -> dict[str, Any]:
        return metrics[name]["successful"]

    totals = metrics["request_totals"]
    numbers = {
        "completed": totals["successful"],
        "failed": totals["errored"],
        "request_throughput": of("requests_per_second")["mean"],
        "output_throughput": of("output_tokens_per_second")["mean"],
    }
    names = {"ttft": "time_to_first_token_ms", "tpot": "time_per_output_token_ms", "itl": "inter_token_latency_ms"}
    for ours, theirs in names.items():
        for percentile in PERCENTILES:
            numbers[f"p{percentile}_{ours}_ms"] = of(theirs)["percentiles"][f"p{percentile}"]
    return numbers
