"""Contexts of the default model, exported, with the answers that they give through Transformers."""

import importlib.util
import os
from dataclasses import dataclass

import pytest
import torch

from wildcat_kv import CompressedContext, compress_context
from wildcat_kv.compressors import QueryWildCat
from wildcat_kv.contexts.prompts import encode_follow_up
from wildcat_kv.data import haystack
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.integrations.vllm.export import export_context
from wildcat_kv.models import default_model, default_model_path

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

TOKENS, ANSWER = 2000, 12
METHODS = {
    "wildcat": "wildcat",
    "query_wildcat": "query_wildcat",
    "query_wildcat-equal": QueryWildCat(share="equal"),
    "keydiff": "keydiff",
}
QUESTIONS = (
    "What is the author's main point?",
    "Who is mentioned in the text?",
    "Summarize the text in one sentence.",
    "What does the author say about startups?",
    "Is the author optimistic?",
    "What advice is given?",
    "Name one example from the text.",
    "Why does the author think so?",
    "What is the first topic?",
    "How does the text end?",
)
# Each contradicts the others.
FACTS = ("copper", "walnut", "silver", "velvet")


@dataclass(frozen=True)
class Reference:
    """An answer through Transformers.

    Attributes:
        text: text of the answer.
        tokens: tokens of the answer, its end among them.
        logprobs: log-probability of each token.
    """

    text: str
    tokens: list
    logprobs: list


@dataclass(frozen=True)
class Exports:
    """Exported contexts.

    Attributes:
        root: folder of the contexts.
        model: folder of the model.
        tokenizer: tokenizer of the model.
        references: answers to QUESTIONS by context.
        facts: answers to FACT_QUESTION by context.
    """

    root: object
    model: str
    tokenizer: object
    references: dict
    facts: dict


FACT_QUESTION = "What is the door of the harbour office made of? Answer in one word."


def reference(context: CompressedContext, question: str) -> Reference:
    """Ask a compressed context, greedily."""
    ids = torch.cat((context.ids, encode_follow_up(context.tokenizer, question)), dim=1)
    found = context.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: context.cache.clone()},
        do_sample=False,
        max_new_tokens=ANSWER,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = found.sequences[0, ids.shape[1] :].tolist()
    scores = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(found.logits, tokens, strict=True)]
    return Reference(context.tokenizer.decode(tokens, skip_special_tokens=True), tokens, scores)


def start_engine(exports, **options):
    """Start vLLM in this process, with the exported contexts."""
    from vllm import LLM

    return LLM(
        exports.model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        block_size=32,
        kv_transfer_config={
            "kv_connector": "WildCatConnector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {"contexts": str(exports.root)},
        },
        **options,
    )


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    with torch.no_grad():
        model, tokenizer = default_model()
        root = tmp_path_factory.mktemp("contexts")
        text = tokenizer.decode(tokenizer(haystack.essays()[: TOKENS * 8]).input_ids[:TOKENS])
        references = {}
        for name, method in METHODS.items():
            context = compress_context(model, tokenizer, text, compressor=method, ratio=0.25)
            export_context(context, root / name)
            references[name] = [reference(context, question) for question in QUESTIONS]
            if name == "keydiff":
                export_context(context, root / f"{name}-stock", stock=True)
                references[f"{name}-stock"] = references[name]
        facts = {}
        for material in FACTS:
            said = f"The harbour office has one door. The door of the harbour office is made of {material}. " * 4
            context = compress_context(model, tokenizer, said, compressor="wildcat", ratio=0.8)
            export_context(context, root / f"fact-{material}")
            facts[f"fact-{material}"] = reference(context, FACT_QUESTION).text
        return Exports(root, str(default_model_path()), tokenizer, references, facts)
