"""The plugin's entry point: ours in range, vLLM's own outside of it, and strictness on request.

That vLLM finds our class, and its own one when the plugin is disabled, `tests/cli/test_doctor.py` asks the doctor.
"""

import logging
import sys

import pytest
from packaging.specifiers import SpecifierSet

import kimi_vllm
from kimi_vllm import _vllm


@pytest.fixture
def registry(monkeypatch):
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    monkeypatch.delenv("KIMI_VLLM_STRICT", raising=False)
    models, hooks = dict(ModelRegistry.models), dict(MODELS_CONFIG_MAP)
    ModelRegistry.models.pop(kimi_vllm.ARCHITECTURE)
    MODELS_CONFIG_MAP.pop(kimi_vllm.ARCHITECTURE, None)
    yield ModelRegistry.models
    ModelRegistry.models.clear()
    ModelRegistry.models.update(models)
    MODELS_CONFIG_MAP.clear()
    MODELS_CONFIG_MAP.update(hooks)


def test_register_twice(registry):
    kimi_vllm.register()
    kimi_vllm.register()
    assert registry[kimi_vllm.ARCHITECTURE].module_name == "kimi_vllm.model"


@pytest.mark.parametrize("release", ["0.31.0", "0.34.0", "0.34.0rc1", "1.0"])
def test_outside_the_range_vllms_own_model_serves_and_one_warning_says_so(release, registry, monkeypatch, caplog):
    monkeypatch.setattr(_vllm, "installed_vllm", lambda: ("vllm", release))
    # vLLM's logger does not propagate. If an earlier test has made it, pytest listens to it directly.
    vllm_logger = logging.getLogger("vllm")
    monkeypatch.setattr(vllm_logger, "propagate", caplog.handler not in vllm_logger.handlers)
    with caplog.at_level(logging.WARNING, logger="vllm.kimi_vllm"):
        kimi_vllm.register()
    assert kimi_vllm.ARCHITECTURE not in registry
    [record] = [record for record in caplog.records if record.name == "vllm.kimi_vllm"]
    message = record.getMessage()
    assert str(_vllm.SUPPORTED_VLLM) in message
    assert release in message
    assert "kimi-vllm doctor" in message


@pytest.mark.parametrize("release", ["0.32.0", "0.32.0+cpu", "0.33.1.dev12+g1234567", "0.33.0"])
def test_inside_the_range(release, registry, monkeypatch):
    monkeypatch.setattr(_vllm, "installed_vllm", lambda: ("vllm", release))
    kimi_vllm.register()
    assert kimi_vllm.ARCHITECTURE in registry


def test_strict_makes_it_an_error(registry, monkeypatch):
    monkeypatch.setattr(_vllm, "SUPPORTED_VLLM", SpecifierSet("<0.1"))
    monkeypatch.setenv("KIMI_VLLM_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"kimi-vllm supports vLLM <0\.1"):
        kimi_vllm.register()


def test_without_vllm_the_message_says_how_to_get_it(registry, monkeypatch):
    monkeypatch.setattr(_vllm, "installed_vllm", lambda: None)
    monkeypatch.setenv("KIMI_VLLM_STRICT", "1")
    with pytest.raises(RuntimeError, match="pip install"):
        kimi_vllm.register()


def test_a_vllm_internal_that_moved_is_no_crash(registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "kimi_vllm.config_hook", None)
    monkeypatch.setenv("KIMI_VLLM_STRICT", "1")
    with pytest.raises(RuntimeError, match="could not import a part of vllm"):
        kimi_vllm.register()
