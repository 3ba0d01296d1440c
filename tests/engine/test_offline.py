"""serve/batch with a real server: killed in the middle, then run again, no id is lost and none is there twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from support.engine import RECALL

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.engine

NUM_REQUESTS = 160
SERVER = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager"]


def make_input(path):
    """Questions that training never saw; the right answer is the end of each id."""
    import random

    from serve.demo.recall_task import held_out_prompt

    rng = random.Random(0)
    with path.open("w") as lines:
        for number in range(NUM_REQUESTS):
            prompt, expected = held_out_prompt(rng, 4, 0)
            chat = number % 2
            asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
            body = {"model": "kimi", "max_tokens": 24, "temperature": 0, "ignore_eos": True, **asked}
            url = "/v1/chat/completions" if chat else "/v1/completions"
            request = {"custom_id": f"{number}:{expected}", "method": "POST", "url": url, "body": body}
            lines.write(json.dumps(request) + "\n")
        lines.write("this is no request\n")
        too_long = {"model": "kimi", "prompt": "a=1 " * 600, "max_tokens": 1}
        request = {"custom_id": "long", "method": "POST", "url": "/v1/completions", "body": too_long}
        lines.write(json.dumps(request) + "\n")


def start(folder):
    command = [sys.executable, "-m", "serve.batch", "in.jsonl", "out.jsonl", "--model", str(RECALL)]
    return subprocess.Popen(
        [*command, "--concurrency", "12", "--", *SERVER],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes_of(folder):
    """Command lines of processes whose working directory this is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder and not (process / "stat").read_text().split(") ")[1].startswith(
                "Z"
            ):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def text_of(answer):
    [choice] = answer["response"]["body"]["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_every_id_is_there_once(tmp_path):
    make_input(tmp_path / "in.jsonl")
    output = tmp_path / "out.jsonl"
    first = start(tmp_path)
    try:
        deadline = time.monotonic() + 240
        while not output.exists() or output.read_bytes().count(b"\n") < 30:
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    before = output.read_bytes()
    done = before.count(b"\n")
    assert 30 <= done < NUM_REQUESTS, "too late to kill it in the middle"
    with output.open("ab") as file:
        file.write(before[:100])  # as if it had died while it wrote
    second = start(tmp_path)
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 1, said  # two lines cannot be answered
    assert f"{NUM_REQUESTS + 1 - done} requests to do, {done} done already, 1 bad lines" in said
    assert f"{NUM_REQUESTS - done} answered in" in said
    assert "2 failed" in said

    assert output.read_bytes().startswith(before)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    expected = [
        json.loads(line)["custom_id"] for line in (tmp_path / "in.jsonl").read_text().splitlines()[:NUM_REQUESTS]
    ]
    assert Counter(answer["custom_id"] for answer in answers) == Counter(expected)
    right = sum(text_of(answer).strip().startswith(answer["custom_id"].split(":")[1]) for answer in answers)
    assert right >= 0.98 * NUM_REQUESTS
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert {error["line"] for error in errors} == {NUM_REQUESTS + 1, NUM_REQUESTS + 2}
    [refused] = [error for error in errors if error["custom_id"] == "long"]
    assert refused["error"]["status_code"] == 400
    assert "maximum context length is 512" in refused["error"]["message"]
    # The kernel ended the first server with its parent: nothing of either run is left.
    while processes_of(tmp_path.resolve()):
        assert time.monotonic() < deadline, "a server outlived its batch"
        time.sleep(0.1)
