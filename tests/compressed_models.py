"""Random models of real architectures, small enough to compress in well under a second."""

import torch
import transformers
from peft import get_peft_model

from peft_jactus import JactusConfig, calibrate

VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tiny_bert(*, seed=0, dtype=torch.float32):
    config = transformers.BertConfig(
        **_SIZES,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _build(transformers.BertForSequenceClassification, config, seed, dtype)


def tiny_llama(*, seed=0, dtype=torch.float32):
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
    return _build(transformers.LlamaForCausalLM, config, seed, dtype)


def tiny_gpt2(*, seed=0, dtype=torch.float32):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return _build(transformers.GPT2LMHeadModel, config, seed, dtype)


def _build(cls, config, seed, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(config).to(dtype).eval()


def classification_batches(num_batches=4, batch_size=4, length=10, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        mask = torch.ones(batch_size, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        yield {
            "input_ids": torch.randint(2, VOCABULARY, (batch_size, length), generator=generator),
            "attention_mask": mask,
            "labels": torch.randint(0, 3, (batch_size,), generator=generator),
        }


def causal_batches(num_batches=4, batch_size=4, length=12, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        ids = torch.randint(2, VOCABULARY, (batch_size, length), generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def batches_for(model, **kwargs):
    classifies = isinstance(model, transformers.BertForSequenceClassification)
    return list((classification_batches if classifies else causal_batches)(**kwargs))


def jactus_config(model, **fields):
    task = "SEQ_CLS" if isinstance(model, transformers.BertForSequenceClassification) else "CAUSAL_LM"
    return JactusConfig(task_type=task, target_modules="all-linear", **{"retained_ratio": 0.6, **fields})


def compressed(model, **fields):
    """Calibrate and wrap ``model``; return the PeftModel in evaluation mode."""
    config = jactus_config(model, **fields)
    calibrate(model, config, batches_for(model), progress_bar=False)
    return get_peft_model(model, config).eval()


def perturb_cores_(model, *, seed=0, scale=0.05):
    """Stand in for training: move every core and the head."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter))


@torch.no_grad()
def logits_of(model, batch=None):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    batch = dict(batches_for(base)[0] if batch is None else batch)
    batch.pop("labels")
    return model(**batch).logits
