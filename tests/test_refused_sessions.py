"""Sessions where none have run are refused at start, by name, as are folders and connectors that do not serve them."""

from functools import reduce
from types import SimpleNamespace

import pytest
from support.engine import RECALL
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from kimi_vllm import refusals
from kimi_vllm.refusals import SESSIONS, refuse_unserved


def create(folder, **options):
    kimi = {"session_dir": str(folder)} | options.pop("kimi", {})
    return AsyncEngineArgs(
        str(RECALL), skip_tokenizer_init=True, max_model_len=1024, additional_config={"kimi": kimi}, **options
    ).create_engine_config()


def test_a_folder_is_all_that_is_needed(tmp_path):
    config = create(tmp_path)
    assert config.kv_transfer_config.kv_connector_module_path == SESSIONS
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"
    create(tmp_path, tensor_parallel_size=2)
    create(tmp_path, kimi={"session_gib": 0.5})


@pytest.mark.parametrize("what", ["missing", "a file"])
def test_what_is_no_folder(what, tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(ValueError, match=r"kimi\.session_dir: there is no such folder\. Create it\."):
        create(tmp_path / what)


def test_a_limit_without_a_folder():
    with pytest.raises(ValueError, match=r"kimi\.session_gib: without kimi\.session_dir there are no sessions\."):
        AsyncEngineArgs(
            str(RECALL), skip_tokenizer_init=True, additional_config={"kimi": {"session_gib": 1}}
        ).create_engine_config()


@pytest.mark.parametrize("connector", ["OffloadingConnector", "NixlConnector", "ExampleConnector", "SessionConnector"])
def test_other_connectors_are_refused_with_and_without_sessions(connector, tmp_path):
    transfer = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_module_path": "of.others"}
    for kimi in ({}, {"session_dir": str(tmp_path)}):
        with pytest.raises(ValueError, match=r"--kv-transfer-config: vLLM's connectors take .* kimi\.session_dir"):
            AsyncEngineArgs(
                str(RECALL),
                skip_tokenizer_init=True,
                additional_config={"kimi": kimi},
                kv_transfer_config=KVTransferConfig(**transfer),
            ).create_engine_config()


def test_pipeline_stages(tmp_path):
    with pytest.raises(
        ValueError, match=r"kimi\.session_dir with --pipeline-parallel-size: sessions are untested with it"
    ):
        create(tmp_path, pipeline_parallel_size=2)


NOT_RUN = {
    "--pipeline-parallel-size": ("parallel_config.pipeline_parallel_size", 2),
    "--data-parallel-size": ("parallel_config.data_parallel_size", 2),
    "--nnodes": ("parallel_config.nnodes", 2),
    "--distributed-executor-backend": ("parallel_config.distributed_executor_backend", "ray"),
    "--runner": ("model_config.runner_type", "pooling"),
}
"""An option to where it is in the configuration, and a value that no session has run with."""


@pytest.mark.parametrize("option", NOT_RUN)
def test_what_has_not_run(option, tmp_path, monkeypatch):
    config = create(tmp_path)
    monkeypatch.setattr(refusals, "REFUSALS", [each for each in refusals.REFUSALS if "session" in each.option])
    refuse_unserved(config)
    path, value = NOT_RUN[option]
    *owners, last = path.split(".")
    monkeypatch.setattr(reduce(getattr, owners, config), last, value)
    with pytest.raises(ValueError, match=rf"^kimi\.session_dir with {option}: sessions are untested .*Drop one"):
        refuse_unserved(config)
    config.additional_config = {}
    refuse_unserved(config)


def test_several_gpus(tmp_path, monkeypatch):
    config = create(tmp_path, tensor_parallel_size=2)
    monkeypatch.setattr(refusals, "REFUSALS", [each for each in refusals.REFUSALS if "session" in each.option])
    refuse_unserved(config)
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    with pytest.raises(
        ValueError, match=r"^kimi\.session_dir with --tensor-parallel-size on GPUs: sessions are untested"
    ):
        refuse_unserved(config)
    refuse_unserved(create(tmp_path))


def test_a_model_without_states(tmp_path, monkeypatch):
    config = create(tmp_path)
    monkeypatch.setattr(refusals, "geometry_of", lambda model_config: SimpleNamespace(kda=(False, False)))
    with pytest.raises(ValueError, match=r"^kimi\.session_dir without KDA layers: sessions are untested"):
        refuse_unserved(config)
