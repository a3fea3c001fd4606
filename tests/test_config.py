"""Settings: what is refused, and how it is said."""

from pathlib import Path

import pytest

from wildcat_kv import WildCatConfig

PUBLISHED = Path(__file__).parents[1] / "configs" / "published.yaml"


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
        ({"max_tokens": 75}, "max_tokens=75 is too small for sink=32 \\+ window=32 \\+ bin_rank=12; .*76"),
        ({}, "neither of them given"),
        ({"ratio": 0.25, "max_tokens": 100}, "both of them given"),
        ({"ratio": 0.25, "sink": -1}, "sink=-1"),
        ({"ratio": 0.25, "window": 1.5}, "window=1.5"),
        ({"ratio": 0.25, "bin_rank": 0}, "bin_rank=0"),
        ({"ratio": 0.25, "temperature": "hot"}, "temperature='hot'"),
        ({"ratio": 0.25, "seed": -1}, "seed=-1"),
        ({"ratio": 0.25, "windw": 3}, "windw=3: no such setting; known ones are ratio, "),
    ],
)
def test_wrong_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        WildCatConfig(**fields)
    assert "\n" not in str(error.value)


def test_settings_do_not_change():
    with pytest.raises(ValueError):
        WildCatConfig(ratio=0.25).ratio = 0.5


def test_the_published_preset_is_the_published_protocol():
    assert WildCatConfig.from_yaml(PUBLISHED) == WildCatConfig(ratio=0.25, sink=32, window=32, bin_rank=12)


def test_overrides_win_and_a_new_budget_replaces_the_old():
    config = WildCatConfig.from_yaml(PUBLISHED, max_tokens=1024, seed=3)
    assert (config.ratio, config.max_tokens, config.seed) == (None, 1024, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("ratio: 2", "ratio=2"), ("- a list", "holds a list"), ("ratio: [", "no readable YAML"), ("1: 2", "1")],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        WildCatConfig.from_yaml(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.yaml"):
        WildCatConfig.from_yaml(tmp_path / "nothing.yaml")
