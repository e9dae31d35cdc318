"""What the two scripts that pretrain a model share: settings, going on at a checkpoint, and what is written."""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.harness.arguments import add_data_dir
from benchmarks.harness.environment import environment
from benchmarks.harness.records import write_document

# Settings that say where things lie on one machine, and nothing about the model.
PLACES = ("data_dir", "out")


def pretraining_parser(doc, *, out, batch_size, learning_rate):
    """Return a parser with the arguments that both scripts have; its description is the first line of ``doc``."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_data_dir(parser)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def is_pretrained(folder):
    """Return whether a finished model lies in ``folder``, and say so if one does."""
    finished = (folder / "config.json").exists()
    if finished:
        print(f"{folder} holds a model already.")
    return finished


def training_arguments(args, **further):
    """Return the Trainer's settings: a cosine schedule with warm-up, and a checkpoint every 500 steps."""
    return TrainingArguments(
        output_dir=args.out / "trainer",
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=100,
        save_steps=500,
        save_total_limit=1,
        seed=args.seed,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        **further,
    )


def train_and_save(trainer, args, make_figures):
    """Train, from the last checkpoint if there is one; write the model, and ``pretraining.json`` beside it.

    Args:
        trainer: Its checkpoints are removed at the end.
        args: Settings of the script; they are written, too.
        make_figures: From the final evaluation's metrics to what is written of them.
    """
    checkpoints = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.exists() else None)
    figures = make_figures(trainer.evaluate())
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in PLACES
    }
    result = {
        "settings": settings,
        "num_parameters": trainer.model.num_parameters(),
        **figures,
        "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
    }
    write_document(args.out / "pretraining.json", result)
    trainer.model.save_pretrained(args.out)
    shutil.rmtree(checkpoints)
    print(f"{args.out}: {figures}")
