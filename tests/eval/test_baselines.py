"""Transformers' quantised cache beside the methods: the same as read by a model, counted by what it holds."""

import pytest
import torch
from transformers import QuantizedCache

from eval.baselines import QuantizedBaseline
from eval.cells import EXACT, make_cells
from eval.tasks.drift import Drift
from eval.tasks.needle import Needle
from wildcat_kv import Context
from wildcat_kv.cache.sizes import cache_bytes
from wildcat_kv.contexts.reading import loglikelihood, read
from wildcat_kv.hook.keyword import CACHE

pytest_plugins = ["tests.eval_fixtures"]

FP8 = "transformers_fp8"
BACKENDS = {
    FP8: (None, {}, 8),
    "transformers_quanto": ("optimum.quanto", {"axis_key": -1}, 4),
    "transformers_hqq": ("hqq.core.quantize", {}, 4),
}


def baseline(method):
    package, options, bits = BACKENDS[method]
    if package is not None:
        pytest.importorskip(package)
    elif not hasattr(torch, "float8_e4m3fn") or "fp8" not in (QuantizedCache.__doc__ or ""):
        pytest.skip("this Transformers has no fp8 cache")
    return QuantizedBaseline(method, bits, 64, options)


@pytest.fixture
def ids():
    return torch.randint(100, (1, 150), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", BACKENDS)
@pytest.mark.parametrize("length", [128, 140])
def test_it_is_what_a_model_reads_into_it(model, plain, ids, method, length):
    chosen = baseline(method)
    held = chosen.compress(Context(model, ids[:, :length]))
    theirs = chosen.empty(plain.config)
    plain(ids[:, :128], **{CACHE: theirs})
    for index, layer in enumerate(Context(model, ids[:, :length]).exact.layers):
        if length > 128:
            theirs.update(layer.keys[..., 128:, :], layer.values[..., 128:, :], index)
    expected = plain(ids[:, length:], **{CACHE: theirs}).logits
    found = read(model, held, ids, last=150 - length)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    exact = plain(ids).logits[:, length:]
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.5


@pytest.mark.parametrize("method", BACKENDS)
def test_it_counts_what_it_holds(model, ids, method):
    chosen = baseline(method)
    context = Context(model, ids)
    held = chosen.compress(context)
    assert held.stored_tokens() == 150
    numbers = 2 * 3 * 2 * 16  # keys and values, layers, heads, channels
    whole = 150 if method == FP8 else 128
    packed = numbers * whole * chosen.bits // 8
    scales = 2 * 3 * 4 if method == FP8 else numbers * whole // 64 * 2 * 4
    assert cache_bytes(held) == packed + scales + numbers * (150 - whole) * 4


@pytest.mark.parametrize("method", BACKENDS)
def test_copies_and_several_answers(model, ids, method):
    chosen = baseline(method)
    held = chosen.compress(Context(model, ids[:, :140]))
    copied, wide = held.clone(), held.clone()
    wide.batch_repeat_interleave(2)
    answers = [torch.tensor([3, 4]), torch.tensor([5, 6, 7])]
    both = loglikelihood(model, wide, ids.expand(2, -1), None, answers)
    one = loglikelihood(model, copied, ids, None, answers[1:])
    assert held.get_seq_length() == 140
    assert both[1].total == pytest.approx(one[0].total, abs=1e-3)


@pytest.mark.parametrize("task", [Needle(lengths=[180], depths=[0.5], repeats=1), Drift(lengths=[150], repeats=1)])
def test_tasks_measure_it(model, tokenizer, setting, task):
    baseline(FP8)
    cells = make_cells([{"name": "fp8", "compressor": FP8, "bits": 8}], [1.0], [], {"seed": 0})
    assert [str(cell) for cell in cells] == [EXACT, "fp8 1"]
    [sample] = task.samples(setting())
    measure = sample.open(model, tokenizer)
    exact, packed = (measure(cell) for cell in cells)
    assert 0 < packed.memory_bytes < 0.3 * exact.memory_bytes
    assert packed.stored_tokens == packed.seen_tokens == exact.seen_tokens
    name = next(iter(exact.scores))
    assert packed.scores[name] != exact.scores[name]


@pytest.mark.parametrize(
    ("entry", "ratios", "message"),
    [
        ({"compressor": FP8, "bits": 8}, [0.5], r"ratio=0.5 must be 1"),
        ({"compressor": FP8}, [1.0], r"bits=None: give one of 8"),
        ({"compressor": FP8, "bits": 4}, [1.0], r"bits=4: the backend has 8"),
        ({"compressor": "transformers_quanto", "bits": 3}, [1.0], r"bits=3: the backend has 4, 2"),
        ({"compressor": FP8, "bits": 8, "parameters": {"axis_key": 0}}, [1.0], r"parameters='axis_key'.* has none"),
        (
            {"compressor": "transformers_quanto", "bits": 4, "parameters": {"nbits": 4}},
            [1.0],
            r"parameters='nbits'.* has axis_key, axis_value",
        ),
        (
            {"compressor": "transformers_hqq", "bits": 3, "parameters": {"axis_key": 1}},
            [1.0],
            r"bits=3 with an axis of 1: hqq fails",
        ),
    ],
)
def test_wrong_settings_are_refused_before_any_work(entry, ratios, message):
    with pytest.raises(ValueError, match=message):
        make_cells([entry], ratios, [], {})


def test_a_backend_that_is_not_there_is_one_line(model, monkeypatch):
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    _, cell = make_cells([{"compressor": "transformers_quanto", "bits": 4}], [1.0], [], {})
    with pytest.raises(ValueError, match=r"pip install optimum-quanto") as caught:
        cell.check_model(model.config)
    assert "\n" not in str(caught.value)


def test_tasks_that_compress_while_they_read_are_refused():
    _, cell = make_cells([{"compressor": FP8, "bits": 8}], [1.0], [], {})
    with pytest.raises(ValueError, match="contexts that were read"):
        cell.check_tasks(streams=True)
    cell.check_tasks(streams=False)
