"""Prompts as token ids, in the chat template, split before the question."""

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
    """Texts around a context, its questions and the answers.

    Attributes:
        head: text before the context.
        gap: text between the context and the first question, in the same message.
        tail: text between a question and its answer.
        between: text between an answer and the next question.
        special: True if the tokenizer adds the tokens that begin a text; a chat template has them in `head`.
    """

    head: str
    gap: str
    tail: str
    between: str
    special: bool

    @staticmethod
    def of(tokenizer: Any) -> Frame:
        """Take the frame from a tokenizer's chat template; a plain one without.

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
    """Take the tokenizer out of a processor, with the processor's chat template.

    Args:
        given: processor of images and text; anything else is returned as it is.
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
    """Give messages the form that a chat template takes: text, or parts.

    Templates of models for images and text go through the parts of a message. Of a string some make nothing.

    Args:
        tokenizer: tokenizer whose template is tried with a short message.
        messages: mappings with role and content; content that is no string stays as it is.

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
    """Encode a text into token ids int64 (1, n).

    Args:
        tokenizer: tokenizer of the model.
        text: text of the prompt.
        chat: True to make it one user message, if there is a chat template.
    """
    if chat and tokenizer.chat_template:
        return _encode(tokenizer, _render(tokenizer, [{"role": "user", "content": text}]))
    return _encode(tokenizer, text, add_special_tokens=True)


def encode_context(tokenizer: Any, context: str) -> tuple[Tensor, Tensor]:
    """Encode a context up to where a question follows.

    Args:
        tokenizer: tokenizer of the model.
        context: text that is read first.

    Returns:
        Token ids of the template's beginning, int64 (1, h), and of the context, int64 (1, n).
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
    """Encode a question after a context, up to where the answer begins.

    It is encoded as within the whole prompt if the edge of the context is an edge of tokens; otherwise by itself.

    Args:
        tokenizer: tokenizer of the model.
        question: text of the question.
        answer: beginning of the model's answer, to be continued.
        first: True if it is asked right after the context; otherwise it follows an answer without its end token.

    Returns:
        Token ids int64 (1, m).
    """
    frame = Frame.of(tokenizer)

    def encode(text: str, begins: bool) -> list[int]:
        return _encode(tokenizer, text)[0].tolist()

    text = f"{question}{frame.tail}{answer}"
    if first:
        return torch.tensor([encode_parts(encode, frame.gap, text)[1]], dtype=torch.int64)
    return _encode(tokenizer, frame.between + text)


def encode_question(tokenizer: Any, context: str, question: str, answer: str = "") -> tuple[Tensor, Tensor]:
    """Encode a context and the question after it apart.

    Args:
        tokenizer: tokenizer of the model.
        context: text that is read first.
        question: question about it, in the same user message.
        answer: beginning of the model's answer, to be continued.

    Returns:
        Token ids of everything up to the question, int64 (1, n), and of all that follows, int64 (1, m).
    """
    return torch.cat(encode_context(tokenizer, context), dim=1), encode_follow_up(tokenizer, question, answer)


def encode_parts(encode: Callable[[str, bool], list[int]], before: str, after: str) -> tuple[list[int], list[int]]:
    """Encode two parts of a prompt, the first by itself.

    Where the edge of the parts is an edge of tokens, the second part is encoded as it is in the whole prompt: some
    tokenizers begin every text with a token of its own. Elsewhere it is encoded by itself.

    Args:
        encode: function of a text and of whether it begins the prompt; gives token ids.
        before: first part.
        after: second part.
    """
    first, whole = encode(before, True), encode(before + after, True)
    if whole[: len(first)] == first:
        return first, whole[len(first) :]
    return first, encode(after, False)


def repeat_request(tokenizer: Any, *, first: bool) -> tuple[Tensor, Tensor]:
    """Encode KVzip's request to repeat a part of the context.

    Args:
        tokenizer: tokenizer of the model.
        first: True for the first part; the beginning of a later one goes behind the request.

    Returns:
        Token ids of the request, int64 (1, n), and of the text between it and the answer, int64 (1, m).

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
