"""Settings: what is refused, and how it is said."""

import pytest

from wildcat_kv import WildCatConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0: .*in \\(0, 1\\]"),
        ({"ratio": 1.5}, "ratio=1.5: .*in \\(0, 1\\]"),
        ({"ratio": -0.25}, "ratio=-0.25"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"ratio": "a quarter"}, "ratio='a quarter'"),
        ({"ratio": True}, "ratio=True"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 100.5}, "max_tokens=100.5"),
        ({"max_tokens": 47}, "max_tokens=47 is too small for sink=4 \\+ window=32 \\+ bin_rank=12; .*48"),
        ({"ratio": 0.25, "min_tokens": -1}, "min_tokens=-1: .*at least 0"),
        ({"ratio": 0.25, "min_tokens": 64.5}, "min_tokens=64.5"),
        ({"ratio": 0.25, "min_tokens": True}, "min_tokens=True"),
        ({"max_tokens": 100, "min_tokens": 50}, "min_tokens=50 with max_tokens=100: .*leave min_tokens out"),
        ({"max_bytes": "1GiB", "min_tokens": 50}, "min_tokens=50 with max_bytes=1073741824"),
        ({"ratio": "auto", "tolerance": 0.1, "min_tokens": 50}, "min_tokens=50 with ratio=auto"),
        ({}, "neither of them given"),
        ({"ratio": 0.25, "max_tokens": 100}, "both of them given"),
        ({"ratio": 0.25, "sink": -1}, "sink=-1"),
        ({"ratio": 0.25, "window": 1.5}, "window=1.5"),
        ({"ratio": 0.25, "bin_rank": 0}, "bin_rank=0"),
        ({"ratio": 0.25, "temperature": "hot"}, "temperature='hot'"),
        ({"ratio": 0.25, "seed": -1}, "seed=-1"),
        ({"ratio": 0.25, "windw": 3}, "windw=3: no such setting; did you mean 'window'\\? known ones are ratio, "),
        ({"ratio": 0.25, "reads": 2}, "reads=2: no such setting; compress_context.* takes it; known ones are ratio, "),
    ],
)
def test_wrong_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        WildCatConfig(**fields)
    assert "\n" not in str(error.value)


def test_settings_do_not_change():
    with pytest.raises(ValueError):
        WildCatConfig(ratio=0.25).ratio = 0.5


def test_a_new_budget_replaces_the_old():
    config = WildCatConfig(ratio=0.25, window=64, exact_layers=[0]).changed(ratio=0.5, seed=3)
    assert config == WildCatConfig(ratio=0.5, window=64, exact_layers=[0], seed=3)
    config = WildCatConfig(ratio=0.25, window=64).changed(max_tokens=1024)
    assert (config.ratio, config.max_tokens, config.window) == (None, 1024, 64)
    assert config.changed(sink=1).max_tokens == 1024 and config.changed() == config
    floored = WildCatConfig(ratio=0.25, min_tokens=256)
    assert floored.changed(ratio=0.5).min_tokens == 256
    for budget in ({"max_tokens": 1024}, {"max_bytes": "1GiB"}, {"ratio": "auto", "tolerance": 0.1}):
        assert floored.changed(**budget).min_tokens == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rato": 0.5}, "rato=0.5: no such setting; did you mean 'ratio'"),
        ({"max_tokens": 40}, "max_tokens=40 is too small"),
        ({"ratio": 0.5, "max_tokens": 100}, "both of them given"),
    ],
)
def test_what_changes_is_checked_too(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        WildCatConfig(ratio=0.25).changed(**fields)
    assert "\n" not in str(error.value)
