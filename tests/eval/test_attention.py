"""Evaluations of attention methods: what they measure, write, resume and refuse."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import eval.attention.digits
import eval.attention.run
from eval.__main__ import main
from eval.attention import layers, tasks
from eval.attention.config import RunConfig, read_config
from eval.attention.dinov2 import WHEEL, Dinov2, Features, SaliencyHead, dinov2_small
from eval.attention.layers import Captured, Gaussian, Layers
from eval.attention.methods import Choice, Clocked, Recorded
from eval.attention.minilm import WHEEL as TEXT_WHEEL
from eval.attention.minilm import minilm
from eval.attention.onnx_file import read_onnx
from eval.attention.pictures import _SKLEARN, PICTURES, digits, picture
from eval.attention.report import write_report
from eval.attention.scores import correlation, cosine, output_errors, same_neighbours
from eval.attention.speech import clips, passages
from eval.attention.whisper import WHEEL as SPEECH_WHEEL
from eval.attention.whisper import _read_ctranslate2, whisper_tiny, word_errors
from eval.records import Folder
from tests.attention.encoders import FAMILIES
from wildcat_kv.attention import Exact, NearWildCat, Uniform, WildCatAttention, attention_layers, use
from wildcat_kv.data.downloads import Wheel, cache_folder

CONFIG = {
    "tasks": [
        {"task": "layers", "sources": [{"source": "gaussian", "n": [40, 60, 90], "d": 8, "inputs": 2}]},
        {"task": "guarantee", "sources": [{"source": "bounded", "n": [60], "product": 0.5}], "rows": 8},
    ],
    "seeds": [0, 1],
    "methods": [
        {"method": "wildcat", "rank": 12, "bins": 2},
        {"method": "wildcat", "rank": {"times": 4, "power": 0.5}},
    ],
}


def here(wheel):
    """Skips where a wheel of tens of megabytes is not in the cache already."""
    there = (cache_folder() / "wheels" / wheel.filename).is_file()
    return pytest.mark.skipif(not there, reason=f"{wheel.requirement} is not in the cache")


@pytest.fixture
def config_file(tmp_path):
    def make(**fields):
        path = tmp_path / "made.yaml"
        path.write_text(yaml.safe_dump({**CONFIG, **fields}, sort_keys=False))
        return path

    return make


@pytest.fixture
def started(config_file, monkeypatch):
    """Runs the command in this process."""

    def start(output, *options, **fields):
        monkeypatch.setattr(
            "sys.argv", ["eval", "attention", str(config_file(**fields)), "--output", str(output), *options]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code

    return start


# Runs


def test_a_run_measures_everything_and_writes_it_down(started, tmp_path, capsys):
    started(tmp_path / "run")
    folder = Folder(tmp_path / "run")
    records = folder.records()
    methods = ["wildcat rank 12 bins 2", "wildcat rank 4 n^0.5"]
    assert len(records) == (3 * 2 + 1) * len(methods) * 2 and folder.manifest["finished"]
    assert {record["method"] for record in records} == set(methods)
    for record in records:
        assert all(math.isfinite(score) and score >= 0 for score in record["scores"].values())
        if record["task"] == "guarantee":
            assert record["scores"]["estimate"] <= record["scores"]["error"] * 1.01 <= record["scores"]["bound"]
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert summary.count("###") == 4 and "2 inputs, 2 seeds." in summary
    plots = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert plots == {"layers.png", "layers-growth-gaussian-d-8.png", "guarantee.png"}
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    write_report(folder.manifest, records, tmp_path / "run")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert "summary.md" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(config_file, tmp_path, monkeypatch):
    class StopError(Exception):
        pass

    original = Folder.append

    def failing(folder, record):
        if len(folder.records()) == 5:
            raise StopError
        original(folder, record)

    monkeypatch.setattr(Folder, "append", failing)
    with pytest.raises(StopError):
        eval.attention.run.run(read_config(config_file()), tmp_path / "run", command="x", resume=False)
    monkeypatch.undo()
    kept = Folder(tmp_path / "run").records()
    eval.attention.run.run(read_config(config_file()), tmp_path / "run", command="x", resume=True)
    records = Folder(tmp_path / "run").records()
    assert records[:5] == kept and len(records) == 28
    assert len({eval.attention.run.key_of(record) for record in records}) == 28
    with pytest.raises(ValueError, match=r"holds another run: config\.seeds was"):
        eval.attention.run.run(read_config(config_file(seeds=[7])), tmp_path / "run", command="x", resume=True)


def test_a_limit_wins_over_the_file(config_file):
    assert [len(task.cases()) for task in read_config(config_file(), inputs=1).tasks] == [3, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ["unifrom"]}, "unifrom.*did you mean 'uniform'"),
        ({"methods": [{"method": "uniform", "ranks": 3}]}, "ranks=3: no such setting"),
        (
            {"methods": [{"method": "uniform", "rank": {"power": 1}}]},
            "rank=.*power.*has times and power, or work",
        ),
        ({"methods": ["uniform", "uniform"]}, "methods: 'uniform' is there twice"),
        ({"methods": []}, "methods"),
        ({"seeds": [-1]}, "seeds.0=-1"),
        ({"tasks": [{"task": "films"}]}, "tasks.0"),
        ({"tasks": [{"task": "layers", "sources": [{"source": "dinov2", "pixels": [28], "layers": [12]}]}]}, "layers"),
        ({"depth": 3}, "depth=3"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(config_file, fields, message):
    with pytest.raises(ValueError, match=rf"made\.yaml: .*{message}") as found:
        read_config(config_file(**fields))
    assert "\n" not in str(found.value)


def test_a_method_without_a_guarantee_is_refused(config_file, tmp_path):
    config = RunConfig(tasks=CONFIG["tasks"][1:], methods=["uniform"])
    with pytest.raises(ValueError, match="'uniform' has no guarantee; take wildcat with a rank"):
        eval.attention.run.run(config, tmp_path / "run", command="x", resume=False)


# Methods


def test_settings_grow_and_take_the_picture():
    choice = Choice(
        method="near_wildcat", settings={"rank": {"times": 2, "power": 0.5}, "grid": "picture", "prefix": "picture"}
    )
    made = choice.build(401, 7, (20, 20))
    assert isinstance(made, NearWildCat)
    assert (made.rank, made.grid, made.prefix, made.seed) == (40, (20, 20), 1, 7)
    line = choice.build(400, 7)
    assert (line.grid, line.prefix) == (None, 0)
    assert choice.name == "near_wildcat rank 2 n^0.5"
    assert not Choice(method="exact").draws and Choice.model_validate("uniform").draws
    assert Choice.model_validate({"method": "uniform", "rank": 3, "label": "few"}).name == "few"


@pytest.mark.parametrize(
    ("method", "field", "others"),
    [
        ("uniform", "rank", {}),
        ("wildcat", "rank", {"bins": 16}),
        ("performer", "features", {}),
        ("scatterbrain", "features", {"band": 16}),
        ("hyperattention", "samples", {"block": 64, "exact_below": 0}),
    ],
)
def test_settings_are_the_largest_within_a_share_of_the_work(method, field, others):
    multiple = 2 if method == "scatterbrain" else 1
    choice = Choice(method=method, settings={**others, field: {"work": 0.2, "multiple": multiple}})
    made, limit = choice.build(4096), 0.2 * Exact().cost(4096, 64)
    value = getattr(made, field)
    more = Choice(method=method, settings={**others, field: value + multiple * (16 if method == "wildcat" else 1)})
    assert made.cost(4096, 64) <= limit < more.build(4096).cost(4096, 64)
    assert f"{field} at 0.2 work" in choice.name
    with pytest.raises(ValueError, match="both follow the work"):
        Choice(method="scatterbrain", settings={"band": {"work": 0.1}, "features": {"work": 0.1}})


def test_wrappers_leave_a_method_as_it_is():
    family = FAMILIES["vit"]
    model, inputs = family.build(), family.inputs(False)
    found = []
    clock, recorder = Clocked(Uniform(rank=5)), Recorded(Uniform(rank=5))
    for method in (Uniform(rank=5), clock, recorder):
        with use(model, method):
            found.append(model(**inputs).last_hidden_state)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len(clock.seconds) == len(recorder.calls) == len(attention_layers(model))
    assert all(seconds >= 0 for seconds in clock.seconds)


# Scores


def test_scores_know_the_best_and_the_worst():
    states = torch.randn(50, 8)
    assert cosine(states, 3 * states) == pytest.approx(1) and cosine(states, -states) == pytest.approx(-1)
    assert correlation(states, 2 * states + 5) == pytest.approx(1) and correlation(states, torch.ones(50, 8)) == 0
    assert same_neighbours(states, 2 * states) == 1 and same_neighbours(states, torch.randn(50, 8)) < 0.3
    errors = output_errors(1.5 * torch.ones(2, 2), torch.ones(2, 2), torch.tensor([2.0, -4.0]))
    assert errors == {"relative": 0.5, "largest": 0.5, "bounded": 0.125}


@pytest.mark.parametrize(
    ("said", "written", "errors"),
    [("a b c", "a b c", 0), ("A, b. C!", "a b c", 0), ("a b c", "", 3), ("", "a", 1), ("a b c d", "a x c d e", 2)],
)
def test_word_errors_are_the_least_changes(said, written, errors):
    assert word_errors(said, written) == (errors, len(said.split()))


# Layers


METHODS = {"exact": Exact(), "half": Uniform(rank=32)}


def test_a_layer_is_measured_against_exact_attention():
    source = Gaussian(source="gaussian", n=[64], d=8)
    task = Layers(sources=[source])
    (case,) = task.cases()
    wanted = [tasks.Wanted(name, 0, lambda n, grid, made=made: made) for name, made in METHODS.items()]
    exact, half = task.measure(case, wanted)
    assert exact.scores["relative"] < 1e-5 and exact.shares["work"] == 1
    assert half.scores["relative"] > 0.1 and 0.4 < half.shares["work"] < 0.6
    assert source.layer(case).query.equal(source.layer(case).query)


def test_the_shapes_of_the_paper_come_from_a_layer():
    layer = layers.Layer(*(torch.randn(1, 6, 1 + 64, 4) for _ in range(3)), 0.5)
    t2t, biggan = layers._like_t2t(layer), layers._like_biggan(layer)
    assert [tuple(part.shape) for part in t2t[:3]] == [(1, 1, 64, 4)] * 3
    assert [tuple(part.shape) for part in biggan[:3]] == [(1, 1, 64, 4), (1, 1, 16, 4), (1, 1, 16, 16)]
    corner = layer.key[0, 0, [1, 2, 9, 10]]
    assert torch.equal(biggan.key[0, 0, 0], corner.amax(0))
    assert torch.equal(biggan.value[0, 0, 0, 4:8], layer.value[0, 1, [1, 2, 9, 10]].amax(0))


# Real encoders, with tiny ones in their place


@pytest.fixture
def tiny_dinov2(monkeypatch):
    """A tiny DINOv2 whose pictures are noise."""
    backbone = FAMILIES["dinov2"].build(patch_size=14, image_size=56)
    head = SaliencyHead()
    head[0] = torch.nn.ConvTranspose2d(32, 256, 4, 2, 1)
    made = Dinov2(backbone, head)
    for module in (tasks, layers):
        monkeypatch.setattr(module, "dinov2_small", lambda: made)
        monkeypatch.setattr(module, "picture", lambda name, side: torch.rand(3, side, side, generator=_generator(name)))
    return made


def _generator(name):
    return torch.Generator().manual_seed(PICTURES.index(name))


def test_pictures_are_compared_with_what_exact_attention_sees(tiny_dinov2):
    task = tasks.Pictures(pixels=[84, 56], inputs=2)
    cases = task.cases()
    assert [case.n for case in cases] == [17, 17, 37, 37] and cases[0].group == "56 px, 17 tokens"
    choices = {"exact": Choice(method="exact"), "few": Choice(method="uniform", settings={"rank": 3})}
    wanted = [tasks.Wanted(name, 0, lambda n, grid, one=one: one.build(n, 0, grid)) for name, one in choices.items()]
    exact, few = task.measure(cases[2], wanted)
    assert all(score > 0.9999 for score in exact.scores.values())
    assert few.scores["patches"] < 0.999 and few.scores["summary"] < 0.999
    assert all(share > 0 for share in few.shares.values())
    with pytest.raises(ValueError, match="pixels=60 must be a multiple of 14"):
        tasks.Pictures(pixels=[60]).cases()


def test_digits_are_read_by_a_probe_of_exact_features(tiny_dinov2, monkeypatch):
    labels = torch.arange(60) % 3
    drawn = torch.rand(60, 3, 56, 56, generator=_generator("china")) * 0.2
    drawn[torch.arange(60), labels] += 0.8  # a colour for each class
    monkeypatch.setattr(eval.attention.digits, "dinov2_small", lambda: tiny_dinov2)
    monkeypatch.setattr(eval.attention.digits, "digits", lambda count, pixels: (drawn[:count], labels[:count]))
    task = eval.attention.digits.Digits(pixels=56, inputs=2, batch=10, fitted=40)
    cases = task.cases()
    assert [(case.input, case.n, case.grid) for case in cases] == [("batch 1", 17, (4, 4)), ("batch 2", 17, (4, 4))]
    blind = Stub()
    wanted = [tasks.Wanted(name, 0, lambda n, grid, one=one: one) for name, one in (("a", Exact()), ("b", blind))]
    exact, poor = task.measure(cases[1], wanted)
    assert exact.scores == {"right": 1.0, "same": 1.0}
    assert poor.scores["right"] <= 0.5 and poor.scores["same"] == poor.scores["right"]


class Stub(Exact):
    """Attends to nothing."""

    def attend(self, query, key, value, scale):
        return torch.zeros(*query.shape[:-1], value.shape[-1]) + 100 * torch.randn(
            value.shape[-1], generator=_generator("coins")
        )


def test_a_probe_tells_classes_apart_that_a_line_can():
    features = torch.randn(40, 6, generator=_generator("china"))
    labels = (features[:, 0] > 0).long() * 3 + 1
    probe = eval.attention.digits.Probe.fit(features + 10 * torch.eye(6)[5], labels)
    assert (probe.read(features + 10 * torch.eye(6)[5]) == labels).double().mean() > 0.85


@here(_SKLEARN)
def test_digits_come_out_of_a_wheel():
    drawn, labels = digits(10, 28)
    assert drawn.shape == (10, 3, 28, 28) and labels.tolist() == list(range(10))
    assert drawn.min() == 0 and 0.9 < drawn.max() <= 1 and torch.equal(drawn[:, 0], drawn[:, 2])


def test_what_the_model_saw_is_drawn_side_by_side(tiny_dinov2, tmp_path):
    config = RunConfig(
        tasks=[{"task": "pictures", "pixels": [56], "inputs": 2, "shown": 1}], methods=["exact", "uniform"]
    )
    eval.attention.run.run(config, tmp_path / "run", command="x", resume=False)
    views = sorted(path.name for path in (tmp_path / "run" / "views").iterdir())
    assert views == ["56-px-17-tokens-china-exact.png", "56-px-17-tokens-china-uniform.png"]
    assert (
        "![views-56-px-17-tokens-china](views-56-px-17-tokens-china.png)" in (tmp_path / "run/summary.md").read_text()
    )


def test_a_view_is_that_of_the_exact_features_where_nothing_is_lost():
    seen = Features(torch.zeros(4), torch.randn(6, 5, 4), torch.rand(84, 70))
    other = Features(torch.zeros(4), torch.randn(6, 5, 4), torch.zeros(84, 70))
    exact, poor = tasks.view(seen, seen), tasks.view(other, seen)
    assert exact.shape == poor.shape == (6, 10, 3) and exact.dtype == np.uint8
    assert exact[:, 5:].min() == 0 and exact[:, 5:].max() == 255
    mean = seen.saliency.view(6, 14, 5, 14).mean((1, 3))
    np.testing.assert_allclose(exact[:, :5, 0] / 255, mean, atol=0.003)
    assert (poor[:, :5] == 0).all() and not np.array_equal(exact[:, 5:], poor[:, 5:])


def test_a_captured_layer_is_the_models(tiny_dinov2):
    source = Captured(source="dinov2", pixels=[56], layers=[1])
    (case,) = source.cases()
    layer = source.layer(case)
    assert layer.query.shape == (1, 4, 17, 8) and layer.scale == pytest.approx(8**-0.5)
    assert case.group == "DINOv2, n 17, layer 1" and case.grid == (4, 4)
    for shape, n in (("t2t", 16), ("biggan", 4)):
        source = Captured(source="dinov2", pixels=[56], layers=[1], shape=shape)
        (case,) = source.cases()
        assert case.n == n and source.layer(case).key.shape[2] == n


# Files of weights


def _number(value):
    """A number as protocol buffers write it."""
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number, content):
    if isinstance(content, int):
        return _number(number << 3) + _number(content)
    return _number(number << 3 | 2) + _number(len(content)) + content


def _onnx_tensor(name, array):
    dims = b"".join(_field(1, size) for size in array.shape)
    return _field(
        5, dims + _field(2, 1 if array.dtype == np.float32 else 7) + _field(8, name) + _field(9, array.tobytes())
    )


def test_an_onnx_file_gives_its_tensors_by_name_and_by_reader():
    wide = np.arange(600, dtype=np.float32).reshape(2, 300)
    node = _field(1, _field(1, b"x") + _field(1, b"onnx::MatMul_7") + _field(3, b"/fc/MatMul") + _field(4, b"MatMul"))
    graph = node + _onnx_tensor(b"fc.bias", wide[0]) + _onnx_tensor(b"onnx::MatMul_7", wide)
    graph += _onnx_tensor(b"shape", np.array([1, 2]))
    found = read_onnx(_field(1, 8) + _field(7, graph))
    assert set(found) == {"fc.bias", "/fc/MatMul"}
    assert torch.equal(found["/fc/MatMul"], torch.from_numpy(wide))
    for broken in (b"", b"PK\3\4 and so on", _field(7, graph)[:-9]):
        with pytest.raises(ValueError, match="no ONNX file"):
            read_onnx(broken)


def test_a_ctranslate2_file_gives_its_half_precision_tensors():
    def text(word):
        return struct.pack("<H", len(word) + 1) + word + b"\0"

    half = torch.tensor([[1.5, -2.0, 0.25]], dtype=torch.float16)
    content = struct.pack("<I", 6) + text(b"WhisperSpec") + struct.pack("<II", 3, 2)
    content += text(b"decoder/num_heads") + bytes([0]) + bytes([2]) + struct.pack("<I", 2) + b"\6\0"
    content += text(b"encoder/w") + bytes([2]) + struct.pack("<II", 1, 3) + bytes([4]) + struct.pack("<I", 6)
    content += half.numpy().tobytes()
    ((name, tensor),) = _read_ctranslate2(content)
    assert name == "encoder/w" and torch.equal(tensor, half.float())
    with pytest.raises(ValueError, match="no CTranslate2 file of version 6"):
        list(_read_ctranslate2(struct.pack("<I", 5)))


def test_a_wheel_of_one_platform_is_fetched_everywhere():
    wheel = Wheel("scikit-image", "0.26.0", "0" * 64, tag="cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64")
    assert wheel.filename == "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"
    words = "--implementation cp --python-version 3.11 --abi cp311"
    platforms = "--platform=manylinux_2_24_x86_64 --platform=manylinux_2_28_x86_64"
    assert " ".join(wheel.target) == f"{words} {platforms}"
    assert Wheel("a", "1", "0" * 64).target == []
    assert Wheel("a", "1", "0" * 64, python_version="3.12").target == ["--python-version", "3.12"]


# The real ones, where they have been fetched before


@here(WHEEL)
def test_dinov2_sees_the_astronaut():
    model, pixels = dinov2_small(), picture("astronaut", 224)
    seen = model(pixels)
    assert seen.patches.shape == (16, 16, 384) and seen.saliency.shape == (224, 224)
    # Her face stands out, the corner with the flag's edge does not.
    assert seen.saliency[30:110, 80:140].mean() > 2 * seen.saliency[:, -40:].mean()
    with use(model.backbone, Exact()):
        assert cosine(model(pixels).patches, seen.patches) > 0.9999


@here(SPEECH_WHEEL)
def test_whisper_writes_down_a_known_speech():
    if not (cache_folder() / "recordings" / "nodejs-whisper-0.3.1.tgz").is_file():
        pytest.skip("the recording is not in the cache")
    clip, model = clips(1)[0], whisper_tiny()
    with use(model.model.model.encoder, Exact()) as names:
        written = model.write(model.hear(clip.sound))
    assert len(names) == 4 and word_errors(clip.text, written) == (0, 22)
    with use(model.model.model.encoder, WildCatAttention(rank=16, bins=4)):
        assert model.write(model.hear(clip.sound)) != written


@here(TEXT_WHEEL)
def test_minilm_embeds_a_text_as_it_does_alone():
    texts = [
        "The cat sat on the mat.",
        "A kitten was lying on a rug near the door of the house.",
        "Interest rates rose.",
    ]
    model = minilm()
    exact = model.embed(texts)
    assert exact[0] @ exact[1] > 0.4 > 0.2 > exact[0] @ exact[2]
    with use(model.model, Exact()):  # with masks of padding
        torch.testing.assert_close(model.embed(texts), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.embed(texts[:1]), exact[:1], rtol=1e-4, atol=1e-5)


def test_rankings_are_compared():
    texts, questions = torch.eye(5), torch.rand(5, 5)
    same = tasks.Texts._scores((texts, questions), (texts, questions))
    assert same == pytest.approx({"embeddings": 1, "ranking": 1, "first": 1})
    assert tasks.Texts._scores((texts, -questions), (texts, questions))["ranking"] == pytest.approx(-1)


def test_passages_are_whole_sentences_of_at_least_so_many_words():
    found = passages(3, 50)
    assert len(set(found)) == 3 and found == passages(3, 50)
    assert all(len(text.split()) >= 50 and text[0].isupper() and text[-1] in ".!?" for text in found)


def test_the_committed_files_are_read():
    files = sorted((Path(__file__).parents[2] / "configs" / "attention").glob("*.yaml"))
    assert files
    for path in files:
        config = read_config(path)
        assert config.name == path.stem and json.dumps(config.model_dump(mode="json"))
