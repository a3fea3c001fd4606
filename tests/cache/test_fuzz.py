"""Any order of what can happen to a cache, against a record of everything that was read."""

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.driver import EVEN, METHODS, SCALE, Projecting
from tests.tiny import SMALL
from wildcat_kv import WildCatCache, WildCatConfig, weighted_attention
from wildcat_kv.cache.budget import block_size, share_budget

LAYERS = {"full": ["full_attention"] * 2, "hybrid": ["full_attention", "sliding_attention", "full_attention"]}
BUDGETS = [
    {"ratio": 0.2},
    {"ratio": 0.5, "bin_rank": 2},
    {"ratio": 0.8, "sink": 1, "window": 0, "bin_rank": 1},
    {"ratio": 0.9},
    {"ratio": 0.2, "min_tokens": 30},
    {"ratio": 1.0, "min_tokens": 20},
    {"ratio": 1.0},
    {"max_tokens": 15},
    {"max_tokens": 40, "window": 0},
    {"max_tokens": 33, "sink": 0},
]
LONGEST = 24  # columns of one forward pass


class Caches(RuleBasedStateMachine):
    """A cache and, column by column, all keys, values and validity that a cache without a budget would hold."""

    @initialize(
        kind=st.sampled_from(sorted(LAYERS)),
        budget=st.sampled_from(BUDGETS),
        rows=st.integers(1, 3),
        masked=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        method=st.sampled_from(["default", *METHODS]),
        bits=st.sampled_from([{}, {}, *({"bits": bits, "group": group} for bits in (8, 4, 3, 2) for group in (8, 16))]),
        seed=st.integers(0, 2**16),
    )
    def build(self, kind, budget, rows, masked, dtype, method, bits, seed):
        types = LAYERS[kind]
        self.config = tf.Gemma3TextConfig(
            **{**SMALL, "num_hidden_layers": len(types), "layer_types": types, "sliding_window": 8}
        )
        self.settings = WildCatConfig(**{"sink": 3, "window": 6, "bin_rank": 4, **budget, **bits})
        self.options = {} if method == "default" else {"compressor": METHODS[method]}
        self.even = method in EVEN
        self.cache = WildCatCache(self.config, self.settings, **self.options)
        self.generator = torch.Generator().manual_seed(seed)
        self.masked, self.dtype, self.rows = masked, dtype, rows
        self.forget()

    def forget(self):
        """Nothing was read."""
        shape = (len(self.config.layer_types), self.rows, 2, 0, 16)
        self.keys, self.values = (torch.zeros(shape, dtype=self.dtype) for _ in range(2))
        self.valid = torch.zeros(self.rows, 0, dtype=torch.bool)
        self.recording = False

    # What happens

    @precondition(lambda self: self.masked and self.valid.shape[1])
    @rule(count=st.integers(2, LONGEST))
    def forward_with_another_mask(self, count):
        """Some tokens that are still exact are hidden from now on, or shown again."""
        exact = self.cache.layers[0].state.progress.since_fold
        at = self.valid.shape[1] - exact
        changed = torch.rand(self.rows, exact, generator=self.generator) > 0.3
        self.valid = torch.cat((self.valid[:, :at], changed), 1)
        self.forward(count)

    @rule(count=st.integers(1, LONGEST))
    def forward(self, count):
        shape = (len(self.config.layer_types), self.rows, 2, count, 16)
        new = [torch.randn(shape, generator=self.generator).to(self.dtype) for _ in range(2)]
        shown = torch.ones(self.rows, count, dtype=torch.bool)
        if self.masked and count > 1:
            shown = torch.rand(self.rows, count, generator=self.generator) > 0.3
        self.keys, self.values = torch.cat((self.keys, new[0]), 3), torch.cat((self.values, new[1]), 3)
        self.valid = torch.cat((self.valid, shown), 1)
        announced = self.cache.layers[0].announce(self.rows, count, self.valid if self.masked else None)
        for index, layer in enumerate(self.cache.layers):
            self.cache.update(new[0][index], new[1][index], index)
            if not hasattr(layer, "announce"):
                continue
            if layer.needs_module:
                layer.meet(Projecting(), 4, 16)
            queries = new[0][index].repeat_interleave(2, 1)
            if not announced.uses_fallback:
                self.check_attention(layer, queries)
            layer.after_attention(queries, SCALE)

    def check_attention(self, layer, queries):
        """However a layer holds its entries, it attends to all of them."""
        held, box = layer.state.storage.entries, layer.state.value_range
        found = layer.attend(queries, *layer.state.storage.view(), SCALE, {})
        assert torch.isfinite(found).all()
        if self.dtype == torch.float32:
            own = {"scale": SCALE, "valid": held.valid, "causal": True, "value_range": box and box.tensors()}
            expected = weighted_attention(queries, held.keys, held.numerators(), held.weights, **own)
            shown = self.valid[:, -queries.shape[2] :]  # nobody reads the outputs of padding
            ours, theirs = (outputs.transpose(1, 2)[shown] for outputs in (found, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    @rule(count=st.integers(1, 12))
    def decode(self, count):
        for _ in range(count):
            self.forward(1)

    @rule(count=st.integers(2, LONGEST), share=st.floats(0.1, 1))
    def draft(self, count, share):
        """Candidates, of which some are rejected."""
        self.record()
        self.forward(count)
        self.crop(share * count / self.cache.layers[0].state.croppable)

    @rule(share=st.floats(0, 1))
    def crop(self, share):
        """As many as can be taken back, and no more."""
        can = self.cache.layers[0].state.croppable
        for layer in self.cache.layers:
            if not hasattr(layer, "announce") and self.valid.shape[1]:
                held = layer.keys.shape[-2]
                can = min(can, held if held == self.valid.shape[1] else max(0, held - 7))
        if self.valid.shape[1]:
            with pytest.raises(ValueError, match="tokens_to_remove=-"):
                self.cache.crop(-can - 1)
        count = round(share * can)
        self.cache.crop(-count)
        kept = self.valid.shape[1] - count
        self.keys, self.values, self.valid = self.keys[..., :kept, :], self.values[..., :kept, :], self.valid[:, :kept]

    @rule()
    def record(self):
        self.cache.activate_past_recording()
        self.recording = True

    @precondition(lambda self: self.valid.shape[1])
    @rule(data=st.data(), how=st.sampled_from(["reorder", "select", "mask", "repeat"]))
    def move_rows(self, data, how):
        some = st.lists(st.integers(0, self.rows - 1), min_size=1, max_size=self.rows)
        index = torch.tensor(data.draw(some))
        if how == "repeat":
            index = torch.arange(self.rows).repeat_interleave(2 if self.rows <= 2 else 1)
            self.cache.batch_repeat_interleave(len(index) // self.rows)
        elif how == "mask":
            index = index.unique()
            self.cache.batch_select_indices(torch.isin(torch.arange(self.rows), index))
        else:
            (self.cache.reorder_cache if how == "reorder" else self.cache.batch_select_indices)(index)
        self.select_reference(index)

    def select_reference(self, index):
        self.keys, self.values, self.valid = self.keys[:, index], self.values[:, index], self.valid[index]
        self.rows = len(index)

    @precondition(lambda self: self.valid.shape[1])
    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "context.safetensors"
            self.cache.save(path)
            self.cache = WildCatCache.load(path, self.config, **self.options)

    @rule()
    def clone(self):
        self.cache = self.cache.clone()

    @rule()
    def reset(self):
        self.cache.reset()
        self.forget()

    # What must hold

    @invariant()
    def shapes_and_numbers_agree(self):
        read = self.valid.shape[1]
        for layer in self.cache.layers:
            assert layer.get_seq_length() == read
            if not hasattr(layer, "announce") or not read:
                continue
            entries = layer.state.storage.entries
            assert entries.keys.shape[:3] == entries.values.shape[:3] == entries.weights.shape == entries.valid.shape
            assert entries.keys.shape[0] == self.rows == len(layer.state.progress.rows)
            assert entries.keys.dtype == entries.values.dtype == self.dtype
            assert all(torch.isfinite(tensor).all() for tensor in entries.tensors()[:3])
            assert (entries.weights[~entries.valid] == 0).all()
            assert layer.keys.shape == entries.keys.shape
        numbers = [vars(layer.state.progress) for layer in self.cache.layers if hasattr(layer, "announce")]
        for other in numbers[1:]:  # all layers fold alike
            assert all(other[name] == numbers[0][name] for name in ("seen", "folded_at", "masked", "settled"))
            for row, first in zip(other["rows"], numbers[0]["rows"], strict=True):
                assert dataclasses.replace(row, spare=0) == dataclasses.replace(first, spare=0)
                assert not self.even or row.spare == 0 or (self.settings.bits and row.spare < 8)

    @invariant()
    def what_is_stored_is_within_budget(self):
        slack = self.settings.window + 2 * LONGEST if self.recording else 0
        for layer in self.cache.layers:
            if not hasattr(layer, "announce") or not self.valid.shape[1]:
                continue
            if self.settings.max_tokens is not None:
                assert layer.state.stored - layer.state.progress.spare <= self.settings.max_tokens + slack
                continue
            block = block_size(self.settings)
            for row in layer.state.count_rows(layer.state.progress.seen):
                assert row.counted <= share_budget(row.seen, self.settings) + block + slack

    @invariant()
    def heads_and_layers_share_what_the_budget_counts(self):
        layers = [layer for layer in self.cache.layers if hasattr(layer, "announce")]
        if not self.valid.shape[1]:
            return
        held = torch.stack([layer.state.storage.entries.valid.sum(-1).float().mean(-1) for layer in layers]).mean(0)
        for number, row in enumerate(layers[0].state.count_rows(self.valid.shape[1])):
            assert held[number] <= row.counted + 1e-3

    @invariant()
    def what_is_stored_was_read(self):
        """Exact tokens as they came; keys of slots among the row's keys; the clip around the row's values."""
        full = [index for index, layer in enumerate(self.cache.layers) if hasattr(layer, "announce")]
        for index in full if self.valid.shape[1] else []:
            layer, keys, values = self.cache.layers[index], self.keys[index], self.values[index]
            entries, folded = layer.state.storage.entries, layer.state.folded_range
            exact, stored, bits = layer.state.progress.since_fold, layer.state.stored, self.settings.bits
            assert torch.equal(entries.keys[:, :, stored - exact :], keys[:, :, keys.shape[2] - exact :])
            assert torch.equal(entries.values[:, :, stored - exact :], values[:, :, keys.shape[2] - exact :])
            for number, row in enumerate(layer.state.count_rows(layer.state.progress.seen)):
                shown = self.valid[number]
                assert row.seen == int(shown.sum())
                assert int(entries.valid[number].sum(-1).max()) <= row.stored
                own, held = keys[number][:, shown], entries.keys[number]
                error = 0.0 if bits is None else 0.05 if bits == 8 and self.settings.ratio else torch.inf
                for head in range(2):
                    slots = held[head][entries.valid[number, head]].float()
                    near = (slots[:, None] - own[head].float()).abs().amax(-1) <= error
                    assert near.any(-1).all()
                if folded is not None and (folded.lowest[number] <= folded.highest[number]).all():
                    lowest, highest = (bound[number, :, 0] for bound in layer.state.value_range.tensors())
                    assert torch.equal(lowest, values[number][:, shown].amin(1))
                    assert torch.equal(highest, values[number][:, shown].amax(1))


TestCaches = Caches.TestCase
TestCaches.settings = settings(max_examples=max(100, settings().max_examples), stateful_step_count=20)
