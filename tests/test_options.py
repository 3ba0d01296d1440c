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
    options = options_of({"kimi": {"state_slots": 12, "state_dtype": "bfloat16"}})
    assert (options.state_slots, options.state_dtype, options.checkpoint_interval) == (12, "bfloat16", 0)


@pytest.mark.parametrize("share", [0, 0.5])
def test_checkpoint_share_is_a_number_below_one(share):
    assert options_of({"kimi": {"checkpoint_share": share}}).checkpoint_share == share


def test_options_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        KimiOptions().state_slots = 4


def test_every_option_says_what_it_does():
    assert [name for name, field in KimiOptions.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slots": 4}, "kimi.slots: no such option. Known: state_slots, typical_tokens, state_dtype"),
        ({"cls": 4}, "kimi.cls: no such option"),
        ({4: 4}, "kimi.4: no such option"),  # YAML allows it
        (
            {"state_slots": 1},
            "kimi.state_slots=1: must be greater than or equal to 2. Slots .* At least 2: a request",
        ),
        ({"state_slots": "many"}, "kimi.state_slots='many': must be a valid integer"),
        ({"state_slots": "4"}, "kimi.state_slots='4': must be a valid integer"),
        ({"state_slots": True}, "kimi.state_slots=True: must be a valid integer"),
        ({"checkpoint_interval": -1}, "kimi.checkpoint_interval=-1: must be greater than or equal to 0"),
        ({"checkpoint_share": 1}, "kimi.checkpoint_share=1: must be less than 1. Maximum share"),
        ({"checkpoint_share": -0.1}, "kimi.checkpoint_share=-0.1: must be greater than or equal to 0"),
        ({"checkpoint_share": "half"}, "kimi.checkpoint_share='half': must be a valid number"),
        ({"typical_tokens": 0}, "kimi.typical_tokens=0: must be .* 1. Expected prompt . output tokens per request"),
        ({"typical_tokens": 8192.0}, "kimi.typical_tokens=8192.0: must be a valid integer"),
        ({"state_dtype": "fp8"}, "kimi.state_dtype='fp8': must be 'float32', 'bfloat16' or 'float16'"),
        ({"eviction": "fifo"}, "kimi.eviction='fifo': must be 'value' or 'lru'"),
        ({"on_nonfinite": "ignore"}, "kimi.on_nonfinite='ignore': must be 'abort' or 'resume'"),
        ({"host_memory_gib": -1}, "kimi.host_memory_gib=-1: must be .* 0. Host memory per worker, in GiB"),
        ({"host_memory_gib": True}, "kimi.host_memory_gib=True: must be a valid number"),
        ({"host_memory_gib": float("inf")}, "kimi.host_memory_gib=inf: must be a finite number"),
        (3, "--additional-config: expected"),
    ],
)
def test_errors(values, message):
    with pytest.raises(OptionsError, match=message):
        options_of({"kimi": values})
