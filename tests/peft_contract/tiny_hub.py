"""Random models in place of the tiny Hub models that PEFT's tests load: the same architectures, without a network."""

from pathlib import Path

import torch
import transformers

VOCABULARY = {"vocab_size": 128}
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
GPT = VOCABULARY | SPECIAL_TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WIDTHS = VOCABULARY | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = WIDTHS | SPECIAL_TOKENS | {"pad_token_id": 2, "num_key_value_heads": 2}
# No dropout: many tests compare two passes.
BERT = WIDTHS | {
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
ROBERTA = BERT | {"pad_token_id": 1}
DEBERTA = BERT | {"pos_att_type": ["p2c", "c2p"], "relative_attention": True}
OPT = (
    VOCABULARY
    | SPECIAL_TOKENS
    | {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 4,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 2,
    }
)
T5 = VOCABULARY | {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = VOCABULARY | {
    "d_model": 16,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}

# Hub id -> (model class, config class, config options)
MODELS = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        LLAMA | {"head_dim": 8, "sliding_window": 16},
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        "DebertaV2Config",
        DEBERTA,
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "GPTJConfig",
        GPT | {"rotary_dim": 4},
    ),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        ROBERTA,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", ROBERTA),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        LLAMA | {"num_labels": 1},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
}


def build(directory: Path) -> None:
    """Save each model under its Hub id: relative to `directory`, the id is the path of a local model."""
    for model_id, (model_class, config_class, options) in MODELS.items():
        config = getattr(transformers, config_class)(**options)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, model_class)(config)
        model.save_pretrained(directory / model_id)
