"""
Compress and train an image classifier
======================================

A small vision transformer, pretrained on CIFAR-10, learns to read handwritten digits. In the same pass its linear
layers shrink to 60 % of their parameters. This takes half a minute on one CPU core.
"""

import tempfile

import torch
from matplotlib.figure import Figure
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, default_data_collator, set_seed

from benchmarks.tasks.vision import VIT
from peft_jactus import JactusConfig, calibrate, export_compressed, rank_summary

# %%
# The data
# --------
#
# scikit-learn comes with 1,797 digits of 8 x 8 pixels. The model takes 32 x 32 pixels in three colours, from -1 to 1.

digits = load_digits()
small = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
pixels = interpolate(small, size=32, mode="bicubic").expand(-1, 3, -1, -1)
rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, digits.target, strict=True)]
train, test = rows[:1200], rows[1200:]

# %%
# The model
# ---------
#
# ``VIT`` is a folder of this repository. The head told ten kinds of objects apart so far.

set_seed(0)
model = AutoModelForImageClassification.from_pretrained(VIT, num_labels=10)

# %%
# Configure, calibrate, compress
# ------------------------------
#
# PEFT has no task type for images, so the head is named: it is trained whole (``modules_to_save``) and not compressed
# (``exclude_modules``). It trains alone for 50 steps before the calibration.

config = JactusConfig(
    target_modules="all-linear",
    exclude_modules=["classifier"],
    modules_to_save=["classifier"],
    retained_ratio=0.6,
)
loader = DataLoader(train, batch_size=32, collate_fn=default_data_collator)
calibrate(model, config, loader, max_batches=16, head_warmup_steps=50)
model = get_peft_model(model, config)
print(rank_summary(model))

# %%
# Train
# -----

folder = tempfile.TemporaryDirectory()
args = TrainingArguments(
    output_dir=folder.name,
    num_train_epochs=3,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    warmup_steps=0.1,
    logging_strategy="epoch",
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    dataloader_pin_memory=False,
)
Trainer(model, args, train_dataset=train, data_collator=default_data_collator).train()

# %%
# Export, load, look
# ------------------

export_compressed(model, f"{folder.name}/compressed")
model = AutoModelForImageClassification.from_pretrained(f"{folder.name}/compressed").eval()
batch = default_data_collator(test)
with torch.no_grad():
    predicted = model(batch["pixel_values"]).logits.argmax(-1)
wrong = predicted != batch["labels"]
print(f"{len(test) - int(wrong.sum())} of {len(test)} test digits are right: {1 - wrong.float().mean():.1%}")

# %%
# The first test digits with what the model reads, then digits that it gets wrong.

figure = Figure(figsize=(8, 2.8), layout="constrained")
figure.suptitle("Digits and what the model reads, errors in red")
shown = [*range(10), *wrong.nonzero().flatten()[:10].tolist()]
for axes, index in zip(figure.subplots(2, 10).flat, shown, strict=False):
    axes.imshow(small[index + 1200, 0], cmap="gray_r")
    axes.set_title(int(predicted[index]), color="tab:red" if wrong[index] else "black")
    axes.axis("off")
figure
