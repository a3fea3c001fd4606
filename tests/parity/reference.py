"""What the reference library keeps; runs in its environment, which has another Transformers, and knows no wildcat_kv.

python -m tests.parity.reference job.json
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import kvpress
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.logging import disable_progress_bar

from tests.parity.kept import kept_mask


def presses(ratio: float) -> dict[str, Any]:
    """The reference's methods that drop a share `ratio` of the tokens, by the names of ours."""
    return {
        "streaming_llm": kvpress.StreamingLLMPress(ratio, n_sink=4),
        "snapkv": kvpress.SnapKVPress(ratio),
        "pyramidkv": kvpress.PyramidKVPress(ratio),
        "tova": kvpress.TOVAPress(ratio),
        "h2o": kvpress.ObservedAttentionPress(ratio),
        "knorm": kvpress.KnormPress(ratio),
        "keydiff": kvpress.KeyDiffPress(ratio),
        "lagkv": kvpress.LagKVPress(ratio),
        "cur": kvpress.CURPress(ratio),
        "adakv": kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
        "adakv, safeguard 0.8": kvpress.AdaKVPress(kvpress.SnapKVPress(ratio), alpha_safeguard=0.8),
        "expected_attention": kvpress.ExpectedAttentionPress(ratio),
        "criticalkv": kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio)),
        "criticalkv, heads compete": kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(ratio)),
    }


class KVzip(kvpress.KVzipPress):
    """The reference's KVzip, which forgets its scores when it is done, with the scores."""

    def compress_post(self, model: Any) -> None:
        super().compress_post(model)
        self.scores = self.score_val


class Recorder:
    """A hook behind every attention layer: asks each method what it would keep, and changes nothing.

    When a text is read again, it only takes down the queries and keys of what is read.

    Args:
        methods: by name.

    Attributes:
        found: of each layer queries, keys and values (heads, n, d), `kept.NAME` and `scores.NAME` (heads, n), and the
            weights `projection` (heads, d, hidden); `again.START.queries`, `again.START.keys` and `again.START.norms`,
            of the hidden states, of the pass that repeats the text from token START.
    """

    def __init__(self, methods: dict[str, Any]) -> None:
        self.methods = methods
        self.start = 0
        self.found: dict[str, list[Tensor]] = defaultdict(list)

    def __call__(self, module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        """See torch's `register_forward_hook`."""
        hidden, layer = kwargs["hidden_states"], kwargs["past_key_values"].layers[module.layer_idx]
        count = hidden.shape[1]
        queries = module.q_proj(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        queries, _ = apply_rotary_pos_emb(queries, layer.keys[:, :, :1], *kwargs["position_embeddings"])
        if count < layer.keys.shape[2]:
            self.found[f"again.{self.start}.queries"].append(queries[0].clone())
            self.found[f"again.{self.start}.keys"].append(layer.keys[0, :, -count:].clone())
            self.found[f"again.{self.start}.norms"].append(hidden[0].norm(dim=-1))
            return
        for name, tensor in (("queries", queries), ("keys", layer.keys), ("values", layer.values)):
            self.found[name].append(tensor[0].clone())
        weights = module.o_proj.weight.detach().mT.unflatten(0, (queries.shape[1], -1))
        self.found["projection"].append(weights.contiguous())
        for name, press in self.methods.items():
            attentions = attention(module, queries, layer) if name == "h2o" else None
            given = (module, hidden, layer.keys, layer.values, attentions, kwargs)
            scorer = press if hasattr(press, "score") else press.press
            self.found[f"scores.{name}"].append(scorer.score(*given)[0].float())
            module.masked_key_indices = None
            keys, _ = press.compress(*given)
            unequal = module.masked_key_indices is not None
            self.found[f"kept.{name}"].append(unmasked(module, keys) if unequal else kept_mask(layer.keys[0], keys[0]))


def unmasked(module: Any, keys: Tensor) -> Tensor:
    """What a method with unequal heads keeps, bool (heads, n): it marks what it drops."""
    mask = torch.ones(keys.shape[1:3], dtype=torch.bool)
    mask[module.masked_key_indices[1:]] = False
    module.masked_key_indices = None
    return mask


def attention(module: Any, queries: Tensor, layer: Any) -> Tensor:
    """All probabilities (1, query_heads, n, n), as Transformers' own eager attention has them."""
    n = queries.shape[2]
    mask = torch.full((n, n), torch.finfo(queries.dtype).min).triu(1)[None, None]
    return eager_attention_forward(module, queries, layer.keys, layer.values, mask, module.scaling)[1]


@torch.no_grad()
def read(model: Any, ids: list[int], ratio: float) -> dict[str, Tensor]:
    """What every method keeps of a text."""
    recorder, again = Recorder(presses(1 - ratio)), KVzip(1 - ratio)
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        layer.rotary_emb = model.model.rotary_emb
    hooks = [layer.register_forward_hook(recorder, with_kwargs=True) for layer in layers]
    # KVzip reads the text again, in chunks, when the block ends.
    hooks.append(model.model.register_forward_pre_hook(lambda *_: setattr(recorder, "start", again.start_idx)))
    found = recorder.found
    found["kept.kvzip"], found["scores.kvzip"] = zipped(model, ids, again)
    for hook in hooks:
        hook.remove()
    plus = KVzip(1 - ratio, kvzip_plus_normalization=True)
    found["kept.kvzip_plus"], found["scores.kvzip_plus"] = zipped(model, ids, plus)
    return {name: torch.stack(parts) for name, parts in found.items()}


def zipped(model: Any, ids: list[int], press: KVzip) -> tuple[list[Tensor], list[Tensor]]:
    """Give the tokens that KVzip keeps in each layer, bool (heads, n), and its scores (heads, n)."""
    cache = DynamicCache(config=model.config)
    with press(model):
        model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
        press.prefix_length = 0  # the text has no chat template around it
    layers = [layer.self_attn for layer in model.model.layers]
    kept = [unmasked(layer, held.keys) for layer, held in zip(layers, cache.layers, strict=True)]
    return kept, list(press.scores[:, 0])


def main(job: Path) -> None:
    """Read every text of the job, and write what each method keeps of it."""
    disable_progress_bar()
    work = json.loads(job.read_text())
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32, attn_implementation="sdpa")
    for text in work["texts"]:
        save_file(read(model, text["ids"], text["ratio"]), text["output"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
