"""Where a layer's state lives: beside its keys, on whatever device; on the CPU in between when offloaded.

No accelerator is needed: fake tensors know their device and refuse to be mixed, and they have no data.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from tests.driver import METHODS, SCALE, Projecting, read, small_cache, state, tokens
from tests.driver import assert_same as assert_same_state
from tests.tiny import random_ids, tiny_model
from wildcat_kv import WildCatCache
from wildcat_kv.cache import refilling
from wildcat_kv.cache.state import LayerState
from wildcat_kv.coreset import bins
from wildcat_kv.coreset.wtdattn import WeightSigns
from wildcat_kv.hook.keyword import CACHE

DEVICES = ("toy:0", "toy:1")
# Methods that read numbers from the device, which fake tensors do not have: how unequal heads are, weights, whether
# a rotation is understood.
READ_BACK = {"adakv", "balancekv", *(name for name, method in METHODS.items() if method.needs_rotation)}


@pytest.fixture(scope="module")
def toy_backend():
    """A device type of torch's own for backends in the making; it has no kernels, and fake tensors need none."""
    setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        pytest.skip("this torch has no device type to play with")
    setup("toy")
    torch.toy.get_amp_supported_dtype = lambda: [torch.bfloat16]


@pytest.fixture(params=[WeightSigns.POSITIVE, WeightSigns.SIGNED], ids=lambda weighting: weighting.name.lower())
def fake(monkeypatch, toy_backend, request):
    # What a fold looks at on the host; fake tensors have nothing to look at.
    monkeypatch.setattr(LayerState, "check_finite", lambda self, keys: None)
    monkeypatch.setattr(WeightSigns, "of", staticmethod(lambda weights, valid: request.param))
    monkeypatch.setattr(refilling, "_read_signs", lambda state, pending, parts: request.param)
    monkeypatch.setattr(refilling, "_counts", lambda part: [[0]])
    # Small constants would be computed with after all, and there is nothing to compute with.
    monkeypatch.setattr(FakeTensorMode, "may_turn_const", lambda self, tensor: False)
    monkeypatch.setattr(bins, "_shared_layout", bins._layout)  # a fake tensor must not outlive its mode
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def step(cache, count, rows=2):
    """A forward pass whose layers live on two devices."""
    forward = cache.layers[0].announce(rows, 1, None)
    forward.queries = count
    for index, device in enumerate(DEVICES):
        keys = torch.zeros(rows, 2, count, 16, device=device)
        cache.update(keys, keys, index)
        queries = torch.zeros(rows, 4, count, 16, device=device)
        if cache.layers[index].needs_module:
            cache.layers[index].meet(Projecting(device=device), 4, 16)
        if not forward.uses_fallback:
            held = cache.layers[index].state.storage.view()
            assert str(cache.layers[index].attend(queries, *held, SCALE, {}).device) == device
        cache.layers[index].after_attention(queries, SCALE)


def devices(layer):
    return {str(tensor.device) for tensor in layer.tensors()}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("budget", [{"ratio": 0.25}, {"max_tokens": 30}])
@pytest.mark.parametrize("method", sorted(METHODS.keys() - READ_BACK))
def test_each_layer_lives_where_its_keys_do(fake, method, budget):
    cache = small_cache(method=method, **budget)
    step(cache, 60)
    for _ in range(40):
        step(cache, 1)
    cache.reorder_cache(torch.arange(2, device="toy:0"))
    cache.batch_repeat_interleave(2)
    step(cache, 1, rows=4)
    cache.activate_past_recording()
    step(cache, 5, rows=4)
    cache.crop(-3)
    assert cache.get_seq_length() == 103 and cache.layers[-1].stored < 40
    assert [devices(layer) for layer in cache.layers] == [{"toy:0"}, {"toy:1"}]
    fork = cache.clone()
    assert [devices(layer) for layer in fork.layers] == [{"toy:0"}, {"toy:1"}]


def test_offloading_keeps_keys_and_values_on_the_cpu_between_forward_passes(fake):
    """The layer's side of it; streams belong to Transformers' part and need a GPU."""
    cache = small_cache(ratio=0.25)
    for count in (60, 1, 1, 30):
        forward = cache.layers[0].announce(2, 1, None)
        forward.queries = count
        for index, layer in enumerate(cache.layers):
            layer.prefetch()
            keys = torch.zeros(2, 2, count, 16, device=DEVICES[index])
            returned = cache.update(keys, keys, index)
            layer.offload()
            assert all(str(tensor.device) == DEVICES[index] for tensor in returned)
            if not forward.uses_fallback:
                queries = torch.zeros(2, 4, count, 16, device=DEVICES[index])
                layer.attend(queries, *layer.state.storage.view(), SCALE, {})
            layer.after_attention(keys, SCALE)
            assert layer.keys.device.type == layer.values.device.type == "cpu"
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(0)
    for layer, device in zip(cache.layers, DEVICES, strict=True):
        assert layer.keys.device.type == "cpu"
        layer.prefetch()
        assert devices(layer) == {device}


def test_an_offloaded_cache_answers_as_any_other(monkeypatch):
    """With the streams of Transformers' part taken away, on the CPU, where moving is nothing."""

    class Stream:
        def wait_stream(self, other):
            pass

        def __deepcopy__(self, memo):
            raise TypeError("streams cannot be copied")

        __enter__ = __exit__ = lambda self, *args: None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    monkeypatch.setattr(torch, "Stream", lambda *args, **kwargs: Stream())
    model = tiny_model("gemma3")
    caches = [
        WildCatCache(model.config, compressor="wildcat", ratio=0.25, offloading=offloading)
        for offloading in (False, True)
    ]
    assert caches[1].offloading
    out = [model.generate(random_ids(2, 100), **{CACHE: cache}, max_new_tokens=60, num_beams=2) for cache in caches]
    assert torch.equal(*out)
    assert_same_state(state(caches[0]), state(caches[1]))
    assert_same_state(state(caches[1].clone()), state(caches[0]))


def test_offloading_without_cuda_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="offloading=True needs a CUDA device"):
        WildCatCache(model.config, compressor="wildcat", ratio=0.25, offloading=True)
    assert model.config._attn_implementation == "sdpa"


def test_dispatched_models_are_followed(tmp_path):
    """accelerate's hooks load each layer's weights from disk when its turn comes."""
    from accelerate import dispatch_model

    model, ids = tiny_model("llama"), random_ids(1, 150)
    expected = model.generate(
        ids, **{CACHE: WildCatCache(model.config, compressor="wildcat", ratio=0.25)}, max_new_tokens=40, do_sample=False
    )
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    dispatched = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "offloaded"))
    cache = WildCatCache(dispatched.config, compressor="wildcat", ratio=0.25)
    out = dispatched.generate(ids, **{CACHE: cache}, max_new_tokens=40, do_sample=False)
    assert torch.equal(out, expected)


def test_a_share_of_the_heads_is_enough():
    """Under tensor parallelism a process sees its own heads only, fewer than the config has."""
    keys, values = tokens(2, 200)
    whole, share = small_cache(ratio=0.25), small_cache(ratio=0.25)
    for at, count in ((0, 120), (120, 1), (121, 40)):
        read(whole, keys, values, at, count)
        read(share, keys[:, :, :1], values[:, :, :1], at, count)
    for all_heads, own in zip(whole.layers, share.layers, strict=True):
        assert own.keys.shape == (2, 1, *all_heads.keys.shape[2:])
        torch.testing.assert_close(own.keys[:, 0], all_heads.keys[:, 0])
        torch.testing.assert_close(own.values[:, 0], all_heads.values[:, 0], rtol=1e-4, atol=1e-5)


TENSOR_PARALLEL = """
import json, os, sys, torch, transformers
from pathlib import Path
from transformers.distributed import DistributedConfig
from tests.tiny import random_ids
from wildcat_kv import WildCatCache
from wildcat_kv.hook.keyword import CACHE
torch.set_grad_enabled(False)
folder = Path(sys.argv[1])
plan = DistributedConfig(tp_plan="auto")
model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=plan).eval()
found = []
for method, ratio in (("wildcat", 1.0), ("wildcat", 0.25), ("auto", 0.25)):
    cache = WildCatCache(model.config, compressor=method, ratio=ratio)
    out = model.generate(random_ids(1, 120), **{CACHE: cache}, max_new_tokens=60, do_sample=False)
    found.append([out[0].tolist(), list(cache.layers[0].keys.shape)])
(folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
# Both are done before either goes. No exit of the interpreter: threads of the process group may abort it.
torch.distributed.barrier()
os._exit(0)
"""


def test_tensor_parallel_processes_agree(tmp_path):
    """Two processes on the CPU, one of the two key heads each; within budget they answer as a single one does."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    expected = model.generate(random_ids(1, 120), max_new_tokens=60, do_sample=False)
    (tmp_path / "run.py").write_text(TENSOR_PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [tokens for tokens, _ in ranks[0]] == [tokens for tokens, _ in ranks[1]]
    (exact, _), (compressed, shape), (best, _) = ranks[0]  # heads that compete hold unequally much
    assert ranks[0][:2] == ranks[1][:2] and len(best) == 180
    assert exact == expected[0].tolist()
    assert len(compressed) == 180 and shape[1] == 1 and shape[2] < 80
