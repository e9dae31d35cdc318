"""JACTUS on a Llama: calibrate on instructions, compress, fine-tune, and answer a question.

    python examples/causal_lm.py                        # Llama-2-7B and Alpaca from the Hub
    python examples/causal_lm.py --model HuggingFaceTB/SmolLM2-135M      # or a smaller Llama
    python examples/causal_lm.py --small --data-dir ../shared/data/gsm8k # no download of a model
    python examples/causal_lm.py --model SmolLM2-135M-Instruct.Q4_1.gguf --dtype bfloat16 \
        --data-dir ../shared/data/openbookqa                             # a file from elsewhere

`--small` trains a small Llama and its tokenizer on half of the rows first, as plain text, so that
there is a pretrained model to compress. The loss counts the tokens of the answers alone.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from _common import num_trainable, print_side_by_side, weight_bytes, write_results
from datasets import Dataset, DatasetDict, load_dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_jactus import JactusConfig, calibrate, export_compressed, export_remote_code, plot_ranks, rank_summary

# -- settings -------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--model", default="meta-llama/Llama-2-7b-hf", help="Hub name, directory or GGUF file")
parser.add_argument("--small", action="store_true", help="train a small Llama to adapt")
parser.add_argument("--dataset", default="yahma/alpaca-cleaned", help="Hub name")
parser.add_argument("--data-dir", type=Path, help="directory of parquet files, instead of --dataset")
parser.add_argument("--output-dir", type=Path, default=Path("outputs/causal_lm"))
parser.add_argument("--retained-ratio", type=float, default=0.8, help="kept share of the weights")
parser.add_argument(
    "--adaptation-space", choices=["free", "retained"], default="free", help="retained: no rank is set aside to train"
)
parser.add_argument("--calibration-batches", type=int, default=16)
parser.add_argument("--max-statistics-memory", default="16GiB", help="with more, layers are calibrated in parts")
parser.add_argument("--learning-rate", type=float, help="default: 2e-4, or 1e-3 with --small")
parser.add_argument("--epochs", type=float, default=1)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 elsewhere")
parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
parser.add_argument("--max-length", type=int, default=256, help="tokens")
parser.add_argument("--max-train-samples", type=int, default=2000)
parser.add_argument("--max-eval-samples", type=int, default=200)
parser.add_argument("--pretrain-epochs", type=float, default=2, help="of the small Llama")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

args.learning_rate = args.learning_rate or (1e-3 if args.small else 2e-4)
args.output_dir.mkdir(parents=True, exist_ok=True)
device = "cuda" if torch.cuda.is_available() else "cpu"
args.dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
dtype = getattr(torch, args.dtype)
base = args.model  # what is compressed: with --small and a GGUF file, a folder that this script writes

# -- data -----------------------------------------------------------------------------------------

PROMPT = "### Instruction:\n{}\n\n### Response:\n"


def to_prompt_and_answer(row: dict) -> dict:
    """Bring a row of the sets that we know (Alpaca, MetaMathQA, GSM8K, ARC and the like) to one form."""
    if "instruction" in row:
        return {
            "prompt": PROMPT.format("\n\n".join(filter(None, (row["instruction"], row["input"])))),
            "answer": row["output"],
        }
    if "query" in row:
        return {"prompt": PROMPT.format(row["query"]), "answer": row["response"]}
    if "choices" in row:
        return {
            "prompt": PROMPT.format("\n- ".join((row["question"], *row["choices"]))),
            "answer": row["choices"][row["label"]],
        }
    return {"prompt": PROMPT.format(row["question"]), "answer": row["answer"]}


source = {"path": "parquet", "data_dir": str(args.data_dir)} if args.data_dir else {"path": args.dataset}
rows = load_dataset(**source)
if "test" not in rows and "validation" not in rows:
    rows = rows["train"].train_test_split(test_size=args.max_eval_samples, seed=0)
eval_split = "test" if "test" in rows else "validation"
rows = DatasetDict(
    train=rows["train"].shuffle(seed=0), test=rows[eval_split].shuffle(seed=0)
)  # not args.seed: all seeds see the same rows
rows = rows.map(to_prompt_and_answer, remove_columns=rows["train"].column_names)

# -- with --small: a pretrained model of our own --------------------------------------------------


def trainer_for(model: nn.Module, rows: Dataset, epochs: float, learning_rate: float) -> Trainer:
    training = TrainingArguments(
        output_dir=args.output_dir / "trainer",
        num_train_epochs=epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",  # less padding
        bf16=device == "cuda",
        seed=args.seed,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=device == "cuda",
    )
    return Trainer(model=model, args=training, train_dataset=rows, data_collator=collator)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 2048 tokens, that starts each text with `<s>` as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def tokenize(row: dict) -> dict:
    """Return prompt and answer as tokens; -100 marks the prompt, which has no part in the loss."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    tokens = (prompt + answer + [tokenizer.eos_token_id])[: args.max_length]
    labels = ([-100] * len(prompt) + tokens[len(prompt) :])[: args.max_length]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


if args.small:
    set_seed(args.seed)
    base = str(args.output_dir / "pretrained")
    half = len(rows["train"]) // 2
    text_rows = rows["train"].select(range(half))
    rows["train"] = rows["train"].select(range(half, len(rows["train"])))
    texts = [row["prompt"] + row["answer"] for row in text_rows]
    tokenizer = train_tokenizer(texts)
    collator = DataCollatorForSeq2Seq(tokenizer)
    model_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_rows = text_rows.select(range(min(args.max_train_samples, half))).map(tokenize)
    text_rows = text_rows.map(lambda row: {"labels": row["input_ids"]})  # plain text: all tokens
    pretrained = LlamaForCausalLM(model_config)
    trainer_for(pretrained, text_rows, args.pretrain_epochs, learning_rate=3e-3).train()
    pretrained.save_pretrained(base)
    tokenizer.save_pretrained(base)

# -- with a GGUF file: a folder of it, which everything else can load -----------------------------

if args.model.endswith(".gguf") and not args.small:
    args.model = Path(args.model)
    place = {"pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
    unpacked = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype)
    settings = unpacked.config.to_diff_dict()
    settings.pop("quantization_config")  # it is not quantized any more
    pretrained = type(unpacked)(type(unpacked.config)(**settings)).to(dtype)
    pretrained.load_state_dict(unpacked.state_dict())
    base = str(args.output_dir / "pretrained")
    pretrained.save_pretrained(base)
    AutoTokenizer.from_pretrained(**place).save_pretrained(base)
    del unpacked, pretrained

# -- tokens ---------------------------------------------------------------------------------------

tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
collator = DataCollatorForSeq2Seq(tokenizer)
question = rows["test"][0]["prompt"]
for split, limit in (("train", args.max_train_samples), ("test", args.max_eval_samples)):
    rows[split] = rows[split].select(range(min(limit, len(rows[split]))))
rows = rows.map(tokenize, remove_columns=rows["train"].column_names)
# Nothing to learn from a row whose prompt fills the whole length.
rows = rows.filter(lambda labels: max(labels) != -100, input_columns="labels")


@torch.no_grad()
def answer_loss(model: nn.Module) -> float:
    """Return the mean loss of one token of the test answers."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in DataLoader(rows["test"], args.batch_size, collate_fn=collator):
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch.to(device)).loss.item() * count
        tokens += count
    return total / tokens


# -- a pretrained model ---------------------------------------------------------------------------

set_seed(args.seed)
model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device)
if args.gradient_checkpointing:
    # before transformers 5.23: gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
dense_parameters = model.num_parameters()
losses = {"dense": answer_loss(model)}

# -- calibrate, compress, train -------------------------------------------------------------------

config = JactusConfig(
    task_type="CAUSAL_LM",
    target_modules="all-linear",
    retained_ratio=args.retained_ratio,
    adaptation_space=args.adaptation_space,
)
loader = DataLoader(rows["train"], args.batch_size, collate_fn=collator)
start = time.perf_counter()
calibrate(
    model,
    config,
    loader,
    max_batches=args.calibration_batches,
    max_statistics_memory=args.max_statistics_memory,
)
model = get_peft_model(model, config)
preparation_seconds = time.perf_counter() - start
losses["compressed"] = answer_loss(model)

model.print_trainable_parameters()
summary = rank_summary(model)
print(summary)
plot_ranks(model).savefig(args.output_dir / "ranks.png", dpi=150)

start = time.perf_counter()
trainer_for(model, rows["train"], args.epochs, args.learning_rate).train()
training_seconds = time.perf_counter() - start
losses["trained"] = answer_loss(model)

# -- save, load, ask ------------------------------------------------------------------------------

adapter = args.output_dir / "adapter"
model.save_pretrained(adapter)
tokenizer.save_pretrained(adapter)
trainable, held_bytes = num_trainable(model), weight_bytes(model)
# Two forms of one checkpoint: for those who import peft_jactus, and with code of its own for other tools.
export_compressed(model, args.output_dir / "compressed", processor=tokenizer, overwrite=True)
export_remote_code(args.output_dir / "compressed", args.output_dir / "remote", overwrite=True)
del model  # a large model may fit only once
model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype).to(device)
losses["reloaded"] = answer_loss(model)
inputs = tokenizer(question, return_tensors="pt").to(device)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))

stored = sum(row.num_stored for row in summary.rows)
targeted = sum(row.num_dense for row in summary.rows)
kept_parameters = dense_parameters - targeted + stored
print()
print_side_by_side({
    name: {
        "loss of an answer's token": f"{loss:.4f}",
        "perplexity": f"{math.exp(loss):.2f}",
        "parameters, core folded": f"{dense_parameters if name == 'dense' else kept_parameters:,}",
    }
    for name, loss in losses.items()
})
results = {
    "losses": losses,
    "trainable": trainable,
    "targeted_parameters": {"dense": targeted, "kept": stored},
    "parameters": {"dense": dense_parameters, "kept": kept_parameters},
    "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
    "weight_bytes": held_bytes,
    "preparation_seconds": preparation_seconds,
    "training_seconds": training_seconds,
}
write_results(args.output_dir / "results.json", args, results)
print(f"Written to {args.output_dir}: adapter/, compressed/, remote/, ranks.png, results.json")
