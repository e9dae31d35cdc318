"""JACTUS in several processes, on one machine or more: calibrate together, train sharded, go on after a crash.

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/distributed.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/distributed.py
    accelerate launch --config_file examples/accelerate/zero2.yaml examples/distributed.py

Options of `accelerate launch` say how many processes there are (`--num_processes 8`), and on which machines. The same
command once more goes on where the last run ended, in the calibration or after the last checkpoint of the training.
"""

import argparse
import gc
import importlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import is_deepspeed_available
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from peft_jactus import JactusConfig, calibrate, rank_summary

# -- settings -------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub name or directory")
parser.add_argument("--dataset", nargs="+", default=["Salesforce/wikitext", "wikitext-2-raw-v1"], help="Hub name")
parser.add_argument("--data-dir", help="directory of parquet files, instead of --dataset")
parser.add_argument("--column", default="text", help="of the rows, with the text")
parser.add_argument("--output-dir", type=Path, default=Path("outputs/distributed"))
parser.add_argument("--retained-ratio", type=float, default=0.8, help="kept share of the weights")
parser.add_argument("--calibration-batches", type=int, default=32, help="of all processes together")
parser.add_argument("--max-statistics-memory", help="of each process, for instance 8GiB; more passes if it is small")
parser.add_argument("--learning-rate", type=float, default=5e-4)
parser.add_argument("--batch-size", type=int, default=8, help="of each process")
parser.add_argument("--max-steps", type=int, default=500)
parser.add_argument("--save-steps", type=int, default=100)
parser.add_argument("--length", type=int, default=512, help="tokens")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

if is_deepspeed_available():
    importlib.import_module("deepspeed")  # later, it would hold on to the process group: see the end of this file
state = PartialState(cpu=not torch.cuda.is_available())  # joins the other processes
dtype = torch.bfloat16 if state.device.type == "cuda" else torch.float32

# -- data: blocks of tokens -----------------------------------------------------------------------

tokenizer = AutoTokenizer.from_pretrained(args.model)
with state.main_process_first():  # the others find it in the cache
    source = {"path": "parquet", "data_dir": args.data_dir} if args.data_dir else {"path": args.dataset[0]}
    rows = load_dataset(**source, name=None if args.data_dir else "".join(args.dataset[1:]), split="train")


def to_blocks(rows: dict) -> dict:
    """Join the texts, and cut them into blocks of one length."""
    tokens = [token for text in rows[args.column] for token in tokenizer(text)["input_ids"]]
    blocks = [tokens[start : start + args.length] for start in range(0, len(tokens) - args.length + 1, args.length)]
    return {"input_ids": blocks, "labels": blocks}


rows = rows.map(to_blocks, batched=True, remove_columns=rows.column_names).shuffle(seed=0)

# -- calibrate and compress, together -------------------------------------------------------------

set_seed(args.seed)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(state.device)
config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=args.retained_ratio)
share = rows.shard(state.num_processes, state.process_index)
args.output_dir.mkdir(parents=True, exist_ok=True)
calibrate(
    model,
    config,
    DataLoader(share, args.batch_size, collate_fn=default_data_collator),
    max_batches=max(1, args.calibration_batches // state.num_processes),
    max_statistics_memory=args.max_statistics_memory,
    statistics_file=args.output_dir / "statistics.safetensors",
    progress_bar=state.is_main_process,
)
model = get_peft_model(model, config)
if state.is_main_process:
    model.print_trainable_parameters()
    print(rank_summary(model))

# -- train ----------------------------------------------------------------------------------------

checkpoints = args.output_dir / "trainer"
checkpoint = get_last_checkpoint(checkpoints) if checkpoints.exists() else None
# Only now: under ZeRO-3 what is loaded after this is in parts from the start, and cannot be calibrated.
training = TrainingArguments(
    output_dir=checkpoints,
    max_steps=args.max_steps,
    save_steps=args.save_steps,
    save_total_limit=2,
    per_device_train_batch_size=args.batch_size,
    learning_rate=args.learning_rate,
    warmup_steps=0.1,
    bf16=state.device.type == "cuda",
    use_cpu=state.device.type == "cpu",
    logging_steps=max(1, args.save_steps // 4),
    seed=args.seed,
    report_to="none",
    ddp_find_unused_parameters=False,
    dataloader_pin_memory=state.device.type == "cuda",
)
trainer = Trainer(model=model, args=training, train_dataset=rows, data_collator=default_data_collator)
if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
    model.make_shardable()
trainer.train(resume_from_checkpoint=checkpoint)
trainer.save_model(args.output_dir / "adapter")
if state.is_main_process:
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    (args.output_dir / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
    print(f"Written to {args.output_dir}: adapter/, losses.json")

# Gloo's threads end with the last reference to the process group, and the trainer's DDP holds one. A thread that is
# still at work when Python shuts down may abort this process.
state.wait_for_everyone()
deepspeed_keeps_the_group = trainer.is_deepspeed_enabled
del trainer
gc.collect()
state.destroy_process_group()
if deepspeed_keeps_the_group:  # in variables of its modules; so end without Python's shutdown
    sys.stdout.flush()
    os._exit(0)
