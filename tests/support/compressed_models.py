"""Random models of real architectures, small enough to compress in well under a second."""

import torch
import transformers
from peft import PeftModel, get_peft_model

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


def tiny_vit(*, seed=0, dtype=torch.float32):
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _build(transformers.ViTForImageClassification, config, seed, dtype)


def tiny_t5(*, seed=0, dtype=torch.float32):
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return _build(transformers.T5ForConditionalGeneration, config, seed, dtype)


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


def image_batches(num_batches=4, batch_size=4, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        yield {
            "pixel_values": torch.randn(batch_size, 3, 8, 8, generator=generator),
            "labels": torch.randint(0, 3, (batch_size,), generator=generator),
        }


def translation_batches(num_batches=4, batch_size=4, length=8, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        ids, labels = torch.randint(2, VOCABULARY, (2, batch_size, length), generator=generator)
        decoder_ids = torch.cat([torch.zeros(batch_size, 1, dtype=torch.long), labels[:, :-1]], dim=1)
        mask = torch.ones_like(ids)
        yield {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids, "labels": labels}


def batches_for(model, **kwargs):
    make = {
        transformers.BertForSequenceClassification: classification_batches,
        transformers.ViTForImageClassification: image_batches,
        transformers.T5ForConditionalGeneration: translation_batches,
    }
    return list(make.get(type(model), causal_batches)(**kwargs))


def jactus_config(model, **fields):
    tasks = {
        transformers.BertForSequenceClassification: {"task_type": "SEQ_CLS"},
        # PEFT has no task type for images: the head is named.
        transformers.ViTForImageClassification: {"exclude_modules": ["classifier"], "modules_to_save": ["classifier"]},
        transformers.T5ForConditionalGeneration: {"task_type": "SEQ_2_SEQ_LM"},
    }
    task = tasks.get(type(model), {"task_type": "CAUSAL_LM"})
    return JactusConfig(**{"target_modules": "all-linear", "retained_ratio": 0.6, **task, **fields})


def calibrated(model, **fields):
    """Return a config with the statistics of ``model``, which may have adapters."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = jactus_config(base, **fields)
    calibrate(model, config, batches_for(base), progress_bar=False)
    return config


def compressed(model, *, adapter_name="default", **fields):
    """Calibrate and wrap ``model``; return the PeftModel in evaluation mode."""
    config = calibrated(model, **fields)
    return get_peft_model(model, config, adapter_name=adapter_name).eval()


def trained(model, **fields):
    """Return what `compressed` does, as if trained."""
    model = compressed(model, **fields)
    perturb_cores_(model)
    return model


def perturb_cores_(model, *, seed=0, scale=0.05):
    """Stand in for training: move all that trains."""
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
