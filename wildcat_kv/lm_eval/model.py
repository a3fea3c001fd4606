"""The model `wildcat` of lm-eval: any of its tasks, answered from a compressed cache.

Installed packages are found by lm-eval itself from its first release after 0.4.13 on; until then `wildcat-kv lm-eval`
is its command line with this model in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.compressors import available
from wildcat_kv.config import DROPPED, WildCatConfig
from wildcat_kv.contexts.context import Context
from wildcat_kv.contexts.prompts import encode_parts, messages_for
from wildcat_kv.contexts.reading import generate, join, loglikelihood, pad_left, read, token_losses
from wildcat_kv.lm_eval.splits import cut_middle, split_prompt
from wildcat_kv.models import default_model_path

EXACT = "exact"
# Options of `generate()` that say nothing where nothing is sampled.
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
# Options of lm-eval's `hf` that change how it computes or what it answers, and that are not followed here.
_REFUSED = ("think_end_token", "mixed_precision_dtype", "softmax_dtype", "truncation")


@register_model("wildcat")
class WildCatLM(HFLM):
    """A Transformers model whose cache is compressed.

    Args:
        pretrained: as for lm-eval's `hf`; the default model if left out.
        method: a name of `wildcat-kv methods`, or "exact" for nothing compressed.
        protocol: "context-only" compresses a document's context before the question is read, as published results
            do; "full-prompt" compresses after the whole prompt and takes every task.
        ratio: share of the tokens to keep.
        compression_ratio: share of the tokens to drop, instead of a ratio.
        max_tokens: most tokens to store, instead of a ratio.
        sink: see `WildCatConfig`.
        window: see `WildCatConfig`.
        bin_rank: see `WildCatConfig`.
        temperature: see `WildCatConfig`.
        weights: see `WildCatConfig`.
        seed: of the pivots.
        chunk: tokens that `loglikelihood_rolling` reads at once; what came before them is compressed.
        batch_size: prompts at once, a number; the choices of one prompt stand beside each other.
        **options: of lm-eval's `hf`.

    Raises:
        ValueError: an unknown method or protocol, no budget, or a combination that cannot be measured.

    Example:
        wildcat-kv lm-eval run --model wildcat --model_args pretrained=FOLDER,ratio=0.25 --tasks niah_single_1
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        method: str = "wildcat",
        protocol: Literal["context-only", "full-prompt"] = "context-only",
        ratio: float | None = None,
        compression_ratio: float | None = None,
        max_tokens: int | None = None,
        sink: int | None = None,
        window: int | None = None,
        bin_rank: int | None = None,
        temperature: str | None = None,
        weights: str | None = None,
        seed: int | None = None,
        chunk: int = 64,
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        fields = {
            "ratio": ratio,
            DROPPED: compression_ratio,
            "max_tokens": max_tokens,
            "sink": sink,
            "window": window,
            "bin_rank": bin_rank,
            "temperature": temperature,
            "weights": weights,
            "seed": seed,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        self._settings = _settings(method, given)
        self._method, self._protocol, self._chunk = method, protocol, chunk
        self._decodes = method == EXACT or next(known.decodes for known in available() if known.name == method)
        _check(method, protocol, chunk, batch_size, self._decodes, options)
        source = default_model_path().as_posix() if pretrained is None else pretrained
        super().__init__(source, batch_size=1 if batch_size is None else batch_size, **options)
        self._empty()  # refuses a model that cannot be compressed

    def get_model_info(self) -> dict[str, Any]:
        """For the record of results: the method, its settings and the protocol, too."""
        settings = {} if self._settings is None else self._settings.model_dump(exclude_none=True)
        return {**super().get_model_info(), "method": self._method, "protocol": self._protocol, "cache": settings}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A prompt of messages, also where the template takes them as lists of parts."""
        return super().apply_chat_template(messages_for(self.tokenizer, chat_history), add_generation_prompt)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, in the order of the requests."""
        prompts = [self._split(request.args[0], request) for request in requests]
        kinds = [json.dumps(request.args[1], sort_keys=True, default=str) for request in requests]
        answers: dict[int, str] = {}
        bar = self._bar(len(requests), "generate_until", disable_tqdm)
        for kind in dict.fromkeys(kinds):
            same = [index for index, other in enumerate(kinds) if other == kind]
            options, until, room = self._generation(requests[same[0]].args[1])
            for batch in self._batches(same, prompts):
                found = self._generate([self._cut(*prompts[i], requests[i], room) for i in batch], options, until, room)
                for index, answer in zip(batch, found, strict=True):
                    answers[index] = answer
                    self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                bar.update(len(batch))
        bar.close()
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation and whether greedy decoding writes it, in the order of the requests.

        A prompt with several continuations is read once.
        """
        together: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            together.setdefault(request.args[0], []).append(index)
        groups = list(together.values())
        pairs = [self._pair(request.args[0], request.args[1], request) for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        bar = self._bar(len(requests), "loglikelihood", disable_tqdm)
        for batch in self._batches(range(len(groups)), [pairs[group[0]][:2] for group in groups]):
            rows = [index for number in batch for index in groups[number]]
            # Where a prompt is too long, a longer continuation leaves it less room.
            same = all(len(pairs[i][0]) == len(pairs[groups[number][0]][0]) for number in batch for i in groups[number])
            for part in [rows] if same else [[index] for index in rows]:
                for index, likelihood in zip(part, self._likelihoods([pairs[i] for i in part]), strict=True):
                    found[index] = likelihood
                    self.cache_hook.add_partial("loglikelihood", requests[index].args, likelihood)
            bar.update(len(rows))
        bar.close()
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, read on over a cache that compresses what came before.

        Raises:
            ValueError: the method cannot compress while it reads on.
        """
        if not self._decodes:
            raise ValueError(f"method={self._method!r} reads a text twice: it has no likelihood of a text read once")
        totals = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm or self.rank != 0):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            total = 0.0
            for before, after in map(make_disjoint_window, windows):
                ids = torch.tensor([before + after], device=self.device)
                losses = token_losses(self.model, self._empty(), ids, chunk=self._chunk)
                total -= float(losses[-len(after) :].double().sum())
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # How a prompt is read

    def _split(self, text: str, request: Instance) -> tuple[Tensor, Tensor]:
        """Token ids of what is read before the compression and after it, int64 (n,) and (m,)."""
        if not text:
            return self._first(), self._ids("")
        if self._protocol == "full-prompt":
            return self._ids(text), self._ids("")
        return self._parts(*split_prompt(text, request.task_name or "", request.doc))

    def _pair(self, text: str, continuation: str, request: Instance) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the continuation, which takes the spaces before it."""
        bare = text.rstrip()
        continuation, text = text[len(bare) :] + continuation, bare
        if not text:
            first, answer = self._first(), self._ids(continuation, begins=False)
            return first, first[:0], answer[1:] if answer[0] == first[0] else answer  # which is not said twice
        if self._protocol == "full-prompt":
            context, whole = self._ids(text), self._ids(text + continuation)
            question, answer = context[:0], whole[len(context) :]
        else:
            before, after = split_prompt(text, request.task_name or "", request.doc)
            context, question = self._parts(before, after)
            answer = self._ids(after + continuation, begins=False)[len(self._ids(after, begins=False)) :]
        if not len(answer):
            raise ValueError(
                f"task={request.task_name!r}: the continuation {continuation!r} adds no token to its prompt"
            )
        # The model does not read the answer's last token.
        return *self._cut(context, question, request, len(answer) - 1), answer

    def _cut(self, context: Tensor, question: Tensor, request: Instance, room: int) -> tuple[Tensor, Tensor]:
        """What fits into the model: LongBench's prompts lose their middle, others their beginning, as with `hf`."""
        limit = self.max_length - room
        if limit <= len(question):
            raise ValueError(
                f"task={request.task_name!r}: the question has {len(question)} tokens, the answer {room}, and "
                f"max_length={self.max_length}; raise max_length or lower max_gen_toks"
            )
        if (request.task_name or "").startswith("longbench"):
            return cut_middle(context, question, limit), question
        return context[max(0, len(context) + len(question) - limit) :], question

    def _first(self) -> Tensor:
        """What an empty prompt is read as."""
        return torch.tensor([self.prefix_token_id], device=self.device)

    def _parts(self, before: str, after: str) -> tuple[Tensor, Tensor]:
        first, second = encode_parts(self._encode, before, after)
        return self._tensor(first), self._tensor(second)

    def _ids(self, text: str, *, begins: bool = True) -> Tensor:
        return self._tensor(self._encode(text, begins))

    def _encode(self, text: str, begins: bool) -> list[int]:
        return self.tok_encode(text, add_special_tokens=None if begins else False) if text else []

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    def _generation(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
        """Options of `generate()`, texts that end an answer, and its most tokens."""
        options = normalize_gen_kwargs(given, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = [stop for stop in handle_stop_sequences(options.pop("until", None), eos=eos) if stop and stop != eos]
        room = options.pop("max_gen_toks")
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in _OF_SAMPLING}
        more = {name: value for name, value in options.items() if value not in (None, False)}
        if more and not self._decodes:
            name, value = next(iter(more.items()))
            raise ValueError(f"{name}={value!r}: method={self._method!r} is measured by greedy decoding only")
        return options, until, room

    # What is asked of the cache

    def _empty(self) -> Cache:
        if self._settings is None:
            return DynamicCache(config=self.model.config)
        if not self._decodes:
            return CompressedCache(self.model.config, self._settings, compressor="uniform")  # checks the model alike
        return CompressedCache(self.model.config, self._settings, compressor=self._method)

    def _read(self, contexts: Sequence[Tensor]) -> tuple[Cache, Tensor, Tensor | None, Tensor]:
        """A cache that has read and compressed rows of contexts; their ids, mask, and the logits after them."""
        ids, mask = pad_left(contexts, self.tokenizer.pad_token_id)
        if self._decodes:
            cache = self._empty()
            return cache, ids, mask, read(self.model, cache, ids, mask)[:, -1]
        context = Context(self.model, ids, mask)
        cache = context.compress(self._settings, compressor=self._method, tokenizer=self.tokenizer)
        return cache, ids, mask, context.next_logits

    def _generate(
        self, prompts: list[tuple[Tensor, Tensor]], options: dict[str, Any], until: list[str], room: int
    ) -> list[str]:
        contexts, questions = zip(*prompts, strict=True)
        asked = bool(len(questions[0]))
        if self._decodes and not asked:
            cache, following = self._empty(), None  # `generate()` reads the prompt itself
            ids, mask = pad_left(contexts, self.tokenizer.pad_token_id)
        else:
            cache, ids, mask, following = self._read(contexts)
        if asked:
            ids, mask, following = *_beside(ids, mask, *pad_left(questions, self.tokenizer.pad_token_id)), None
        return generate(
            self.model,
            self.tokenizer,
            cache,
            ids,
            mask,
            max_new_tokens=room,
            until=until,
            next_logits=following,
            **options,
        )

    def _likelihoods(self, pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[float, bool]]:
        """Of several continuations; those of one prompt stand beside each other."""
        prompts: list[tuple[Tensor, Tensor]] = []
        rows = []
        for context, question, _ in pairs:
            if not prompts or not all(map(torch.equal, prompts[-1], (context, question))):
                prompts.append((context, question))
            rows.append(len(prompts) - 1)
        contexts, questions = zip(*prompts, strict=True)
        cache, ids, mask, following = self._read(contexts)
        asked = bool(len(questions[0]))
        if asked:
            ids, mask = _beside(ids, mask, *pad_left(questions, self.tokenizer.pad_token_id))
        index = torch.tensor(rows)  # on no device: the layers of a model may lie on several
        cache.batch_select_indices(index)
        mask = None if mask is None else mask[index]
        answers = [answer for _, _, answer in pairs]
        found = loglikelihood(self.model, cache, ids[index], mask, answers, None if asked else following[index])
        return [(likelihood.total, likelihood.greedy) for likelihood in found]

    def _batches(self, indices: Sequence[int], prompts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[int]]:
        """Prompts of like length together, the longest first; empty ones, which have no question, by themselves."""
        order = sorted(indices, key=lambda index: -sum(map(len, prompts[index])))
        size = int(self.batch_size)
        for asked in (True, False):
            alike = [index for index in order if bool(len(prompts[index][1])) == asked]
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    def _bar(self, total: int, name: str, disable: bool) -> Any:
        return tqdm(total=total, desc=f"{name} ({self._method}, {self._protocol})", disable=disable or self.rank != 0)


def _beside(ids: Tensor, mask: Tensor | None, more: Tensor, more_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return torch.cat((ids, more), dim=1), join(mask, more_mask, ids, more)


def _settings(method: str, given: dict[str, Any]) -> WildCatConfig | None:
    """None for the exact cache.

    Raises:
        ValueError: an unknown method, or a wrong field.
    """
    names = [known.name for known in available()]
    if method not in (EXACT, *names):
        raise ValueError(f"method={method!r}: there are {EXACT}, {', '.join(names)}")
    if method != EXACT:
        return WildCatConfig(**given)
    if given:
        raise ValueError(f"{next(iter(given))}={next(iter(given.values()))!r}: method='{EXACT}' compresses nothing")
    return None


def _check(
    method: str, protocol: str, chunk: int, batch_size: int | str | None, decodes: bool, options: dict[str, Any]
) -> None:
    if protocol not in ("context-only", "full-prompt"):
        raise ValueError(f"protocol={protocol!r} must be context-only or full-prompt")
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a number of tokens, at least 1")
    rows = str(1 if batch_size is None else batch_size)
    if not rows.isdigit() or not int(rows):
        raise ValueError(
            f"batch_size={batch_size!r} must be a number, at least 1; how much fits depends on what is compressed"
        )
    if not decodes and int(rows) > 1:
        raise ValueError(f"batch_size={batch_size}: method={method!r} repeats each text by itself; use batch_size=1")
    refused = next((name for name in _REFUSED if options.get(name) not in (None, False)), None)
    if refused:
        raise ValueError(f"{refused}={options[refused]!r} is an option of lm-eval's hf that is not followed here")
