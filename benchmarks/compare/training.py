"""One training run of the comparison: the same steps, batches, head and schedule for every method."""

import copy
import functools
import tempfile
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from benchmarks.compare.adapting import adapt, full_size
from benchmarks.compare.cases import first_stage

# The same for every method: a fresh head needs larger steps than a pretrained body, embeddings smaller ones than an
# adapter.
HEAD_LEARNING_RATE = 2e-3
# Added to the seed, so that a second stage sees the rows in another order than the first.
LAST_STAGE_SEED = 1000
METRICS = ("accuracy", "matthews_correlation")
# A run has learned nothing if at its end the loss (of the last tenth of the steps that was logged in full) is above
# this share of that of a constant prediction.
LEARNED_NOTHING = 0.97


def training_arguments(folder, *, epochs, seed, batch_size, eval_batch_size=128, save_strategy="no", **further):
    """Return what every method trains with: a linear schedule with warm-up, no weight decay, no checkpoints."""
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=eval_batch_size,
        warmup_steps=0.06,
        weight_decay=0.0,
        save_strategy=save_strategy,
        logging_steps=0.1,
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **further,
    )


def make_trainer(model, workload, folder, *, learning_rate, epochs, seed, start_share=1.0, end_share=0.0):
    """Return a Trainer with AdamW; the learning rates fall from one share of their peaks to another in a line."""
    trainer = Trainer(
        model=model,
        args=training_arguments(
            folder,
            epochs=epochs,
            seed=seed,
            batch_size=workload.batch_size,
            eval_batch_size=workload.eval_batch_size,
            lr_scheduler_type="polynomial",
            lr_scheduler_kwargs={"power": 1.0, "lr_end": learning_rate * end_share},
            **workload.training_arguments,
        ),
        train_dataset=workload.train,
        eval_dataset=workload.test,
        data_collator=workload.collator,
        compute_metrics=workload.score,
        optimizers=(make_optimizer(model, workload.head, learning_rate, start_share), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_optimizer(model, head, learning_rate, share):
    """Return AdamW at a share of two peak learning rates: the head's, and that of all else that trains.

    What trains whole beside an adapter has the head's, too.
    """
    adapter = model.base_model.prefix if isinstance(model, PeftModel) else ""  # which is in every name
    heads, body = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (heads if head in name.split(".") or adapter not in name else body).append(parameter)
    groups = [{"params": heads, "lr": HEAD_LEARNING_RATE * share}, {"params": body, "lr": learning_rate * share}]
    # The schedule multiplies all rates by its own one over the default one.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate * share, weight_decay=0.0
    )


def run(case, workload, folder):
    """Train and score one case; return its figures."""
    return trained(case, workload, folder)[1]


def trained(case, workload, folder):
    """Train and score one case; return the model and its figures."""
    stages = []
    remaining = 1 - case.first_epochs / case.epochs
    if case.first_epochs:
        first = after_first_stage(
            workload,
            method=first_stage(case.method),
            learning_rate=case.first_learning_rate,
            first_epochs=case.first_epochs,
            remaining=remaining,
            seed=case.seed,
        )
        stages.append(first)

    def prepare():
        set_seed(case.seed)
        return adapt(copy.deepcopy(first.model) if stages else workload.make_model(), case, workload)

    last = train_stage(
        prepare,
        workload,
        folder,
        learning_rate=case.learning_rate,
        epochs=case.epochs - case.first_epochs,
        seed=case.seed + (LAST_STAGE_SEED if case.first_epochs else 0),
        start_share=remaining,
    )
    stages.append(last)
    scores = last.trainer.evaluate()
    further = workload.score_model(last.model) if workload.score_model is not None else {}
    return last.model, last.figures | {
        "num_train_rows": len(workload.train),
        "num_test_rows": len(workload.test),
        "trainable_parameters": sum(p.numel() for p in last.model.parameters() if p.requires_grad),
        "train_steps": sum(stage.steps for stage in stages),
        "train_seconds": sum(stage.seconds for stage in stages),
        "learning_rate_halvings": sum(stage.halvings for stage in stages),
        "retries": sum(stage.retries for stage in stages),
        "final_training_loss": last.final_loss,
        **{name: scores[f"eval_{name}"] for name in ("loss", *METRICS) if f"eval_{name}" in scores},
        **further,
    }


@functools.lru_cache(maxsize=2)
def after_first_stage(workload, *, method, learning_rate, first_epochs, remaining, seed):
    """Train the full-size stage; return it with the plain model that has all that it learned.

    Its schedule is that of the other methods, cut off where that share of the epochs is ``remaining``. Several
    compressions of one task and seed start with it, so that the last ones are kept; change only a copy of them.
    """

    def prepare():
        set_seed(seed)
        return full_size(workload.make_model(), method, workload), {}

    with tempfile.TemporaryDirectory() as folder:
        stage = train_stage(
            prepare,
            workload,
            folder,
            learning_rate=learning_rate,
            epochs=first_epochs,
            seed=seed,
            end_share=remaining,
        )
    model = stage.model.merge_and_unload() if isinstance(stage.model, PeftModel) else stage.model
    return replace(stage, model=model, trainer=None)


@dataclass(frozen=True)
class Stage:
    """A trained model, its trainer if it is to be kept, figures about it, the training loss at the end, what it took.

    Of several tries it is the one that was kept; ``retries`` counts the others.
    """

    model: nn.Module
    trainer: Trainer | None
    figures: dict
    final_loss: float
    steps: int
    seconds: float
    halvings: int
    retries: int = 0


def train_stage(prepare, workload, folder, *, learning_rate, epochs, seed, start_share=1.0, end_share=0.0):
    """Train what ``prepare`` returns; if it learns nothing, once more at half the rate, and keep the better one.

    The rates, that of the head, too, fall from ``start_share`` to ``end_share`` of their peaks.

    Now and then an adapter is lost at its best rate: it predicts one class whatever comes. A user would see that
    in the training loss, which alone decides here, and start again.
    """
    stages = []
    for halvings in range(2):
        model, figures = prepare()
        rate = learning_rate / 2**halvings
        trainer = make_trainer(
            model,
            workload,
            folder,
            learning_rate=rate,
            epochs=epochs,
            seed=seed,
            start_share=start_share,
            end_share=end_share,
        )
        seconds = trainer.train().metrics["train_runtime"]
        final_loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
        stages.append(Stage(model, trainer, figures, final_loss, trainer.state.global_step, seconds, halvings))
        if workload.constant_loss is None or final_loss < LEARNED_NOTHING * workload.constant_loss:
            break
    return replace(min(stages, key=lambda stage: stage.final_loss), retries=len(stages) - 1)
