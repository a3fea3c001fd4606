"""What the tests of the evaluation share: a tiny random model with the real tokenizer, in a folder and in memory."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eval.tasks.base import Setting
from wildcat_kv.models import default_model_path

EOS = 2


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(default_model_path())


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A folder as save_pretrained writes it, for `--model`."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def plain(tiny_folder):
    """The same model, which never meets a cache of ours: what is right."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager")


@pytest.fixture
def setting(tokenizer):
    """Makes a setting of a run; arguments win."""

    def make(**changes):
        given = {"tokenizer": tokenizer, "seed": 0, "protocol": "context-only", "positions": 4096}
        return Setting(**{**given, **changes})

    return make
