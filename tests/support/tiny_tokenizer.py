"""A tokenizer whose words are w2 to w95: what the tiny models know."""

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.compressed_models import VOCABULARY


def tiny_tokenizer(**special_tokens):
    words = {"[PAD]": 0, "[END]": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[END]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "[PAD]", "eos_token": "[END]", "unk_token": "[END]"} | special_tokens
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
