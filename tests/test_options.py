"""--additional-config: what can be set, and errors that name the option."""

from types import SimpleNamespace

import pytest

from kimi_vllm.options import KimiOptions, OptionsError


def options_of(additional_config):
    return KimiOptions.of(SimpleNamespace(additional_config=additional_config))


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, {"kimi": {}}])
def test_defaults(config):
    assert options_of(config) == KimiOptions()


def test_values_are_read():
    options = options_of({"kimi": {"host_memory_gib": 12, "state_dtype": "bfloat16"}})
    assert (options.host_memory_gib, options.state_dtype, options.checkpoint_interval) == (12, "bfloat16", 0)


def test_options_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        KimiOptions().checkpoint_interval = 4


def test_every_option_says_what_it_does():
    assert [name for name, field in KimiOptions.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slots": 4}, "kimi.slots: no such option. Known: state_dtype, checkpoint_interval, eviction"),
        ({"cls": 4}, "kimi.cls: no such option"),
        ({4: 4}, "kimi.4: no such option"),  # YAML allows it
        ({"checkpoint_interval": -1}, "kimi.checkpoint_interval=-1: must be greater than or equal to 0"),
        ({"checkpoint_interval": "many"}, "kimi.checkpoint_interval='many': must be a valid integer"),
        ({"checkpoint_interval": "4"}, "kimi.checkpoint_interval='4': must be a valid integer"),
        ({"checkpoint_interval": True}, "kimi.checkpoint_interval=True: must be a valid integer"),
        ({"checkpoint_interval": 64.0}, "kimi.checkpoint_interval=64.0: must be a valid integer"),
        ({"state_dtype": "fp8"}, "kimi.state_dtype='fp8': must be 'float32', 'bfloat16' or 'float16'"),
        ({"eviction": "fifo"}, "kimi.eviction='fifo': must be 'value' or 'lru'"),
        ({"on_nonfinite": "ignore"}, "kimi.on_nonfinite='ignore': must be 'abort' or 'resume'"),
        ({"host_memory_gib": -1}, "kimi.host_memory_gib=-1: must be .* 0. Host memory per worker, in GiB"),
        ({"host_memory_gib": True}, "kimi.host_memory_gib=True: must be a valid number"),
        ({"host_memory_gib": float("inf")}, "kimi.host_memory_gib=inf: must be a finite number"),
        ({"session_dir": ""}, "kimi.session_dir='': String should have at least 1 character. An existing folder"),
        ({"session_dir": 7}, "kimi.session_dir=7: must be a valid string"),
        ({"session_gib": -1}, "kimi.session_gib=-1: must be .* 0. The most that sessions may take"),
        (3, "--additional-config: expected"),
    ],
)
def test_errors(values, message):
    with pytest.raises(OptionsError, match=message):
        options_of({"kimi": values})


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        (
            "state_slots",
            "replaced. --max-num-seqs limits running requests; --kv-cache-memory-bytes and --num-gpu-blocks",
        ),
        ("typical_tokens", "nothing to set: states and KV cache share one memory. Drop the option."),
        ("checkpoint_share", "nothing to set: states and KV cache share one memory. Drop the option."),
    ],
)
def test_an_option_that_went_says_what_replaced_it(option, instead):
    with pytest.raises(OptionsError, match=f"kimi.{option}: {instead}"):
        options_of({"kimi": {option: 2}})
