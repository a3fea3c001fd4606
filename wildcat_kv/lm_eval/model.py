"""The model `wildcat` of lm-eval: any of its tasks, answered from a compressed cache.

Installed packages are found by lm-eval itself from its first release after 0.4.13 on; until then `wildcat-kv lm-eval`
is its command line with this model in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from wildcat_kv.compressors.registry import AUTO
from wildcat_kv.config import DROPPED
from wildcat_kv.contexts.prompts import messages_for
from wildcat_kv.lm_eval.options import check, check_rolling, reads_twice, settings_of
from wildcat_kv.lm_eval.prompts import PromptEncoder, Protocol, cut_middle, cut_start, loses_middle, move_spaces
from wildcat_kv.lm_eval.reader import Pair, Prompt, Reader
from wildcat_kv.models import default_model_path

# Options of `generate()` that say nothing where nothing is sampled.
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@register_model("wildcat")
class WildCatLM(HFLM):
    """A Transformers model whose cache is compressed.

    Args:
        pretrained: model, as lm-eval's `hf` takes it; the default model if left out.
        method: name of `wildcat-kv methods`, "auto" for the best one, or "exact" for nothing compressed.
        protocol: "context-only" compresses a document's context before the question is read, as published results
            do; "full-prompt" compresses after the whole prompt and takes every task.
        ratio: share of the tokens to keep.
        compression_ratio: share of the tokens to drop, instead of a ratio.
        max_tokens: most tokens to store, instead of a ratio.
        min_tokens: tokens that a ratio always keeps; shorter texts stay exact.
        max_bytes: most bytes of the whole cache, such as "2GiB", instead of a ratio.
        bits: bits of a stored number of a slot.
        group: field of `WildCatConfig`.
        sink: field of `WildCatConfig`.
        window: field of `WildCatConfig`.
        bin_rank: field of `WildCatConfig`.
        temperature: field of `WildCatConfig`.
        weights: field of `WildCatConfig`.
        seed: seed of the pivots.
        chunk: tokens that `loglikelihood_rolling` reads at once; earlier ones are compressed.
        batch_size: prompts at once, a number; the choices of one prompt stand beside each other.
        **options: options of lm-eval's `hf`.

    Raises:
        ValueError: an unknown method or protocol, no budget, or a combination that cannot be measured.

    Example:
        wildcat-kv lm-eval run --model wildcat --model_args pretrained=FOLDER,ratio=0.25 --tasks niah_single_1
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        method: str = AUTO,
        protocol: Protocol = "context-only",
        ratio: float | None = None,
        compression_ratio: float | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        max_bytes: int | str | None = None,
        bits: int | None = None,
        group: int | None = None,
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
            "min_tokens": min_tokens,
            "max_bytes": max_bytes,
            "bits": bits,
            "group": group,
            "sink": sink,
            "window": window,
            "bin_rank": bin_rank,
            "temperature": temperature,
            "weights": weights,
            "seed": seed,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        self._settings = settings_of(method, given)
        self._method, self._protocol, self._chunk = method, protocol, chunk
        check(method, protocol, chunk, batch_size, options)
        source = default_model_path().as_posix() if pretrained is None else pretrained
        super().__init__(source, batch_size=1 if batch_size is None else batch_size, **options)
        self._reader = Reader(self.model, self.tokenizer, method, self._settings)
        self._prompts = PromptEncoder(self._encode, protocol, self.device)

    @override
    def get_model_info(self) -> dict[str, Any]:
        """Tell the record of results the method, its settings and the protocol, too."""
        settings = {} if self._settings is None else self._settings.model_dump(exclude_none=True)
        return {
            **super().get_model_info(),
            "method": self._reader.method,
            "protocol": self._protocol,
            "cache": settings,
        }

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write messages as a prompt, also where the template takes lists of parts."""
        return super().apply_chat_template(messages_for(self.tokenizer, chat_history), add_generation_prompt)

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer requests, in their order."""
        prompts = [self._split(request.args[0], request) for request in requests]
        kinds = [json.dumps(request.args[1], sort_keys=True, default=str) for request in requests]
        answers: dict[int, str] = {}
        bar = self._bar(len(requests), "generate_until", disable_tqdm)
        for kind in dict.fromkeys(kinds):
            same = [index for index, other in enumerate(kinds) if other == kind]
            options, until, room = self._generation(requests[same[0]].args[1])
            for batch in self._batches(same, prompts):
                cut = [self._cut(*prompts[i], requests[i], room) for i in batch]
                found = self._reader.generate(cut, options, until, room)
                for index, answer in zip(batch, found, strict=True):
                    answers[index] = answer
                    self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                bar.update(len(batch))
        bar.close()
        return [answers[index] for index in range(len(requests))]

    @override
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations, in the order of the requests.

        A score is the log-likelihood, and True if greedy decoding writes the continuation.

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
                for index, likelihood in zip(part, self._reader.likelihoods([pairs[i] for i in part]), strict=True):
                    found[index] = likelihood
                    self.cache_hook.add_partial("loglikelihood", requests[index].args, likelihood)
            bar.update(len(rows))
        bar.close()
        return [found[index] for index in range(len(requests))]

    @override
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts: log-likelihoods over a cache that compresses earlier tokens while it reads.

        Raises:
            ValueError: the method cannot compress while it reads on.
        """
        check_rolling(self._method)
        totals = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm or self.rank != 0):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            total = 0.0
            for before, after in map(make_disjoint_window, windows):
                ids = torch.tensor([before + after], device=self.device)
                losses = self._reader.losses(ids, self._chunk)
                total -= float(losses[-len(after) :].double().sum())
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _split(self, text: str, request: Instance) -> Prompt:
        """Encode a prompt in its two parts.

        An empty prompt is read as the first token.
        """
        if not text:
            return self._first(), self._first()[:0]
        return self._prompts.ids(self._prompts.split(text, request.task_name or "", request.doc))

    def _pair(self, text: str, continuation: str, request: Instance) -> Pair:
        """Encode a prompt and its continuation."""
        text, continuation = move_spaces(text, continuation)
        if not text:
            first, answer = self._first(), self._prompts.answer(("", ""), continuation)
            return first, first[:0], answer[1:] if answer[0] == first[0] else answer  # which is not said twice
        parts = self._prompts.split(text, request.task_name or "", request.doc)
        answer = self._prompts.answer(parts, continuation)
        if not len(answer):
            raise ValueError(
                f"task={request.task_name!r}: the continuation {continuation!r} adds no token to its prompt"
            )
        # The model does not read the answer's last token.
        return *self._cut(*self._prompts.ids(parts), request, len(answer) - 1), answer

    def _cut(self, context: Tensor, question: Tensor, request: Instance, room: int) -> Prompt:
        """Cut a context so that prompt and answer fit into the model."""
        limit = self.max_length - room
        if limit <= len(question):
            raise ValueError(
                f"task={request.task_name!r}: the question has {len(question)} tokens, the answer {room}, and "
                f"max_length={self.max_length}; raise max_length or lower max_gen_toks"
            )
        cut = cut_middle if loses_middle(request.task_name or "") else cut_start
        return cut(context, question, limit), question

    def _first(self) -> Tensor:
        return torch.tensor([self.prefix_token_id], device=self.device)

    def _encode(self, text: str, begins: bool) -> list[int]:
        return self.tok_encode(text, add_special_tokens=None if begins else False)

    def _generation(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
        """Read lm-eval's options of a generation.

        They are those of `generate()`, texts that end an answer, and its most tokens.
        """
        options = normalize_gen_kwargs(given, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = [stop for stop in handle_stop_sequences(options.pop("until", None), eos=eos) if stop and stop != eos]
        room = options.pop("max_gen_toks")
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in _OF_SAMPLING}
        more = {name: value for name, value in options.items() if value not in (None, False)}
        if more and reads_twice(self._method):
            name, value = next(iter(more.items()))
            raise ValueError(f"{name}={value!r}: method={self._method!r} is measured by greedy decoding only")
        return options, until, room

    def _batches(self, indices: Sequence[int], prompts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[int]]:
        """Group prompts of like length, the longest first; those without a question by themselves."""
        order = sorted(indices, key=lambda index: -sum(map(len, prompts[index])))
        size = int(self.batch_size)
        for asked in (True, False):
            alike = [index for index in order if bool(len(prompts[index][1])) == asked]
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    def _bar(self, total: int, name: str, disable: bool) -> Any:
        return tqdm(total=total, desc=f"{name} ({self._method}, {self._protocol})", disable=disable or self.rank != 0)
