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
        "expected_attention": kvpress.ExpectedAttentionPress(ratio),
    }


class Recorder:
    """A hook behind every attention layer: asks each method what it would keep, and changes nothing.

    Args:
        methods: by name.

    Attributes:
        found: of each layer queries, keys and values (heads, n, d), `kept.NAME` and `scores.NAME` (heads, n).
    """

    def __init__(self, methods: dict[str, Any]) -> None:
        self.methods = methods
        self.found: dict[str, list[Tensor]] = defaultdict(list)

    def __call__(self, module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        """See torch's `register_forward_hook`."""
        hidden, layer = kwargs["hidden_states"], kwargs["past_key_values"].layers[module.layer_idx]
        queries = module.q_proj(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        queries, _ = apply_rotary_pos_emb(queries, layer.keys, *kwargs["position_embeddings"])
        for name, tensor in (("queries", queries), ("keys", layer.keys), ("values", layer.values)):
            self.found[name].append(tensor[0].clone())
        for name, press in self.methods.items():
            attentions = attention(module, queries, layer) if name == "h2o" else None
            given = (module, hidden, layer.keys, layer.values, attentions, kwargs)
            self.found[f"scores.{name}"].append(getattr(press, "press", press).score(*given)[0].float())
            module.masked_key_indices = None
            keys, _ = press.compress(*given)
            if module.masked_key_indices is None:
                mask = kept_mask(layer.keys[0], list(keys[0]))
            else:  # AdaKV marks what it drops
                mask = torch.ones(keys.shape[1:3], dtype=torch.bool)
                mask[module.masked_key_indices[1:]] = False
                module.masked_key_indices = None
            self.found[f"kept.{name}"].append(mask)


def attention(module: Any, queries: Tensor, layer: Any) -> Tensor:
    """All probabilities (1, query_heads, n, n), as Transformers' own eager attention has them."""
    n = queries.shape[2]
    mask = torch.full((n, n), torch.finfo(queries.dtype).min).triu(1)[None, None]
    return eager_attention_forward(module, queries, layer.keys, layer.values, mask, module.scaling)[1]


@torch.no_grad()
def main(job: Path) -> None:
    """Read every text of the job, and write what each method keeps of it."""
    work = json.loads(job.read_text())
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32, attn_implementation="sdpa")
    for text in work["texts"]:
        recorder = Recorder(presses(1 - text["ratio"]))
        hooks = []
        for layer in model.model.layers:
            layer.self_attn.rotary_emb = model.model.rotary_emb
            hooks.append(layer.self_attn.register_forward_hook(recorder, with_kwargs=True))
        cache = DynamicCache(config=model.config)
        model(torch.tensor([text["ids"]]), past_key_values=cache, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        save_file({name: torch.stack(found) for name, found in recorder.found.items()}, text["output"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
