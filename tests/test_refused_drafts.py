"""Drafts that have not run, or that kernels do not take, are refused, and the message says what is possible."""

from types import SimpleNamespace

import pytest
from support.engine import RECALL
from vllm.engine.arg_utils import AsyncEngineArgs

from kimi_vllm import refusals
from kimi_vllm.refusals import REFUSALS, refuse_unserved


def ngram(**options):
    drafts = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}
    return AsyncEngineArgs(
        str(RECALL), skip_tokenizer_init=True, max_model_len=1024, **(drafts | options)
    ).create_engine_config()


@pytest.mark.parametrize(
    ("cpu", "method", "stages", "block", "refused"),
    [
        (True, "ngram", 1, 64, []),
        (False, "ngram", 1, 64, []),
        (False, "ngram_gpu", 1, 64, []),
        (True, "ngram_gpu", 1, 64, ["--speculative-config (method)"]),
        (True, "suffix", 1, 64, ["--speculative-config (method)"]),
        (True, "ngram", 2, 64, ["--speculative-config with --pipeline-parallel-size"]),
        (True, "ngram", 1, 2, ["--speculative-config (num_speculative_tokens) with --block-size"]),
    ],
    ids=["served", "gpu", "on-device", "not-on-cpus", "method", "stages", "small-blocks"],
)
def test_drafts_that_have_not_run_are_refused(cpu, method, stages, block, refused, monkeypatch):
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(method=method, parallel_drafting=False, enable_adaptive_verification=False),
        num_speculative_tokens=3,
        use_v2_model_runner=not cpu,
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        cache_config=SimpleNamespace(block_size=block),
    )
    about = [each for each in REFUSALS if each.option.startswith("--speculative-config")]
    assert [each.option for each in about if each.asked(config)] == refused


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "medusa", "mtp", "suffix"])
def test_other_drafters_are_refused_with_what_to_use(cpu, method, monkeypatch):
    """With a draft model vLLM's first runner would write the draft's KV cache through MLA's block table."""
    config = ngram()
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    monkeypatch.setattr(config.speculative_config, "method", method)
    with pytest.raises(
        ValueError, match=r"^--speculative-config \(method\): .* use ngram, on GPUs ngram or ngram_gpu\.$"
    ):
        refuse_unserved(config)


def test_a_draft_model_of_the_same_vocabulary_is_refused_by_us():
    with pytest.raises(ValueError, match=r"--speculative-config \(method\): "):
        ngram(speculative_config={"method": "draft_model", "model": str(RECALL), "num_speculative_tokens": 2})


@pytest.mark.parametrize("option", ["parallel_drafting", "enable_adaptive_verification"])
def test_options_of_other_drafters_are_refused(option, monkeypatch):
    config = ngram()
    monkeypatch.setattr(config.speculative_config, option, True)
    with pytest.raises(
        ValueError, match=rf"^--speculative-config \({option}\): .* Drop it from --speculative-config\.$"
    ):
        refuse_unserved(config)


@pytest.mark.parametrize(
    ("cpu", "drafts", "block", "remedies"),
    [
        (True, 15, 64, []),
        (True, 16, 64, ["Drop the option, or use at most 15."]),
        (True, 15, 15, ["Use fewer drafts than --block-size has tokens, or raise it."]),
        (False, 7, 64, []),
        (False, 8, 64, ["Drop the option, or use at most 7."]),
    ],
)
def test_a_window_is_as_long_as_kernels_and_blocks_take_it(cpu, drafts, block, remedies, monkeypatch):
    """The message tells of the limit that is exceeded, and of no other device's."""
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    config = SimpleNamespace(num_speculative_tokens=drafts, cache_config=SimpleNamespace(block_size=block))
    about = [each for each in REFUSALS if "num_speculative_tokens" in each.option]
    assert [each.instead for each in about if each.asked(config)] == remedies


def test_stages_that_draft_are_told_which_of_two_options_to_drop(monkeypatch):
    config = ngram()
    monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", 2)
    with pytest.raises(ValueError, match=r"Use --pipeline-parallel-size 1, or drop --speculative-config\.$"):
        refuse_unserved(config)


@pytest.mark.parametrize(
    ("runner", "method", "served"),
    [("1", "ngram_gpu", True), ("0", "ngram", True), ("0", "ngram_gpu", False), (None, "ngram_gpu", False)],
)
def test_the_first_model_runner_drafts_on_the_host_only(runner, method, served, monkeypatch):
    """Whether it was asked for, or vLLM chose it for options that the second runner lacks."""
    config = ngram()
    if runner is None:
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
        monkeypatch.setattr(type(config), "_get_v2_model_runner_unsupported_features", lambda self: ["an option"])
    else:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(config.speculative_config, "method", method)
    if served:
        refuse_unserved(config)
        return
    remedy = r"Use ngram, or set VLLM_USE_V2_MODEL_RUNNER=1 for the second runner\.$"
    with pytest.raises(ValueError, match=f"^--speculative-config with the first model runner: .* {remedy}"):
        refuse_unserved(config)


@pytest.mark.parametrize(
    ("replicas", "least", "refused"), [(2, 0.1, True), (2, 0, False), (2, None, False), (1, 0.1, False)]
)
def test_replicas_do_not_leave_out_drafts_on_their_own(replicas, least, refused):
    config = ngram()
    config.parallel_config.data_parallel_size = replicas
    config.additional_config = {"kimi": {"least_drafts_accepted": least}}
    [refusal] = [each for each in REFUSALS if each.option.startswith("kimi.least_drafts_accepted")]
    assert bool(refusal.asked(config)) == refused
