"""Files of caches in bands: damage is found and named, and other versions are told apart."""

import json

import pytest
import torch

from tests.cache.test_disk import contents, header_change, rewrite
from tests.tiny import random_ids, tiny_model
from wildcat_kv import CompressedCache, WildCatCache
from wildcat_kv.cache.disk.inspection import inspect_file
from wildcat_kv.compressors import H2O, AdaKV
from wildcat_kv.hook.keyword import CACHE


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module", params=[3, None], ids=["bits", "plain"])
def content(request, llama, tmp_path_factory):
    """A file of a cache with unequal heads, with and without bits; there are slots of two kinds of groups."""
    cache = CompressedCache(llama.config, compressor=AdaKV(H2O()), ratio=0.4, sink=32, bits=request.param, group=16)
    llama(random_ids(2, 250), **{CACHE: cache})
    path = tmp_path_factory.mktemp("banded") / "context.safetensors"
    cache.save(path)
    assert all(layer["bands"] for layer in contents(path)[1]["layers"])
    return path


def refused(path, change, model, message="layer 1: "):
    """The damage is told in one sentence that names the file and the layer."""
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as error:
        CompressedCache.load(path, model.config)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.fixture
def copy(content, tmp_path):
    path = tmp_path / "context.safetensors"
    path.write_bytes(content.read_bytes())
    return path


def of_bands(path):
    """The names of the tensors of layer 1's bands."""
    return sorted(name for name in contents(path)[2] if name.startswith("layers.1.bands."))


CHANGES = {
    "missing": lambda tensor: None,
    "one more head": lambda tensor: torch.cat((tensor, tensor[:1])),
    "no head": lambda tensor: tensor[:0],
    "shorter": lambda tensor: tensor[:, :-1] if tensor.dim() < 4 else tensor[:, :, :-1],
    "longer": lambda tensor: torch.cat((tensor, tensor[:, -1:]), 1),
    "fewer channels": lambda tensor: tensor[..., : tensor.shape[-1] // 2],
    "no channels": lambda tensor: tensor[..., :0],
    "other dimensions": lambda tensor: tensor.unsqueeze(0),
    "flat": lambda tensor: tensor.flatten(),
    "integers": lambda tensor: tensor.to(torch.int64),
    "other floats": lambda tensor: tensor.to(torch.float64),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_damaged_tensor_is_found(kind, content, copy, llama):
    whole = content.read_bytes()
    names = of_bands(content)
    # One band and one segment: all others have the same names.
    first = [name for name in names if name.startswith(("layers.1.bands.0.", "layers.1.bands.1."))]
    assert any(name.endswith("scale") for name in first) or not any("codes" in name for name in names)
    for name in first:
        copy.write_bytes(whole)
        made = []

        def change(metadata, tensors, name=name, made=made):
            changed = CHANGES[kind](tensors.pop(name))
            if changed is not None:
                tensors[name] = changed.contiguous()
            made.append(changed)

        refused(copy, change, llama)
        assert len(made) == 1


@pytest.mark.parametrize("content", [3], indirect=True)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("width", [0, 1, 3, 8, 32])
def test_scales_of_other_widths_are_found(side, width, copy, llama):
    """Scale and lowest number alike."""

    def change(metadata, tensors):
        for part in ("scale", "lowest"):
            name = f"layers.1.bands.0.0.{side}.{part}"
            tensors[name] = tensors[name][..., :1].repeat(1, 1, 1, width).contiguous()

    if (side, width) in (("values", 1), ("values", 8)):  # widths that divide are a layout of their own
        rewrite(copy, change)
        CompressedCache.load(copy, llama.config)
    else:
        refused(copy, change, llama)


def of_band(change):
    return header_change(lambda header: change(header["layers"][1]["bands"]))


@pytest.mark.parametrize(
    "change",
    [
        lambda bands: bands[0]["places"].reverse(),
        lambda bands: bands[0]["places"].pop(),
        lambda bands: bands[0].update(places=[]),
        lambda bands: bands[0]["places"].append(0),
        lambda bands: bands[0]["places"].__setitem__(0, 99),
        lambda bands: bands[0]["places"].__setitem__(0, -1),
        lambda bands: bands[0].update(places=bands[-1]["places"]),
        lambda bands: bands.pop(),
        lambda bands: bands.clear(),
        lambda bands: bands.append(bands[0]),
        lambda bands: bands[0].update(sink=bands[0]["sink"] + 1),
        lambda bands: bands[0].update(sink=-1, waiting=bands[0]["waiting"] + 33),
        lambda bands: bands[0].update(sink=bands[0]["sink"] - 1, waiting=bands[0]["waiting"] + 1),
        lambda bands: bands[0].update(waiting=-1),
        lambda bands: bands[0].update(waiting=bands[0]["waiting"] + 1),
        lambda bands: bands[0].update(length=bands[0]["length"] - 1),
        lambda bands: bands[0].update(length=bands[0]["length"] + 1),
        lambda bands: bands[0].update(length=10**9),
        lambda bands: bands[0].update(segments=bands[0]["segments"] + 1),
        lambda bands: bands[0].update(segments=9),
    ],
)
def test_wrong_places_and_counts_are_found(change, copy, llama):
    before = contents(copy)[1]["layers"][1]["bands"]
    changed = json.loads(json.dumps(before))
    change(changed)
    if sorted(map(str, changed)) == sorted(map(str, before)):
        pytest.skip("a band of one head, which has no other order")
    refused(copy, of_band(change), llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_band(lambda bands: bands[0].update(segments=-1)), "header does not fit"),
        (of_band(lambda bands: bands[0].update(surprise=1)), "header does not fit"),
        (of_band(lambda bands: bands[0].pop("places")), "header does not fit"),
        (header_change(lambda header: header["layers"][1].update(length=7)), "layer 1: "),
        (header_change(lambda header: header["layers"][1]["progress"]["rows"][0].update(spare=5000)), "layer 1: "),
        (header_change(lambda header: header["layers"][1]["progress"]["rows"][1].update(sink=3)), "layer 1: "),
        (header_change(lambda header: header["settings"].update(bits=5)), "bits"),
        (lambda metadata, tensors: metadata.update(version="6"), "format version 6, and this release reads 4 and 5"),
        (lambda metadata, tensors: tensors.update({"layers.1.bands.77.keys": torch.zeros(1)}), "layer 1: "),
    ],
)
def test_a_header_that_does_not_fit_is_refused(change, message, copy, llama):
    refused(copy, change, llama, message)


@pytest.mark.parametrize("content", [3], indirect=True)
def test_numbers_of_other_bits_do_not_fit(content, copy, llama):
    refused(copy, header_change(lambda header: header["settings"].update(bits=None)), llama, "layer 0: ")
    copy.write_bytes(content.read_bytes())
    refused(copy, header_change(lambda header: header["settings"].update(bits=8)), llama, "layer 0: ")


@pytest.mark.parametrize("content", [3], indirect=True)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["scale", "lowest"])
def test_scales_that_are_no_numbers_are_found(part, number, copy, llama):
    names = [name for name in of_bands(copy) if name.endswith(part)]

    def change(metadata, tensors):
        tensors[names[-1]].view(-1)[-1] = number

    refused(copy, change, llama, "layer 1: its scales are no numbers")


def test_a_file_of_the_version_before_bands_is_read(llama, tmp_path):
    """It is what a plain cache writes, without the words that are new."""
    cache, path = WildCatCache(llama.config, compressor="wildcat", ratio=0.4), tmp_path / "context.safetensors"
    llama(random_ids(1, 150), **{CACHE: cache})
    cache.save(path)

    def older(metadata, tensors):
        header = json.loads(metadata["header"])
        for layer in header["layers"]:
            del layer["bands"]
        for name in ("bits", "group", "max_bytes"):
            header["settings"].pop(name, None)
        metadata.update(version="4", header=json.dumps(header))

    rewrite(path, older)
    loaded = WildCatCache.load(path, llama.config).clone()
    ids = random_ids(1, 9)
    assert torch.equal(llama(ids, **{CACHE: loaded}).logits, llama(ids, **{CACHE: cache}).logits)


def test_a_look_into_the_file_tells_what_the_cache_holds(content, llama):
    cache, found = CompressedCache.load(content, llama.config), inspect_file(content)
    assert (found.rows, found.tokens, found.nbytes) == (2, 250, content.stat().st_size)
    for index, layer in enumerate(found.layers):
        assert (layer.kind, layer.heads, layer.channels, layer.dtype) == ("compressed", 2, 16, "F32")
        assert layer.stored == cache.stored_length(index)
        assert layer.slots == max(cache.layers[index].state.storage.slots_of_rows)
    assert sum(layer.nbytes for layer in found.layers) < found.nbytes
