"""One text, many questions: read and compressed once, asked often, saved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from wildcat_kv.cache.blueprint import Blueprint
from wildcat_kv.cache.caches import CompressedCache, WildCatCache
from wildcat_kv.cache.disk.read import read
from wildcat_kv.cache.disk.saved import SavedText
from wildcat_kv.cache.disk.write import write
from wildcat_kv.cache.joining import join_caches, unjoinable
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.compressors import Compressor
from wildcat_kv.compressors.registry import AUTO, reads_twice
from wildcat_kv.config import WildCatConfig
from wildcat_kv.contexts.answering import AnswerOptions, pad_id
from wildcat_kv.contexts.context import Context
from wildcat_kv.contexts.conversation import Conversation
from wildcat_kv.contexts.held_text import HeldText, checked
from wildcat_kv.contexts.prompts import encode_context, encode_follow_up, text_tokenizer
from wildcat_kv.contexts.reading import generate, join, pad_left
from wildcat_kv.contexts.texts import parts_of, read_part, room_for, share_of, text_from, warn_of_parts, without_floor
from wildcat_kv.models.identity import differing_weight
from wildcat_kv.models.support import check_prompt
from wildcat_kv.recipes.presets import Preset
from wildcat_kv.recipes.recipe import Recipe


class CompressedContext(HeldText):
    """A compressed text to ask about, made by `compress_context` or `load`.

    Attributes:
        model: model that has read it.
        tokenizer: tokenizer of the model.
        cache: cache that holds the text. It stays as it is: every question is asked of a copy.
        tokens: number of tokens of the text, template included.

    Example:
        context = wildcat_kv.compress_context(model, tokenizer, Path("report.txt"), ratio=0.25)
        print(context.ask("Who wrote it?"))
        context.save("report.safetensors")
    """

    def ask(self, question: str, *, max_new_tokens: int | None = None, **options: Any) -> str:
        """Answer a question about the text.

        Args:
            question: text that is not empty.
            max_new_tokens: most tokens of the answer; by default those of a given `generation_config`, or 256.
            **options: options of `generate()`, such as a `streamer`; greedy decoding by default.

        Raises:
            ValueError: an empty question, a model with other weights than when it read the text (another adapter), or
                an option that cannot be followed: one that would read the text again (prompt lookup, an assistant,
                use_cache=False) or write several answers.
        """
        return self.ask_many([question], max_new_tokens=max_new_tokens, **options)[0]

    def ask_many(
        self, questions: Sequence[str], *, max_new_tokens: int | None = None, batch_size: int = 8, **options: Any
    ) -> list[str]:
        """Answer several questions, each as if it were the only one.

        Args:
            questions: texts, none of them empty.
            max_new_tokens: most tokens of an answer; by default those of a given `generation_config`, or 256.
            batch_size: questions at once, each with a copy of the compressed context; models with linear
                attention are asked one question after the other.
            **options: options of `generate()`; greedy decoding by default.

        Returns:
            The answers, in the order of the questions.

        Raises:
            ValueError: errors of `ask`, or a batch_size that is no positive integer.
        """
        if isinstance(questions, str):
            raise ValueError(f"questions={questions!r} is one text; give a list, or call ask()")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a positive integer, the questions at once")
        plan = self.answer_options(max_new_tokens, options)
        if unjoinable(self.cache):  # states that would read the padding of shorter questions
            batch_size = 1
        rows = [encode_follow_up(self.tokenizer, checked(question))[0] for question in questions]
        answers: list[str] = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            asked, mask = pad_left(batch, pad_id(self.tokenizer) or 0)
            asked = asked.to(self.ids)
            read_before = self.ids.expand(len(batch), -1)
            answers += generate(
                self.model,
                self.tokenizer,
                self._copies(len(batch) * plan.beams),
                torch.cat((read_before, asked), dim=1),
                join(None, mask, read_before, asked),
                max_new_tokens=plan.config.max_new_tokens,
                **options,
            )
        return answers

    def stream(self, question: str, *, max_new_tokens: int | None = None, **options: Any) -> Iterator[str]:
        """Answer a question piece by piece, as the words come.

        Args:
            question: text that is not empty.
            max_new_tokens: most tokens of the answer; by default those of a given `generation_config`, or 256.
            **options: options of `generate()`.

        Returns:
            Pieces of text. Closing the iterator ends the generation.

        Raises:
            ValueError: errors of `ask`, at once; those of the generation, when they come.
        """
        return self.pieces(self.ask, question, max_new_tokens, options)

    def conversation(self) -> Conversation:
        """Begin a conversation, in which earlier questions and answers are remembered."""
        return Conversation(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file, for `load`; see `CompressedCache.save`.

        Raises:
            ValueError: the model has other weights than when it read the text.
            OSError: the file cannot be written.
        """
        self.check_weights()
        text = SavedText(self.ids, self.tokens, self.weights.samples)
        write(path, self.cache.saved(text))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any, tokenizer: Any) -> Self:
        """Read what `save` wrote; its text is not read again.

        Args:
            path: path of the file.
            model: model that read the text. Its shape is compared, and samples of its weights.
            tokenizer: tokenizer of the model, or its processor of images and text.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no file of ours, a damaged one, one of another version or model, or one that a cache alone was
                saved to.
        """
        tokenizer = text_tokenizer(tokenizer)
        _check(model, tokenizer)
        saved = read(path, model.config, model.device)
        if saved.text is None:
            raise ValueError(
                f"path={str(path)!r} holds a cache without its text; load it with WildCatCache.load(path, "
                "model.config), or save a compressed context"
            )
        if (name := differing_weight(saved.text.weights, model)) is not None:
            raise ValueError(
                f"path={str(path)!r} is of a model with other weights, {name} differs; load it with the one that read "
                "the text"
            )
        if (dtype := saved.dtype) != model.dtype:
            raise ValueError(
                f"path={str(path)!r} holds keys in {dtype}, and the model works in {model.dtype}; load the model with "
                f"dtype={dtype}, or read the text again"
            )
        cache = CompressedCache.restored(saved, model.config)
        return cls(model, tokenizer, cache, saved.text.ids, saved.text.tokens)

    def __repr__(self) -> str:
        mebibytes = self.cache.memory_bytes() / 2**20
        return f"CompressedContext({self.tokens} tokens, {stored_tokens(self.cache):.0f} stored, {mebibytes:.1f} MiB)"

    def _copies(self, rows: int) -> CompressedCache:
        """Copy the cache into that many rows, to be used up."""
        cache = self.cache.clone()
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache


def compress_context(
    model: Any,
    tokenizer: Any,
    text_or_file: str | os.PathLike[str],
    settings: WildCatConfig | None = None,
    *,
    preset: str | Path | Preset | None = None,
    compressor: str | Compressor | None = None,
    reads: int = 1,
    chunk_tokens: int | None = None,
    reserve: int | None = None,
    **fields: Any,
) -> CompressedContext:
    """Read and compress a text once, to be asked often.

    With a chat template the text is the beginning of the first user message. A text that is longer than the model's
    positions is read in parts that do not see each other, with a warning; their caches are joined, see `join_caches`.

    Args:
        model: a Transformers decoder.
        tokenizer: tokenizer of the model, or its processor of images and text.
        text_or_file: the text; or the path of a UTF-8 file, as a `Path`.
        settings: settings of the cache; or:
        preset: a preset's name, file or object; by default the model's own section, or "default".
        compressor: the method, by name or as an object, instead of the preset's.
        reads: times that the model reads the text. With 2 it repeats the text to find out what it needs of it, by
            "rereading_wildcat" unless a method is named.
        chunk_tokens: tokens to read at once, each chunk with those before it compressed; by default all, and half as
            many where memory runs out, as often as needed.
        reserve: positions to keep free for questions and answers; by default 1,024, or a quarter if that is less.
        **fields: fields of `WildCatConfig`, such as ratio=0.25, instead of the preset's.

    Raises:
        ValueError: an empty text, a file that cannot be read, settings that do not fit, or a model that cannot be
            compressed or cannot read the text in parts. Nothing has been read then.

    Example:
        context = compress_context(model, tokenizer, Path("report.txt"), ratio=0.25)
        answers = context.ask_many(["Who wrote it?", "What is it about?"])
    """
    tokenizer = text_tokenizer(tokenizer)
    _check(model, tokenizer)
    compressor = _reading(reads, compressor)
    recipe = Recipe.choose(model.config, settings, preset=preset, compressor=compressor, **fields)
    return _compress(model, tokenizer, recipe, text_or_file, chunk_tokens, reserve)


def _compress(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    text_or_file: str | os.PathLike[str],
    chunk_tokens: int | None,
    reserve: int | None,
) -> CompressedContext:
    """Read a text by a chosen method; see `compress_context`."""
    twice = reads_twice(recipe.compressor)
    Blueprint.of(model.config, recipe.settings, twice or recipe.compressor)
    text = text_from(text_or_file)
    for name, value in (("chunk_tokens", chunk_tokens), ("reserve", reserve)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be a positive integer, in tokens")
    head, body = (ids.to(model.device) for ids in encode_context(tokenizer, text))
    room = room_for(model, head, reserve)
    parts = parts_of(head, body, room)
    tokens = sum(part.shape[1] for part in parts)
    if twice is not None:
        if len(parts) > 1 or chunk_tokens is not None:
            raise ValueError(
                f"compressor={recipe.compressor!r} reads a text twice and as a whole, and this one has "
                f"{body.shape[1]} tokens in {len(parts)} parts; shorten it, leave out chunk_tokens, or take another "
                "compressor"
            )
        cache = Context(model, parts[0]).compress(recipe.settings, compressor=twice, tokenizer=tokenizer)
        return CompressedContext(model, tokenizer, cache, parts[0], tokens)
    settings = recipe.settings if len(parts) == 1 else without_floor(recipe.settings, tokens)
    share = Recipe(share_of(settings, len(parts)), recipe.compressor)
    if len(parts) > 1:
        if fault := unjoinable(WildCatCache(model.config, share.settings, compressor=share.compressor)):
            raise ValueError(
                f"text_or_file has {body.shape[1]} tokens, more than the model has positions for, and its cache "
                f"{fault}; shorten the text"
            )
        warn_of_parts(body.shape[1], room, len(parts))
    caches = []
    for part in parts:
        caches.append(read_part(model, share, part, chunk_tokens))
    cache = join_caches(caches, settings) if len(parts) > 1 else caches[0]
    return CompressedContext(model, tokenizer, cache, parts[-1], tokens)


def _reading(reads: int, compressor: str | Compressor | None) -> str | Compressor | None:
    """Choose the method for a number of readings; refuse one that reads another number of times."""
    if isinstance(reads, bool) or reads not in (1, 2):
        raise ValueError(f"reads={reads!r} must be 1 or 2")
    if reads == 1:  # a method that reads twice says so by its name
        return compressor
    if compressor in (None, AUTO):
        return "rereading_wildcat"
    if reads_twice(compressor) is None:
        raise ValueError(f"reads=2 with compressor={compressor!r}, which reads a text once; leave one of them out")
    return compressor


def _check(model: Any, tokenizer: Any) -> None:
    """Refuse what is no model with its tokenizer."""
    if not hasattr(model, "config") or not hasattr(model, "generation_config"):
        raise TypeError(f"model={type(model).__name__} is no Transformers model; give the model, then its tokenizer")
    if not callable(tokenizer) or not hasattr(tokenizer, "chat_template"):
        raise TypeError(f"tokenizer={type(tokenizer).__name__} is no Transformers tokenizer; give the model's own")
    check_prompt(model)
    AnswerOptions.of(model, tokenizer)  # the model's own options are such as can be followed
