"""Caches on the device beside references: the CPU, float64 definitions, Transformers' own cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from benchmarks.gpu.graphed import graphed
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.layers import Heads, OneLayer
from benchmarks.gpu.shapes import TINY
from wildcat_kv import CompressedCache, WildCatCache, compile_decoding
from wildcat_kv.compressors import available
from wildcat_kv.coreset.reference import wtdattn
from wildcat_kv.coreset.wtdattn import mass_of
from wildcat_kv.hook.keyword import CACHE

_TOKENS, _STEPS, _VOCABULARY = 300, 60, 512
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MAIN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("wildcat", {"ratio": 0.25}),
    ("wildcat", {"ratio": 0.25, "bits": 4}),
    ("query_wildcat", {"ratio": 0.25}),
    ("query_wildcat", {"ratio": 0.25, "bits": 4}),
)


def tiny(family: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Make a tiny random model, the same numbers on every device."""
    fields: dict[str, Any] = dict(_SMALL)
    if family == "Gemma3":
        fields |= {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 64}
        config, kind = transformers.Gemma3TextConfig(**fields), transformers.Gemma3ForCausalLM
    else:
        config = getattr(transformers, f"{family}Config")(**fields)
        kind = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    return kind(config).eval().requires_grad_(False).to(device, dtype)


def _ids(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(5, _VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def _padded() -> tuple[Tensor, Tensor]:
    ids = _ids(2, _TOKENS)
    mask = torch.ones_like(ids)
    mask[1, : _TOKENS * 2 // 5] = 0
    return ids, mask


@torch.no_grad()
def _logits(model: Any, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Give the logits, float64 on the CPU, of a prompt's last token and of fixed tokens after it, past a fold."""
    device = model.device
    forced = _ids(len(ids), _STEPS, seed=2)
    ids, mask = ids.to(device), mask.to(device)
    found = [model(ids, attention_mask=mask, **{CACHE: cache}, logits_to_keep=1).logits[:, -1]]
    for place in range(_STEPS):
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        token = forced[:, place : place + 1].to(device)
        found.append(model(token, attention_mask=mask, **{CACHE: cache}).logits[:, -1])
    return torch.stack(found).cpu().double()


def ratio_one(lab: Lab) -> Iterator[dict[str, Any]]:
    """Compare a cache that drops nothing with `DynamicCache`, token for token."""
    ids, mask = (each.to(lab.device) for each in _padded())
    for family in ("Llama", "Qwen2", "Gemma3"):
        model = tiny(family, lab.device, torch.bfloat16)
        options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
        theirs = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, **options)
        ours = model.generate(ids, **{CACHE: WildCatCache(model.config, compressor="wildcat", ratio=1.0)}, **options)
        yield _verdict(f"ratio 1 equals DynamicCache, {family}, bfloat16", torch.equal(ours, theirs))


def beside_cpu(lab: Lab, every: bool) -> Iterator[dict[str, Any]]:
    """Compare logits with the CPU's, float32, a padded row among them, past folds."""
    ids, mask = _padded()
    models = [tiny("Llama", device, torch.float32) for device in ("cpu", lab.device)]
    names = [each.name for each in available() if each.decodes and not each.reads_twice]
    cases = [(name, {"ratio": 0.25}) for name in names] if every else _MAIN
    for name, settings in cases:
        if lab.left < 0:
            return
        theirs, ours = (
            _logits(model, CompressedCache(model.config, compressor=name, sink=4, **settings), ids, mask)
            for model in models
        )
        told = f"{name}, {settings['bits']} bits" if "bits" in settings else name
        yield _difference(f"logits beside the CPU, {told}, float32", ours, theirs)


def padding(lab: Lab) -> Iterator[dict[str, Any]]:
    """Compare a padded row with the same row alone."""
    ids, mask = _padded()
    model = tiny("Llama", lab.device, torch.float32)
    alone = ids[1:, mask[1].bool()]
    for name, settings in _MAIN[::2]:

        def cache(name: str = name, settings: dict[str, Any] = settings) -> CompressedCache:
            return CompressedCache(model.config, compressor=name, sink=4, **settings)

        whole = _logits(model, cache(), ids[1:], mask[1:])
        part = _logits(model, cache(), alone, torch.ones_like(alone))
        yield _difference(f"a padded row beside the row alone, {name}, float32", whole, part)


@torch.no_grad()
def beams(lab: Lab) -> Iterator[dict[str, Any]]:
    """Compare beam search with the CPU's, token for token; and that it runs in bfloat16."""
    ids, mask = _padded()
    options = {"max_new_tokens": 40, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    for name, settings in _MAIN[::2]:
        found = []
        for device, dtype in (("cpu", torch.float32), (lab.device, torch.float32), (lab.device, torch.bfloat16)):
            model = tiny("Llama", device, dtype)
            cache = CompressedCache(model.config, compressor=name, **settings)
            texts = model.generate(ids.to(device), attention_mask=mask.to(device), **{CACHE: cache}, **options)
            found.append(texts.cpu())
        yield _verdict(f"beams beside the CPU, {name}, float32", torch.equal(found[0], found[1]))
        yield _verdict(f"beams run, {name}, bfloat16", found[2].shape == found[0].shape)


@torch.no_grad()
def graphs(lab: Lab, inductor: bool) -> Iterator[dict[str, Any]]:
    """Compare compiled steps with eager ones: as CUDA graphs on CUDA."""
    options: dict[str, Any] = {"mode": "reduce-overhead"} if inductor else {"backend": graphed}
    told = "inductor" if inductor else "CUDA graph"
    if lab.device.type == "cpu":
        options, told = {"backend": "eager"}, "eager"
    ids, forced = _ids(1, _TOKENS).to(lab.device), _ids(1, _STEPS, seed=2).to(lab.device)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("Llama", lab.device, dtype)
        found = []
        for traced in (False, True):
            torch._dynamo.reset()
            cache = WildCatCache(model.config, compressor="wildcat", max_tokens=128, static=True)
            model(ids, **{CACHE: cache})
            step = compile_decoding(model, cache, **options) if traced else _eager(model, cache)
            logits = [step(forced[:, place : place + 1]).cpu().double() for place in range(_STEPS)]
            found.append(torch.cat(logits))
        name = str(dtype).removeprefix("torch.")
        yield _difference(f"compiled steps beside eager ones ({told}), {name}", found[1], found[0])


def _eager(model: Any, cache: Any) -> Any:
    return lambda ids: model(ids, **{CACHE: cache}).logits


@torch.no_grad()
def attention(lab: Lab) -> Iterator[dict[str, Any]]:
    """Compare one token's attention to stored entries with the definition in float64."""
    for dtype in (torch.float32, torch.bfloat16):
        for method, more in (
            ("wildcat", {}),
            ("query_wildcat", {}),
            ("wildcat", {"bits": 4}),
            ("query_wildcat", {"bits": 4}),
        ):
            one = OneLayer(TINY, method, ratio=0.25, **more)
            heads = Heads.random(TINY, 2, 1000, torch.device("cpu"), torch.float32).to(lab.device, dtype)
            one.read(heads)
            one.fold(heads)
            queries = Heads.random(TINY, 2, 1, torch.device("cpu"), torch.float32).queries.to(lab.device, dtype)
            name = f"{method}, {more['bits']} bits" if more else method
            told = f"attention beside float64, {name}, {str(dtype).removeprefix('torch.')}"
            yield _difference(told, one.attend(queries).cpu().double(), _defined(one, queries))


def _defined(one: OneLayer, queries: Tensor) -> Tensor:
    """Attend as the definition says, to what the layer holds: float64 (rows, heads, 1, d)."""
    state = one.layer.state
    entries, box = state.storage.entries, state.value_range
    keys, values, weights, valid = (
        each.cpu() for each in (entries.keys, entries.values, entries.weights, entries.valid)
    )
    numerators = values.double() * mass_of(weights).double().unsqueeze(-1)
    rows, heads = queries.shape[:2]
    groups = heads // keys.shape[1]
    found = torch.empty(queries.shape, dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            at = (row, head // groups)
            shown = valid[at]
            lowest, highest = (bound[at].cpu().double() for bound in (box.lowest, box.highest))
            found[row, head] = wtdattn(
                queries[row, head].cpu(),
                keys[at][shown],
                numerators[at][shown],
                weights[at][shown],
                lowest,
                highest,
                scale=one.scale,
            )
    return found


@torch.no_grad()
def folded(lab: Lab) -> Iterator[dict[str, Any]]:
    """Compare what a fold stores with what the CPU stores: pivots, weights, numerators."""
    drawn = Heads.random(TINY, 2, 1000, torch.device("cpu"), torch.float32)
    for method in ("wildcat", "query_wildcat", "snapkv"):
        entries = []
        for device in ("cpu", lab.device):
            one, heads = OneLayer(TINY, method, ratio=0.25), drawn.to(device, torch.float32)
            one.read(heads)
            one.fold(heads)
            entries.append([each.cpu() for each in one.layer.state.storage.entries.tensors()[:3]])
        theirs, ours = entries
        same = (theirs[0] == ours[0]).all(-1).double().mean().item() if theirs[0].shape == ours[0].shape else 0.0
        row = _difference(f"a fold beside the CPU, {method}, float32", ours[2].double(), theirs[2].double())
        yield row | {"same_keys": same}


def _difference(check: str, ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    if ours.shape != theirs.shape:
        return {"check": check, "error": f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"}
    return {"check": check, "largest": (ours - theirs).abs().max().item(), "scale": theirs.abs().max().item()}


def _verdict(check: str, equal: bool) -> dict[str, Any]:
    return {"check": check, "equal": equal}
