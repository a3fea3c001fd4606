"""The border between the context of a benchmark's prompt and its question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields of a document that may hold its context, by how the task's name in lm-eval begins.
_FIELDS = {
    "babilong": ("input",),
    "scrolls": ("text", "input"),
}
# RULER's documents hold one text, whose last paragraph asks.
_RULER = ("niah_", "ruler_")
_ASKS = ("\nQuestion:", "\nWhat ", "\n\nAnswer the question")


def split_prompt(prompt: str, task: str, document: Mapping[str, Any]) -> tuple[str, str]:
    """Split a prompt into a context and a question.

    The context is compressed, and the question is asked afterwards.

    Args:
        prompt: all that the model reads, with examples and chat template.
        task: its name in lm-eval.
        document: the sample as the task has it. Tasks that are not known here need a field "context".

    Returns:
        All up to the end of the context, and all after it: together the prompt.

    Raises:
        ValueError: the prompt has no context, or nothing comes after it.

    Example:
        >>> split_prompt("Read: a long story. Who did it?", "mystery", {"context": "a long story."})
        ('Read: a long story.', ' Who did it?')
    """
    text = _context(task, document)
    start = prompt.rfind(text) if text else -1
    if start < 0:
        raise ValueError(
            f"task={task!r}: its documents have no context apart from the question, so nothing can be compressed "
            "before the question is seen; use protocol='full-prompt'"
        )
    end = start + len(text)
    if not prompt[end:].strip():
        raise ValueError(f"task={task!r}: nothing comes after the context; use protocol='full-prompt'")
    return prompt[:end], prompt[end:]


def _context(task: str, document: Mapping[str, Any]) -> str:
    if task.startswith(_RULER) and "input" in document:
        text = str(document["input"]).rstrip()
        return text[: max(0, *(text.rfind(asks) for asks in _ASKS))]
    fields = next((fields for prefix, fields in _FIELDS.items() if task.startswith(prefix)), ("context",))
    return str(next((document[field] for field in fields if document.get(field)), "")).strip()
