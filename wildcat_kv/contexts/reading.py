"""Reading and answering in rows, with any cache."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig, RepetitionPenaltyLogitsProcessor, StoppingCriteria

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.cache.positions import holds_positions
from wildcat_kv.cache.read_check import check_read, with_read_check
from wildcat_kv.contexts.answering import AnswerOptions
from wildcat_kv.hook.keyword import CACHE


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of an answer by a model.

    Attributes:
        total: log-likelihood of all its tokens, in nats.
        tokens: number of tokens.
        greedy: True if greedy decoding would have written it.
    """

    total: float
    tokens: int
    greedy: bool


def pad_left(rows: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor | None]:
    """Pad rows of token ids, int64 (n_i,) each, into one block.

    Returns:
        Token ids int64 (rows, n), and the attention mask int64 (rows, n), 0 for padding; None if nothing is padded.
    """
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad, padding_side="left")
    if all(row.shape[0] == ids.shape[1] for row in rows):
        return ids, None
    ones = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(ones, batch_first=True, padding_side="left")


def join(left: Tensor | None, right: Tensor | None, left_ids: Tensor, right_ids: Tensor) -> Tensor | None:
    """Join the masks of two blocks of ids; None means ones."""
    if left is None and right is None:
        return None
    masks = (left, left_ids), (right, right_ids)
    return torch.cat([torch.ones_like(ids) if mask is None else mask.to(ids) for mask, ids in masks], dim=1)


@torch.no_grad()
def read(model: Any, cache: Cache, ids: Tensor, mask: Tensor | None = None, *, last: int = 1) -> Tensor:
    """Let a model read on.

    Args:
        model: a Transformers decoder.
        cache: cache that holds the first tokens; it reads the rest.
        ids: tokens of the whole text, int64 (rows, n).
        mask: attention mask (rows, n), 0 for padding.
        last: number of last tokens to return logits of; no more than are read.

    Returns:
        Logits float32 (rows, last, vocabulary).

    Raises:
        RuntimeError: the model does not use the cache.
    """
    start = cache.get_seq_length()
    options: dict[str, Any] = {"logits_to_keep": min(last, ids.shape[1] - start)}
    if mask is not None:
        options["attention_mask"] = mask
    if "position_ids" in inspect.signature(model.forward).parameters:
        # As generate() counts them: left to itself, Bamba begins at 0 in each pass.
        counted = torch.ones_like(ids) if mask is None else mask.long()
        options["position_ids"] = (counted.cumsum(-1) - 1).clamp_min(0)[:, start:]
        if isinstance(cache, CompressedCache) and holds_positions(model):
            options["position_ids"] = options["position_ids"] + _offsets(model, cache, ids)
    logits = model(ids[:, start:], **{CACHE: cache}, **options).logits
    check_read(model, cache, ids.shape[1])
    return logits.float()


def _offsets(model: Any, cache: CompressedCache, ids: Tensor) -> Tensor:
    """Return the offsets of the next positions, int64 (rows, 1), and note them."""
    seen = cache.get_seq_length()
    deltas = cache.rope.after(seen, model) if seen else None
    if deltas is not None:
        return deltas.to(ids)
    cache.rope.note(seen, torch.zeros_like(ids[:, :1]))
    return torch.zeros_like(ids[:, :1])


def generate(
    model: Any,
    tokenizer: Any,
    cache: Cache,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    until: Sequence[str] = (),
    next_logits: Tensor | None = None,
    **options: Any,
) -> list[str]:
    """Answer rows of prompts, by greedy decoding unless the options say otherwise.

    Args:
        model: a Transformers decoder.
        tokenizer: tokenizer of the model.
        cache: cache that holds the beginning of the prompts; used up.
        ids: tokens of the prompts, int64 (rows, n).
        mask: attention mask (rows, n), 0 for padding.
        max_new_tokens: most tokens of an answer.
        until: texts that end an answer; they are cut off.
        next_logits: logits after the prompts, float (rows, vocabulary), where the cache holds all of them. The
            first token is then the likeliest one.
        **options: options of `generate()`.

    Returns:
        One answer a row, without special tokens.
    """
    if any(until):
        criteria = [*(options.get("stopping_criteria") or ()), _Until(tokenizer, until, ids.shape[1])]
        options = {**options, "stopping_criteria": criteria}
    answers = generate_tokens(
        model, tokenizer, cache, ids, mask, max_new_tokens=max_new_tokens, next_logits=next_logits, **options
    )
    return [text_of(tokenizer, tokens, until) for tokens in answers]


@torch.no_grad()
def generate_tokens(
    model: Any,
    tokenizer: Any,
    cache: Cache,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    next_logits: Tensor | None = None,
    **options: Any,
) -> list[list[int]]:
    """Generate the tokens of the answers, without end tokens; see `generate`."""
    plan, prompt = AnswerOptions.of(model, tokenizer, max(max_new_tokens, 1), **options), ids.shape[1]
    if next_logits is not None:
        first = _likeliest(ids, next_logits, plan.config)
        mask = join(mask, None, ids, first)
        ids, max_new_tokens = torch.cat((ids, first), dim=1), max_new_tokens - 1
        if all(token in plan.ends for token in first.flatten().tolist()):
            max_new_tokens = 0
    if max_new_tokens:
        plan.config.max_new_tokens = max_new_tokens
        _, others = with_read_check(model, cache, (), plan.others)
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            **{CACHE: cache},
            generation_config=plan.config,
            **others,
        )
    return [list(itertools.takewhile(lambda token: token not in plan.ends, row)) for row in ids[:, prompt:].tolist()]


def text_of(tokenizer: Any, tokens: Sequence[int], until: Sequence[str] = ()) -> str:
    """Decode an answer up to the first text that ends it."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text


@torch.no_grad()
def loglikelihood(
    model: Any,
    cache: Cache,
    ids: Tensor,
    mask: Tensor | None,
    answers: Sequence[Tensor],
    next_logits: Tensor | None = None,
) -> list[Likelihood]:
    """Measure how likely each row's answer is after its prompt.

    Args:
        model: a Transformers decoder.
        cache: cache that holds the beginning of the prompts; used up.
        ids: tokens of the prompts, int64 (rows, n).
        mask: attention mask (rows, n), 0 for padding.
        answers: tokens of each row's answer, int64 (m_i,), at least one.
        next_logits: logits after the prompts, float (rows, vocabulary), where the cache holds all of them.
    """
    left = ids.shape[1] - cache.get_seq_length()
    tails = pad_sequence(list(answers), batch_first=True).to(ids)  # nothing sees what comes after
    longest = tails.shape[1]
    text, shown = torch.cat((ids, tails), dim=1), join(mask, None, ids, tails)
    if left:
        logits = read(model, cache, text[:, :-1], None if shown is None else shown[:, :-1], last=longest)
    else:
        assert next_logits is not None, "the cache holds the prompts: what comes next is not known without logits"
        logits = next_logits[:, None].float()
        if longest > 1:
            rest = read(model, cache, text[:, :-1], None if shown is None else shown[:, :-1], last=longest - 1)
            logits = torch.cat((logits, rest), dim=1)
    scores = logits.log_softmax(-1)
    likelihoods = []
    for row, answer in enumerate(answers):
        own, expected = scores[row, : answer.shape[0]], answer.to(scores.device)
        total = own.gather(-1, expected[:, None]).double().sum()
        likelihoods.append(Likelihood(float(total), len(answer), bool((own.argmax(-1) == expected).all())))
    return likelihoods


@torch.no_grad()
def token_losses(model: Any, cache: Cache, ids: Tensor, *, chunk: int) -> Tensor:
    """Measure the loss of each token of a text.

    The text is read `chunk` tokens at a time, so that a cache that compresses has compressed all that comes before a
    chunk. With 1 it is read as text is generated.

    Args:
        model: a Transformers decoder.
        cache: an empty cache; used up.
        ids: tokens of the text, int64 (1, n).
        chunk: number of tokens to read at once.

    Returns:
        Negative log-likelihood of each token after those before it, in nats, float32 (n - 1,).
    """
    losses = []
    for start in range(0, ids.shape[1] - 1, chunk):
        stop = min(start + chunk, ids.shape[1] - 1)
        logits = read(model, cache, ids[:, :stop], last=stop - start)[0]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="none"))
    return torch.cat(losses)


class _Until(StoppingCriteria):
    """Stop where an answer holds one of some texts.

    Not `StopStringCriteria`: it looks at the prompt's end as well, and sorts the whole vocabulary for each batch.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._until, self._prompt = tokenizer, [stop for stop in until if stop], prompt
        self._tokens = 8 + max(len(stop.encode()) for stop in self._until)  # no token is less than a byte

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        start = max(self._prompt, input_ids.shape[1] - self._tokens)
        texts = self._tokenizer.batch_decode(input_ids[:, start:])
        ended = [any(stop in text for stop in self._until) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _likeliest(ids: Tensor, logits: Tensor, config: GenerationConfig) -> Tensor:
    """Return the greedy token after prompts, int64 (rows, 1), penalised as in `generate()`."""
    penalty = config.repetition_penalty
    if penalty and penalty != 1.0:
        logits = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    return logits.argmax(-1, keepdim=True).to(ids)
