"""Questions about a context as token ids: placeholders, then the question in the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wildcat_kv.contexts.prompts import encode_follow_up
from wildcat_kv.integrations.vllm.folder import StoredContext
from wildcat_kv.integrations.vllm.placeholders import placeholder_ids

# A system message of this form names a context.
MARKER = "wildcat_kv context:"


@dataclass(frozen=True)
class Turns:
    """A conversation about a context.

    Attributes:
        questions: what the user said, in order; one more than the answers.
        answers: what the assistant said.
        named: context that a system message names; None without one.
        others: True if there is another system message.
    """

    questions: list[str]
    answers: list[str]
    named: str | None = None
    others: bool = False

    @staticmethod
    def of(messages: Any) -> Turns:
        """Read messages in the form of OpenAI's chat completions.

        Raises:
            ValueError: messages of other roles or parts, or in an order that no template gives.
        """
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list with a question")
        said: list[tuple[str, str]] = []
        named, others = None, False
        for message in messages:
            role, text = _message(message)
            if role in ("system", "developer") and not said:
                marker = text.strip()
                if marker.startswith(MARKER) and named is None:
                    named = marker.removeprefix(MARKER).strip()
                else:
                    others = True
            else:
                said.append((role, text))
        for place, (role, text) in enumerate(said):
            expected = ("user", "assistant")[place % 2]
            if role != expected:
                raise ValueError(
                    f"messages[{place}] of the conversation is of role {role!r}, and {expected!r} comes there: a "
                    "conversation about a context is of user and assistant in turn"
                )
            if role == "user" and not text.strip():
                raise ValueError("a message of the user is empty; ask something")
        if len(said) % 2 == 0:
            raise ValueError("messages end without a question of the user; ask something")
        texts = [text for _, text in said]
        return Turns(texts[::2], texts[1::2], named, others)


def question_ids(tokenizer: Any, turns: Turns) -> list[int]:
    """Encode a conversation, from right after the context up to where the next answer begins.

    Args:
        tokenizer: tokenizer of the model.
        turns: questions and answers.
    """
    ids: list[int] = []
    for place, question in enumerate(turns.questions):
        answer = turns.answers[place] if place < len(turns.answers) else ""
        ids += encode_follow_up(tokenizer, question, answer, first=not place)[0].tolist()
    return ids


def prompt_ids(context: StoredContext, following: Sequence[int]) -> list[int]:
    """Put a context's placeholders before the ids that follow it.

    Args:
        context: exported context.
        following: ids of what is asked, at least one.

    Example:
        ids = prompt_ids(folder.get("report"), question_ids(tokenizer, Turns(["Who wrote it?"], [])))
    """
    header = context.header
    vocabulary = int(header.model.vocab_size)  # type: ignore[arg-type]  # a JsonValue
    return [*placeholder_ids(context.digest, header.slots, vocabulary), *following]


def _message(message: Any) -> tuple[str, str]:
    """Read role and text of one message."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError("each of the messages must have a role and content")
    if message.get("tool_calls"):
        raise ValueError("tool_calls cannot be told beside a context; leave them out")
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise ValueError("content of a message about a context must be text")
    return message["role"], content
