"""PARSE on a Llama: compress, let a router choose ranks for each prompt, and compare with static ranks.

    python examples/ranks_by_prompt.py                  # SmolLM2 and WikiText from the Hub
    python examples/causal_lm.py --small --data-dir ../shared/data/gsm8k          # makes a small Llama, no download
    python examples/ranks_by_prompt.py --model outputs/causal_lm/pretrained --data-dir ../shared/data/novels \
        --expert-size 8
"""

import argparse
from pathlib import Path

import torch
from _common import print_side_by_side, write_results
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator, set_seed

from peft_jactus import JactusConfig, calibrate, export_compressed
from peft_jactus.parse import RouterConfig, RouterTrainer, routed_copy

# -- settings -------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub name or directory")
parser.add_argument("--dataset", default="Salesforce/wikitext", help="Hub name")
parser.add_argument("--dataset-config", default="wikitext-2-raw-v1")
parser.add_argument("--data-dir", help="directory of parquet files with a column `text`, instead of --dataset")
parser.add_argument("--output-dir", type=Path, default=Path("outputs/ranks_by_prompt"))
parser.add_argument("--retained-ratio", type=float, default=0.8, help="what the compressed model keeps")
parser.add_argument("--active-ratio", type=float, default=0.5, help="what runs for one prompt")
parser.add_argument("--expert-size", type=int, default=16)
parser.add_argument("--router-input", choices=("embeddings", "first_block"), default="embeddings")
parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
parser.add_argument("--sequences", type=int, default=512, help="to train the router on")
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=2e-2)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

set_seed(args.seed)
device = "cuda" if torch.cuda.is_available() else "cpu"

# -- data -----------------------------------------------------------------------------------------

tokenizer = AutoTokenizer.from_pretrained(args.model)
source = {"path": "parquet", "data_dir": args.data_dir} if args.data_dir else {"path": args.dataset}
source |= {} if args.data_dir else {"name": args.dataset_config}
dataset = load_dataset(**source)
eval_split = "test" if "test" in dataset else "validation"


def make_sequences(split: str, num: int) -> list[dict]:
    """Join the rows of a split and cut them into sequences of one length."""
    tokens = []
    for text in dataset[split].shuffle(seed=0)["text"]:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) >= num * args.length:
            break
    rows = [tokens[start : start + args.length] for start in range(0, len(tokens) - args.length + 1, args.length)]
    return [{"input_ids": row, "labels": row} for row in rows[:num]]


train, test = make_sequences("train", args.sequences + 128), make_sequences(eval_split, 64)
calibration, corpus = train[:128], train[128:]


def loader(rows: list[dict]) -> DataLoader:
    return DataLoader(rows, args.batch_size, collate_fn=default_data_collator)


@torch.no_grad()
def loss_of(model: torch.nn.Module) -> float:
    """Return the mean loss of a test token."""
    losses = [model(**{name: values.to(device) for name, values in batch.items()}).loss for batch in loader(test)]
    return float(torch.stack(losses).mean())


# -- compress -------------------------------------------------------------------------------------

dense = AutoModelForCausalLM.from_pretrained(args.model).to(device).eval()
losses = {"dense": loss_of(dense)}
config = JactusConfig(
    task_type="CAUSAL_LM",
    target_modules="all-linear",
    retained_ratio=args.retained_ratio,
    adaptation_rank=0,  # nothing trains: all ranks are the weight's
)
statistics = calibrate(dense, config, loader(calibration))
adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model).to(device), config)
export_compressed(adapted, args.output_dir / "compressed", processor=tokenizer, overwrite=True)
compressed = AutoModelForCausalLM.from_pretrained(args.output_dir / "compressed").to(device)
losses["compressed"] = loss_of(compressed)

# -- route ----------------------------------------------------------------------------------------

router_config = RouterConfig(args.active_ratio, args.expert_size, router_input=args.router_input)
routed = routed_copy(compressed, router_config, statistics=statistics)
trainer = RouterTrainer(
    routed,
    dense,
    TrainingArguments(
        output_dir=args.output_dir / "trainer",
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        num_train_epochs=1,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        dataloader_pin_memory=device == "cuda",
    ),
    train_dataset=corpus,
    data_collator=default_data_collator,
)
trainer.train()
routed.save_pretrained(args.output_dir / "routed")
tokenizer.save_pretrained(args.output_dir / "routed")

# -- serve ----------------------------------------------------------------------------------------

model = AutoModelForCausalLM.from_pretrained(args.output_dir / "routed").to(device)
losses[f"routed, {args.active_ratio:.0%} active"] = loss_of(model)
prompt = tokenizer.decode(test[0]["input_ids"][: args.length // 2])
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device)
inputs.pop("token_type_ids", None)
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
print(model.rank_router.cache_info())

print()
print_side_by_side({name: {"loss of a token": f"{loss:.4f}"} for name, loss in losses.items()})
write_results(args.output_dir / "results.json", args, {"losses": losses})
print(f"Written to {args.output_dir}: compressed/, routed/, results.json")
