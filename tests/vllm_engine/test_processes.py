"""An engine of several processes, each with its share of the heads."""

import os

import pytest

from tests.vllm_engine.conftest import QUESTIONS, start_engine
from tests.vllm_engine.test_offline import answers, check
from wildcat_kv.integrations.vllm.contexts import ContextFolder
from wildcat_kv.integrations.vllm.identity import ServedModel
from wildcat_kv.integrations.vllm.prompts import Turns, prompt_ids, question_ids


@pytest.mark.skipif("WILDCAT_KV_RANKS" not in os.environ, reason="takes minutes; WILDCAT_KV_RANKS=1 runs it")
def test_three_ranks_answer_as_one(exports):
    """The default model has three key heads."""
    engine = start_engine(exports, tensor_parallel_size=3)
    folder = ContextFolder(exports.root, ServedModel.of(exports.model))
    asked = [question_ids(exports.tokenizer, Turns([question], [])) for question in QUESTIONS]
    for name in ("wildcat", "query_wildcat", "keydiff"):
        found = answers(engine, [prompt_ids(folder.get(name), ids) for ids in asked])
        for one, expected in zip(found, exports.references[name], strict=True):
            check(one, expected)
    engine.llm_engine.engine_core.shutdown()
