"""Tiny random transformers in float64, with examples, padded batches, and their loss written out.

A task's `examples` are batches of one without padding; `collate` pads several into one batch, as a data collator does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB_SIZE = 24
IGNORED_LABEL = -100
# transformers computes the loss of causal language models in float32.
FLOAT32_LOSS = 1e-5
FLOAT64 = 1e-10

Batch = dict[str, Tensor]

# Larger initial weights than the default 0.02, so that attention is not uniform.
WIDTHS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.4,
}
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BERT = WIDTHS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def seeded(model_class: type, config: object) -> PreTrainedModel:
    """The same random model at each call, in float64 and evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).double().eval()


def tiny_bert(model_class: type = BertForSequenceClassification, **options) -> PreTrainedModel:
    return seeded(model_class, BertConfig(**BERT | {"num_labels": 3} | options))


def tiny_llama(**options) -> PreTrainedModel:
    return seeded(LlamaForCausalLM, LlamaConfig(**WIDTHS | SPECIAL_TOKENS | {"num_key_value_heads": 1} | options))


def tiny_gpt2() -> PreTrainedModel:
    return seeded(
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_embd=8,
            n_layer=2,
            n_head=2,
            n_positions=16,
            initializer_range=0.4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **SPECIAL_TOKENS,
        ),
    )


def tiny_t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return seeded(T5ForConditionalGeneration, config)


def tiny_llava() -> PreTrainedModel:
    options = {key: value for key, value in BERT.items() if key not in {"vocab_size", "max_position_embeddings"}}
    config = LlavaConfig(
        text_config=LlamaConfig(**WIDTHS | SPECIAL_TOKENS),
        vision_config=CLIPVisionConfig(**options, image_size=8, patch_size=4),
        image_token_index=0,
    )
    return seeded(LlavaForConditionalGeneration, config)


def tiny_bart() -> PreTrainedModel:
    """Classifies by what its decoder makes of the inputs' last end-of-sequence token."""
    config = BartConfig(
        vocab_size=VOCAB_SIZE,
        d_model=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=16,
        num_labels=3,
        dropout=0.0,
        init_std=0.4,
        decoder_start_token_id=1,
        **SPECIAL_TOKENS,
    )
    return seeded(BartForSequenceClassification, config)


def tiny_vit() -> PreTrainedModel:
    options = BERT | {"image_size": 8, "patch_size": 4, "num_labels": 3}
    del options["vocab_size"], options["max_position_embeddings"]
    return seeded(ViTForImageClassification, ViTConfig(**options))


def randint(seed: int, *shape: int, low: int = 3, high: int = VOCAB_SIZE) -> Tensor:
    """Random token ids; special tokens are below ``low``."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


# -- examples ---------------------------------------------------------------------------------------------


def classified_texts() -> list[Batch]:
    return [
        {
            "input_ids": randint(seed, 1, length),
            "attention_mask": torch.ones(1, length, dtype=torch.long),
            "labels": torch.tensor([seed % 3]),
        }
        for seed, length in enumerate([4, 2, 6, 3])
    ]


def ended_texts() -> list[Batch]:
    examples = classified_texts()
    for example in examples:
        example["input_ids"][:, -1] = SPECIAL_TOKENS["eos_token_id"]
    return examples


def continued_texts() -> list[Batch]:
    """Prompts of different lengths carry no label; the first text is all label."""
    examples = []
    for seed, (length, prompt) in enumerate([(4, 0), (3, 1), (7, 4), (5, 1)]):
        input_ids = randint(seed, 1, length)
        labels = input_ids.clone()
        labels[:, :prompt] = IGNORED_LABEL
        mask = torch.ones_like(input_ids)
        examples.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels})
    return examples


def translated_texts() -> list[Batch]:
    """Padded together, sources and targets have equal lengths, but not the same padding."""
    return [
        {
            "input_ids": randint(seed, 1, source),
            "attention_mask": torch.ones(1, source, dtype=torch.long),
            "labels": randint(seed + 10, 1, target),
        }
        for seed, (source, target) in enumerate([(5, 2), (3, 5), (4, 3)])
    ]


def classified_images() -> list[Batch]:
    pixels = torch.randn(4, 1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": torch.tensor([i % 3])} for i, image in enumerate(pixels)]


def collate(examples: Sequence[Mapping[str, Tensor]], *, length: int = 0, token: int = 2) -> Batch:
    """Pad on the right: ids with ``token``, masks with 0, sequences of labels with -100."""
    padding = {"labels": IGNORED_LABEL, "input_ids": token}
    batch = {}
    for key in examples[0]:
        rows = [example[key] for example in examples]
        if rows[0].dim() == 2:  # sequences
            longest = max(length, *(row.shape[1] for row in rows))
            rows = [pad(row, (0, longest - row.shape[1]), value=padding.get(key, 0)) for row in rows]
        batch[key] = torch.cat(rows)
    return batch


# -- losses, summed over what transformers takes the mean of ----------------------------------------------


def _logits_and_labels(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model(**batch).logits, batch["labels"]


def classification_loss(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits, labels = _logits_and_labels(model, batch)
    return cross_entropy(logits, labels, reduction="sum")


def next_token_loss(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits, labels = _logits_and_labels(model, batch)
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def target_token_loss(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits, labels = _logits_and_labels(model, batch)
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


# -- tasks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A model, its data, and how exactly its own loss agrees with `summed_loss`."""

    model: Callable[..., PreTrainedModel]
    examples: Callable[[], list[Batch]]
    summed_loss: Callable[[torch.nn.Module, Mapping[str, Tensor]], Tensor]
    head: str
    rtol: float = FLOAT64


TASKS = {
    "bert": Task(tiny_bert, classified_texts, classification_loss, "classifier"),
    "vit": Task(tiny_vit, classified_images, classification_loss, "classifier"),
    "llama": Task(tiny_llama, continued_texts, next_token_loss, "lm_head", FLOAT32_LOSS),
    "gpt2": Task(tiny_gpt2, continued_texts, next_token_loss, "lm_head", FLOAT32_LOSS),
    "bart": Task(tiny_bart, ended_texts, classification_loss, "classification_head.out_proj"),
    "t5": Task(tiny_t5, translated_texts, target_token_loss, "lm_head"),
}
