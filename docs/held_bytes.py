"""Measure the bytes that the cache of each method holds: results/bytes/held.json, and a table.

    python docs/held_bytes.py

The context is one of `make smoke`: 1,000 tokens of essays, read once by the default model in float32. Sinks and windows
are of 32 tokens unless said. The bytes are `cache.memory_bytes()` over those of a `DynamicCache` with all tokens.
"""

import json
from pathlib import Path

from transformers import DynamicCache

from wildcat_kv import Context, load_preset, preset_names
from wildcat_kv.compressors import available
from wildcat_kv.data.haystack import build_context, make_needles
from wildcat_kv.models import default_model

RECORD = Path(__file__).parents[1] / "results" / "bytes" / "held.json"
TOKENS = 1000
RATIOS = (0.25, 0.1)


def main():
    """Measure, write the record and print it."""
    model, tokenizer = default_model()
    text = build_context(tokenizer, TOKENS, make_needles(1, 0), seed=0)
    ids = tokenizer(text, return_tensors="pt").input_ids
    plain = DynamicCache(config=model.config)
    model(ids, cache=plain, logits_to_keep=1)
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    context = Context(model, ids)
    contenders = [
        (f"{method.name}, {ratio}", {"compressor": method.name, "ratio": ratio})
        for ratio in RATIOS
        for method in available()
    ]
    contenders += [
        (f"query_wildcat, sink 4, {r}", {"compressor": "query_wildcat", "ratio": r, "sink": 4}) for r in RATIOS
    ]
    contenders += [(f"preset {name}", preset(model, name)) for name in preset_names()]
    rows = {"DynamicCache": {"bytes": whole, "share": 1.0}}
    for name, choice in contenders:
        held = context.compress(tokenizer=tokenizer, **choice).memory_bytes()
        rows[name] = {"bytes": held, "share": round(held / whole, 3)}
        print(f"{name:34} {held / 2**20:6.1f} MiB {held / whole:6.1%}", flush=True)
    record = {"model": "SmolLM2-135M-Instruct, 4-bit weights (Q4_1) in float32", "tokens": ids.shape[1], "caches": rows}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def preset(model, name):
    """The settings and the method of a preset for this model."""
    chosen = load_preset(name)
    return {"settings": chosen.settings_for(model.config), "compressor": chosen.compressor}


if __name__ == "__main__":
    main()
