"""Prompts as token ids: with the model's chat template where it has one, split before the question."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

# Characters for private use: in no text, and no space that a template might trim.
_CONTEXT, _QUESTION, _ANSWER, _NEXT = (f"\ue000{name}\ue001" for name in ("context", "question", "answer", "next"))


@dataclass(frozen=True)
class Frame:
    """What stands around a context, its questions and the answers.

    Attributes:
        head: before the context.
        gap: between the context and the first question, in the same message.
        tail: between a question and its answer.
        between: between an answer and the next question.
        special: whether the tokenizer is to add the tokens that begin a text; a chat template has them in `head`.
    """

    head: str
    gap: str
    tail: str
    between: str
    special: bool

    @staticmethod
    def of(tokenizer: Any) -> Frame:
        """The frame that a tokenizer's chat template gives, or a plain one where it has none.

        Raises:
            ValueError: the template cannot be rendered, or does not give the messages back as they are.
        """
        if not tokenizer.chat_template:
            return Frame(head="", gap="\n\n", tail="\n", between="\n\n", special=True)
        first = {"role": "user", "content": f"{_CONTEXT}\n\n{_QUESTION}"}
        answered = [first, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
        asked, again = _render(tokenizer, [first]), _render(tokenizer, answered)
        try:
            head, rest = asked.split(_CONTEXT)
            gap, tail = rest.split(_QUESTION)
            between, _ = again.split(_ANSWER)[1].split(_NEXT)
        except (ValueError, IndexError):
            raise _loses(tokenizer) from None
        return Frame(head, gap, tail, between, special=False)


def text_tokenizer(given: Any) -> Any:
    """Take the tokenizer out of a processor of images and text, with the processor's chat template.

    Args:
        given: a processor; anything else is returned as it is.
    """
    inner = getattr(given, "tokenizer", None) if isinstance(given, ProcessorMixin) else None
    if inner is None:
        return given
    template = getattr(given, "chat_template", None)
    if template is None or template == inner.chat_template:
        return inner
    inner = copy.copy(inner)  # the processor's own stays as it is
    inner.chat_template = template
    return inner


def messages_for(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give messages the form that a chat template takes: the text as it is, or as a list of parts.

    Templates of models for images and text go through the parts of a message. Of a string some make nothing.

    Args:
        tokenizer: whose template is tried with a short message.
        messages: role and content; content that is no string stays as it is.

    Raises:
        ValueError: the template leaves the text out in either form.
    """
    refused = []
    for form in (_as_text, _as_parts):
        try:
            probe = [{"role": "user", "content": form(_QUESTION)}]
            text = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
        except Exception:  # whatever a template raises
            refused.append(form)
            continue
        if text.count(_QUESTION) == 1:  # in a list that is written out, it is escaped
            return [
                {**message, "content": form(said) if isinstance(said := message["content"], str) else said}
                for message in messages
            ]
    if _as_text in refused:  # the messages themselves may be welcome, or what they raise is the reason
        return list(messages)
    raise _loses(tokenizer)


def encode_prompt(tokenizer: Any, text: str, *, chat: bool = True) -> Tensor:
    """Token ids int64 (1, n) of `text`, as one user message unless `chat` is off or there is no template."""
    if chat and tokenizer.chat_template:
        return _encode(tokenizer, _render(tokenizer, [{"role": "user", "content": text}]))
    return _encode(tokenizer, text, add_special_tokens=True)


def encode_context(tokenizer: Any, context: str) -> tuple[Tensor, Tensor]:
    """Token ids of what comes before a context, and of the context up to where a question follows.

    Args:
        tokenizer: of the model.
        context: what is read first.

    Returns:
        int64 (1, h) of the template's beginning, and int64 (1, n).
    """
    frame = Frame.of(tokenizer)
    text = f"{context}{frame.gap}"

    def encode(text: str, begins: bool) -> list[int]:
        return _encode(tokenizer, text, add_special_tokens=begins and frame.special)[0].tolist()

    if frame.special:  # tokens that begin a text; one that ends it is left out
        rest, whole = encode(text, False), encode(text, True)
        starts = (start for start in range(len(whole) - len(rest) + 1) if whole[start : start + len(rest)] == rest)
        start = next(starts, None)
        head, rest = ([], whole) if start is None else (whole[:start], rest)
    else:
        head, rest = encode_parts(encode, frame.head, text)
    return torch.tensor([head], dtype=torch.int64), torch.tensor([rest], dtype=torch.int64)


def encode_follow_up(tokenizer: Any, question: str, answer: str = "", *, first: bool = True) -> Tensor:
    """Token ids int64 (1, m) of a question after a context, up to where the answer begins.

    Where the edge of the context is an edge of tokens, encoded as it is within the whole prompt; elsewhere by itself.

    Args:
        tokenizer: of the model.
        question: what is asked.
        answer: the beginning of the model's answer, to be continued.
        first: whether it is asked right after the context; otherwise it comes after an answer, without the token that
            ended that.
    """
    frame = Frame.of(tokenizer)

    def encode(text: str, begins: bool) -> list[int]:
        return _encode(tokenizer, text)[0].tolist()

    text = f"{question}{frame.tail}{answer}"
    if first:
        return torch.tensor([encode_parts(encode, frame.gap, text)[1]], dtype=torch.int64)
    return _encode(tokenizer, frame.between + text)


def encode_question(tokenizer: Any, context: str, question: str, answer: str = "") -> tuple[Tensor, Tensor]:
    """Token ids of a context, and of the question after it, encoded apart so that the split is a token's edge.

    Args:
        tokenizer: of the model.
        context: what is read first.
        question: what is asked about it, in the same user message.
        answer: the beginning of the model's answer, to be continued.

    Returns:
        int64 (1, n) of everything up to the question, and int64 (1, m) of all that follows.
    """
    return torch.cat(encode_context(tokenizer, context), dim=1), encode_follow_up(tokenizer, question, answer)


def encode_parts(encode: Callable[[str, bool], list[int]], before: str, after: str) -> tuple[list[int], list[int]]:
    """Token ids of two parts of a prompt; the first ones are the same whatever comes after.

    Where the edge of the parts is an edge of tokens, the second part is encoded as it is in the whole prompt: some
    tokenizers begin every text with a token of its own. Elsewhere it is encoded by itself.

    Args:
        encode: gives the token ids of a text, and is told whether it begins the prompt.
        before: the first part.
        after: the second part.
    """
    first, whole = encode(before, True), encode(before + after, True)
    if whole[: len(first)] == first:
        return first, whole[len(first) :]
    return first, encode(after, False)


def repeat_request(tokenizer: Any, *, first: bool) -> tuple[Tensor, Tensor]:
    """Token ids that ask the model to repeat a part of the context before them, in the words of KVzip.

    Args:
        tokenizer: of the model.
        first: whether it is the first part; later ones are told by how they begin, which goes in between.

    Returns:
        int64 (1, n) of the request, and int64 (1, m) of what stands between it and the model's answer.

    Source: arXiv 2505.23416.
    """
    tokenizer, part = text_tokenizer(tokenizer), "" if first else "part of the "
    request = f"\n\nRepeat the {part}previous context exactly{'.' if first else ', starting with'}"
    return _encode(tokenizer, request), _encode(tokenizer, Frame.of(tokenizer).tail)


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    fitting = messages_for(tokenizer, messages)
    try:
        return tokenizer.apply_chat_template(fitting, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
        reason = " ".join(str(error).split())
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__}: its chat template takes no messages of user and assistant alone "
            f"({reason}); set tokenizer.chat_template to another one, or to None"
        ) from None


def _as_text(text: str) -> str:
    return text


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _loses(tokenizer: Any) -> ValueError:
    return ValueError(
        f"tokenizer={type(tokenizer).__name__}: its chat template changes or leaves out what messages say; set "
        "tokenizer.chat_template to another one, or to None"
    )


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> Tensor:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens).input_ids
    return ids.to(torch.int64)
