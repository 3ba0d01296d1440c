"""Two workers, tensor-parallel: heads and state are split, low-rank gates are whole on both. Or two pipeline stages."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine

SCRIPT = """
import random, sys
from serve.demo.recall_task import held_out_prompt
from support.engine import DRAFTS, RECALL, ngram

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    rng = random.Random(1)
    asked = [held_out_prompt(rng, rng.randint(1, 20)) for _ in range(40)]
    options = {"dtype": "float32", "max_num_seqs": 8, "max_model_len": 1024, "enforce_eager": True}
    options |= {"speculative_config": ngram(DRAFTS)} if DRAFTS else {}
    llm = LLM(str(RECALL), tensor_parallel_size=2, **options)
    outputs = llm.generate([prompt for prompt, _ in asked], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    right = sum(output.outputs[0].text.strip() == answer for output, (_, answer) in zip(outputs, asked))
    print("RIGHT", right, "of", len(asked))

    # A rank reports what another rank's heads saw: one state of the second rank alone becomes infinite.
    def poison(worker):
        if worker.rank == 1:
            worker.get_model().model.layers[-2].self_attn.A_log.data[0] = float("nan")

    llm.collective_rpc(poison)
    [output] = llm.generate([asked[0][0]], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    print("SICK", output.outputs[0].finish_reason)
"""


def test_two_tensor_parallel_workers(tmp_path, record_property):
    record_property("covers", "TP 2")
    script = tmp_path / "two_workers.py"  # a file, because workers are spawned and import the main module again
    script.write_text(SCRIPT)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": "tests:."}
    environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to send a function to the workers
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert "RIGHT 40 of 40" in done.stdout, done.stderr[-4000:]
    assert "SICK error" in done.stdout, done.stdout[-500:] + done.stderr[-4000:]


PIPELINE = """
import random, sys
from serve.demo.recall_task import held_out_prompt
from support.engine import RECALL

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    rng = random.Random(1)
    asked = [held_out_prompt(rng, rng.randint(1, 20)) for _ in range(40)]
    options = {"dtype": "float32", "max_num_seqs": int(sys.argv[2]), "max_model_len": 1024}
    llm = LLM(str(RECALL), pipeline_parallel_size=int(sys.argv[1]), **options)
    parameters = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate([prompt for prompt, _ in asked], parameters, use_tqdm=False)
    print("TOKENS", [list(output.outputs[0].token_ids) for output in outputs])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("partition", "sequences"), [("4,4", 8), ("5,3", 1)])
def test_two_pipeline_stages_say_what_one_says(partition, sequences, tmp_path, record_property):
    record_property("covers", "PP 2")
    script = tmp_path / "stages.py"
    script.write_text(PIPELINE)
    # vLLM's CPU runner wants its compiled model here: eager, the second stage gets no tensors from the first.
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": "tests:.",
        "TORCHDYNAMO_DISABLE": "0",
    }
    answers = []
    for stages in ("1", "2"):
        done = subprocess.run(
            [sys.executable, str(script), stages, str(sequences)],
            env=environment | ({"VLLM_PP_LAYER_PARTITION": partition} if stages == "2" else {}),
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        answers.append([line for line in done.stdout.splitlines() if line.startswith("TOKENS")])
        assert len(answers[-1]) == 1, done.stderr[-4000:]
    assert answers[0] == answers[1]
