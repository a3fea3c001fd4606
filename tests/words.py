"""A tokenizer of a hundred-odd words, w1 to w119, for tiny models; with and without chat templates."""

from typing import ClassVar

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

CHAT = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
# As models for images and text have it: of a string it makes nothing.
PARTS = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
_SPECIAL = {"<user>": 1, "<assistant>": 2, "<end>": 3}


def words(count, seed=0):
    """A text of `count` words."""
    return " ".join(f"w{4 + (seed * 37 + index * index * 7 + index) % 115}" for index in range(count))


def tokenizer(template=CHAT, word="w{}".format):
    vocabulary = {"<pad>": 0, **_SPECIAL, **{word(number): number for number in range(4, 120)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    made.chat_template = template
    return made


class Processor(ProcessorMixin):
    """A tokenizer and a chat template of its own, without an image processor."""

    attributes: ClassVar = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)
