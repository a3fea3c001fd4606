"""Tables of README and docs show what the records say."""

import json
import re

import pytest

from docs import tables
from wildcat_kv import load_preset


def test_pages_show_what_the_records_say():
    named = set()
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{page}: run python -m docs.tables"
        named |= {place[2] for place in tables.PLACE.finditer(text)}
    assert named == set(tables.TABLES)


def test_another_number_is_found(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    text = (tables.ROOT / "README.md").read_text(encoding="utf-8")
    page.write_text(re.sub(r"(the default\*\*.*?) (\d+) %", r"\1 3 %", text, count=1), encoding="utf-8")
    assert page.read_text(encoding="utf-8") != text
    monkeypatch.setattr(tables, "PAGES", (page,))
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    with pytest.raises(SystemExit, match="differs from its records"):
        tables.main()


def test_rows_are_measured_with_the_settings_of_their_presets():
    config = json.loads((tables.FIRST_PAGE / "run.json").read_text(encoding="utf-8"))["config"]
    common = config["settings"]
    for choice in tables.CHOICES:
        name = "default" if "default" in choice.call else re.sub(r'.*"(.*)".*', r"\1", choice.call)
        if name.startswith("`"):
            continue  # no preset
        (method,) = [method for method in config["methods"] if choice.method.startswith(method["name"])]
        fields = {**common, **{field: value for field, value in method.items() if field in ("sink", "window")}}
        settings = load_preset(name).settings
        assert (settings.ratio, settings.bits) == (choice.ratio, 4 if choice.method.endswith("4bit") else None)
        assert all(getattr(settings, field) == value for field, value in fields.items()), name
