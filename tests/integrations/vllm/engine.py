"""An engine that holds a context as ordinary tokens do: keys and values at positions 0 to r - 1, and no more."""

import torch
import transformers as tf

from wildcat_kv.hook.keyword import CACHE

_WEIGHTS = {}


def _attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention to entries with weights, which stand before the new tokens."""
    weights = _WEIGHTS.get(module.layer_idx)
    groups = query.shape[1] // key.shape[1]
    keys, values = (tensor.repeat_interleave(groups, dim=1).double() for tensor in (key, value))
    scores = query.double() @ keys.mT * scaling
    new, old = query.shape[2], key.shape[2] - query.shape[2]
    later = torch.ones(new, new, dtype=torch.bool).triu(1)
    scores[..., old:] = scores[..., old:].masked_fill(later, -torch.inf)
    terms = (scores - scores.amax(-1, keepdim=True)).exp()
    ones = torch.ones(key.shape[1], key.shape[2], dtype=torch.double)
    if weights is not None:
        ones[:, : weights.shape[1]] = weights
    masses = terms @ ones.repeat_interleave(groups, dim=0).unsqueeze(-1)
    return ((terms @ values) / masses).to(query.dtype).transpose(1, 2).contiguous(), None


tf.AttentionInterface.register("engine", _attention)


def next_logits(model, context, following):
    """Logits after each of the ids that follow a context, (m, vocabulary).

    Args:
        model: tiny model; its attention is switched to the engine's for the call.
        context: a `StoredContext`.
        following: ids int64 (1, m).
    """
    cache, header = tf.DynamicCache(), context.header
    for found in context.layers(range(header.layers)):
        cache.update(found.keys.unsqueeze(0), found.values.unsqueeze(0), found.index)
        _WEIGHTS[found.index] = found.weights
    before = model.config._attn_implementation
    model.config._attn_implementation = "engine"
    try:
        positions = header.slots + torch.arange(following.shape[1]).unsqueeze(0)
        return model(following, position_ids=positions, **{CACHE: cache}).logits[0]
    finally:
        model.config._attn_implementation = before
        _WEIGHTS.clear()
