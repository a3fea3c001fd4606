"""Benchmarks: what the command refuses, what it writes, and what the figures are made of."""

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import __main__ as command
from benchmarks import calls, choices, figures, memory, rates, scaling, tables, turns
from benchmarks.caches import DYNAMIC, SAME_LENGTH, WILDCAT, fill, held_bytes, theirs
from benchmarks.options import NAMES, Options
from benchmarks.prefill import ONE_BIN
from benchmarks.records import Record, Run, read_runs, select
from benchmarks.report import write_report
from tests.eval_fixtures import tiny_folder, tokenizer  # noqa: F401
from wildcat_kv import Context
from wildcat_kv.hook.keyword import CACHE

PNG = b"\x89PNG"


def run(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr of `python -m benchmarks ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    captured = capsys.readouterr()
    return exit_.value.code or 0, captured.out, captured.err


def record(quantity, samples, unit="s", **labels):
    return Record(quantity=quantity, unit=unit, labels=labels, samples=samples)


def made_up(benchmark, *records, **changes):
    fields = {
        "benchmark": benchmark,
        "command": f"python -m benchmarks {benchmark}",
        "commit": "abc",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
        "model": "tiny",
        "device": "cpu",
        "threads": 1,
        "machine": {"processor": "abacus", "cores": 1, "memory_gib": 1.0, "devices": []},
        "versions": {"python": "3"},
        "options": {},
        "records": records,
    }
    return Run(**{**fields, **changes})


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Sizes at which nothing is worth measuring, and everything is quick."""
    monkeypatch.setattr(rates, "_BYTES", 2**20)
    monkeypatch.setattr(rates, "_SIDE", 64)
    monkeypatch.setattr(scaling, "ERROR_SEEDS", 1)
    monkeypatch.setattr(scaling, "ERROR_RANKS", (8, 16))


@pytest.fixture
def measured(monkeypatch, capsys, tmp_path, tiny_folder):  # noqa: F811
    """Runs a benchmark of the tiny model; its records and the folder."""

    def measure(name, *arguments):
        status, _, err = run(
            monkeypatch,
            capsys,
            name,
            *("--output", tmp_path / "results", "--model", tiny_folder, "--dtype", "float32", "--device", "cpu"),
            *("--tokens", 256, "--turns", 2, *arguments),
        )
        assert status == 0, err
        (found,) = read_runs(tmp_path / "results", [name])
        assert found.finished and found.threads == torch.get_num_threads()
        return found.records, tmp_path / "results"

    return measure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "255"], "tokens=255 must be at least 256"),
        (["--dtype", "int8"], "dtype='int8' must be float32, bfloat16 or float16"),
        (["--methods", "snapkv,nosuch"], "methods='nosuch': no such method; there are wildcat"),
        (["--ratio", "1.5"], "ratio=1.5"),
        (["--max-tokens", "20"], "max_tokens=20 is too small"),
        (["--device", "abacus"], "device='abacus' cannot be used"),
        (["--model", "/no/such/folder"], "model='/no/such/folder': no such folder or file"),
        (["--turns", "0"], "--turns"),
        (["--rows", "0"], "rows=0"),
    ],
)
def test_a_wrong_argument_is_one_line_and_nothing_is_written(monkeypatch, capsys, tmp_path, arguments, message):
    status, out, err = run(monkeypatch, capsys, "all", "--output", tmp_path / "new", *arguments)
    assert status == 1 and not out and not (tmp_path / "new").exists()
    assert err.startswith("python -m benchmarks: ") and message in err and err.count("\n") == 1


def test_an_output_that_is_a_file_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        status, _, err = run(monkeypatch, capsys, "scaling", "--output", output)
        assert status == 1 and "is no folder" in err and err.count("\n") == 1


def test_a_report_needs_a_benchmark(monkeypatch, capsys, tmp_path):
    status, _, err = run(monkeypatch, capsys, "report", tmp_path)
    assert status == 1 and "holds no benchmark" in err and err.count("\n") == 1
    (tmp_path / "decode.json").write_text("{")
    status, _, err = run(monkeypatch, capsys, "report", tmp_path)
    assert status == 1 and "decode.json is damaged" in err and err.count("\n") == 1


def test_prefill(measured):
    records, folder = measured("prefill", "--methods", "wildcat,snapkv,kvzip")
    seconds = {r.labels["contender"]: r for r in select(records, "seconds")}
    folds = {r.labels["contender"]: r for r in select(records, "fold_seconds")}
    assert set(seconds) == set(folds) == {DYNAMIC, WILDCAT, ONE_BIN, "snapkv", "kvzip"}
    assert folds[DYNAMIC].samples == (0.0, 0.0)
    for name in set(seconds) - {DYNAMIC}:
        assert all(0 < fold < whole for fold, whole in zip(folds[name].samples, seconds[name].samples, strict=True))
    (factor,) = select(records, "factor_flops")
    assert (factor.labels["points"], factor.labels["rank"]) == (204, 12)  # of 64 slots, the ends shrunk to 26 each
    text = (folder / "summary.md").read_text()
    assert "at most 3 %" in text and "at most 15 %" in text and "| kvzip |" in text
    assert {path.name for path in folder.glob("*.png")} == {"prefill-share.png", "prefill-methods.png"}


def test_decode(measured):
    records, folder = measured("decode", "--methods", "snapkv", "--steps", 3, "--rows", 1, "--rows", 2)
    steps = select(records, "seconds_per_step", rows=2)
    assert [r.labels["contender"] for r in steps] == [DYNAMIC, WILDCAT, SAME_LENGTH]
    assert all(len(r.samples) == 2 and min(r.samples) > 0 for r in steps)
    assert len(select(records, "seconds_per_step", group="methods")) == 3
    one, two = (select(records, "cache_bytes", rows=rows, contender=DYNAMIC)[0].samples[0] for rows in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)
    text = (folder / "summary.md").read_text()
    assert "hqq" in text and "at least 1.8" in text
    assert {path.name for path in folder.glob("*.png")} == {"decode-speed.png", "decode-methods.png"}


def test_scaling(measured):
    records, folder = measured("scaling", "--tokens", 512)
    assert [r.labels["tokens"] for r in select(records, "fold_seconds")] == [256, 512]
    assert all(math.isfinite(error) for r in select(records, "relative_error") for error in r.samples)
    assert {path.stem for path in folder.glob("*.png")} == {"scaling-tokens", "scaling-rank", "scaling-error"}


def test_generation(measured):
    records, folder = measured("generation", "--prompt-tokens", 100, "--max-tokens", 128)
    assert [r.labels["generated"] for r in select(records, "seconds_per_token")] == list(range(30, 241, 30))
    assert max(max(r.samples) for r in select(records, "stored_tokens")) <= 128
    assert (folder / "generation-time.png").read_bytes().startswith(PNG)


def test_calls(measured, monkeypatch):
    monkeypatch.setattr(calls, "DEPTHS", (1, 2))
    records, folder = measured("calls", "--steps", 3)
    layer = {r.labels["contender"]: r.samples[0] for r in select(records, "calls_per_layer")}
    whole = {r.labels["contender"]: r.samples[0] for r in select(records, "calls_per_pass")}
    assert layer.keys() == whole.keys() == {DYNAMIC, WILDCAT}
    assert all(number == int(number) for number in (*layer.values(), *whole.values()))
    assert 1 <= layer[DYNAMIC] < 10 and layer[DYNAMIC] < layer[WILDCAT] < 100
    seconds = select(records, "seconds_per_step")
    assert [r.labels["contender"] for r in seconds] == [DYNAMIC, WILDCAT, SAME_LENGTH]
    assert all(len(r.samples) == 2 and min(r.samples) > 0 for r in seconds)
    assert f"| {WILDCAT} | float32 | 256 | {layer[WILDCAT]:.0f}.0 |" in (folder / "summary.md").read_text()


def test_choices(measured):
    records, folder = measured("choices", "--steps", 2)
    held = {r.labels["contender"]: r.samples[0] for r in select(records, "cache_bytes")}
    assert list(held) == [DYNAMIC, *choices.PRESETS, choices.TWO_READINGS]
    assert held["bytes_5"] < held["bytes_9"] < held["default"] < held[DYNAMIC]
    for quantity in choices.UNITS:
        assert all(len(r.samples) == 2 and min(r.samples) > 0 for r in select(records, quantity))
    share = f"{100 * held['default'] / held[DYNAMIC]:.1f} %"
    row = next(line for line in (folder / "summary.md").read_text().splitlines() if line.startswith("| default |"))
    assert row.endswith(f"{share} |")


def test_calls_are_counted_where_functions_are_defined():
    def inner():
        return math.sqrt(2)

    def outer():
        return [inner() for _ in range(3)]

    assert calls.count_calls(outer, "/no/such/folder") == 0
    once = calls.count_calls(inner, __file__)
    assert once == 1 and calls.count_calls(lambda: (inner(), inner()), __file__) == 3
    with pytest.raises(ZeroDivisionError):
        calls.count_calls(lambda: 1 / 0, __file__)
    assert sys.getprofile() is None


def test_memory_asks_a_process_for_every_prefill(measured, monkeypatch):
    asked = []

    def child(options, dtype, tokens, name):
        asked.append((dtype, tokens, name))
        return lambda: {"held_bytes": 25.0 if name == WILDCAT else 100.0, "peak_bytes": 200.0}

    monkeypatch.setattr(memory, "_child", child)
    _, folder = measured("memory")
    assert ("float32", 256, WILDCAT) in asked and ("float32", 256, DYNAMIC) in asked
    text = (folder / "summary.md").read_text()
    assert "| wildcat: bytes held over DynamicCache's, 256 tokens, float32 | 0.250 | at most 0.26 | within |" in text
    assert (folder / "memory-ratios.png").read_bytes().startswith(PNG)


def test_memory_measures_the_default_and_query_wildcat_where_they_are_asked_for(monkeypatch):
    def child(options, dtype, tokens, name):
        return lambda: {"held_bytes": 1.0, "peak_bytes": 2.0}

    monkeypatch.setattr(memory, "_child", child)
    chosen = {"dtypes": ("float32",), "tokens": (256,), "turns": 1}
    for methods in ((), ("query_wildcat",), ("query_wildcat", "auto", "snapkv")):
        names = {record.labels["contender"] for record in memory.measure(Options(**chosen, methods=methods))}
        assert names & {"query_wildcat", "auto", "snapkv"} == set(methods) - {"snapkv"} and WILDCAT in names


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak that can be reset")
def test_the_peak_of_a_prefill_holds_the_cache(tiny_folder):  # noqa: F811
    options = Options(model=str(tiny_folder))
    measured = memory.prefill_memory(options, "float32", 2048, DYNAMIC)
    assert measured["held_bytes"] == pytest.approx(2 * 3 * 2 * 2048 * 16 * 4, rel=0.01)
    assert measured["peak_bytes"] > measured["held_bytes"]


def test_a_failure_leaves_the_other_benchmarks(monkeypatch, capsys, tmp_path):
    from benchmarks import run as runner

    def fails(options):
        yield record("fold_seconds", (1.0,), dtype="float32", tokens=512)
        raise MemoryError("no more")

    monkeypatch.setattr(runner, "BENCHMARKS", {"scaling": fails, "generation": fails})
    with pytest.raises(RuntimeError, match="2 of 2 benchmarks failed: scaling: MemoryError: no more"):
        runner.run(["scaling", "generation"], Options(), tmp_path, "command")
    found = read_runs(tmp_path, NAMES)
    assert [r.benchmark for r in found] == ["scaling", "generation"] and not any(r.finished for r in found)
    assert "has not finished" in (tmp_path / "summary.md").read_text()


def test_turns_alternate_and_warm_ups_are_not_counted():
    order = []

    def contender(name):
        def run():
            order.append(name)
            return {"x": len(order)}

        return run

    found = turns.take_turns({name: contender(name) for name in "ab"}, 2, warm_ups=1)
    assert order == list("ababab")
    assert found == {"a": {"x": [3, 5]}, "b": {"x": [4, 6]}}


def test_ratios_are_of_the_same_turn_and_the_median_decides():
    labels = {"dtype": "float32", "tokens": 8000, "rows": 1, "steps": 48}
    times = {DYNAMIC: (2.0, 4.0, 9.0), WILDCAT: (1.0, 1.0, 9.0), SAME_LENGTH: (1.0, 1.0, 9.0)}
    decode = made_up("decode", *(record("seconds_per_step", t, **labels, contender=c) for c, t in times.items()))
    speed, same = figures.decode_ratios(decode)
    assert (speed.low, speed.value, speed.high) == (1, 2, 4) and speed.limit.kept_by(speed.value)
    assert same.value == 1 and tables.verdict(same) == "within"


def test_the_share_is_of_the_rest_of_the_same_prefill():
    labels = {"dtype": "float32", "tokens": 4096, "contender": WILDCAT}
    prefill = made_up(
        "prefill", record("seconds", (11.0, 22.0), **labels), record("fold_seconds", (1.0, 2.0), **labels)
    )
    (share,) = figures.prefill_shares(prefill)
    assert share.value == pytest.approx(10) and tables.verdict(share) == "**beyond**"


def test_the_exponent_is_that_of_a_power_law():
    sizes = [2**power for power in range(11, 17)]
    assert figures.fit_exponent(sizes, [3e-6 * size**1.05 for size in sizes]) == pytest.approx((1.05, 1.05, 1.05))
    assert math.isnan(figures.fit_exponent(sizes[:2], [1.0, 2.0])[1])


def test_a_report_is_the_same_from_the_json_alone(tmp_path):
    records = []
    for part in range(8):
        labels = {"dtype": "float32", "tokens": 8000, "part": part, "generated": 1000 * (part + 1)}
        labels |= {"max_tokens": 1024, "prompt_tokens": 1000}
        records.append(record("seconds_per_token", (0.05, 0.06), **labels))
        records.append(record("held_bytes", (5e7,), "B", **labels))
        records.append(record("stored_tokens", (1024,), "tokens", **labels))
    made_up("generation", *records).write(tmp_path)
    write_report(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "| generation of 8,000 tokens, float32: time of a token, last eighth over second | 1.00" in (
        tmp_path / "summary.md"
    ).read_text(encoding="utf-8")


def test_their_caches_are_filled_as_by_reading():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32, vocab_size=100
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 100, (1, 300))
    context, more = Context(model, ids), torch.tensor([[7]])
    for name, make in theirs(model.config, 320).items():
        read = make()
        model(ids, **{CACHE: read})
        filled = fill(make(), context.exact, rows=2)
        expected = model(more, **{CACHE: read}).logits
        found = model(more.expand(2, 1), **{CACHE: filled}).logits
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-4, msg=name)
        assert held_bytes(filled) >= 2 * 2 * 2 * 300 * 64 / 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.99961, "1.00"), (0.0237, "0.0237"), (7.6149, "7.61"), (139.2, "139"), (16676.4, "16,676"), (0.0, "0")],
)
def test_numbers_have_three_digits_that_count(value, text):
    assert tables.number(value) == text
