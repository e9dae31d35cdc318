"""Pretrain a small Llama on English novels, for the benchmarks that need a language model.

    python benchmarks/pretrain.py --data-dir ../shared/data --out outputs/llama-novels
    python benchmarks/pretrain.py --start-from outputs/llama-novels --out outputs/llama-broad \
        --corpora novels ptb ag_news gsm8k --sequences 6400 --learning-rate 1e-3     # then on more kinds of text

Stop it and run it again: it goes on at its last checkpoint. A folder that holds a finished model is left alone.
"""

import argparse
import math
import os
import shutil
from pathlib import Path

import torch
from _environment import environment, write_result
from _language import COLUMNS, as_dataset, load_blocks, load_texts, mixed_blocks, train_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

# Texts that the tokenizer is trained on.
TOKENIZER_TEXTS = 500


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data-dir", default=os.environ.get("JACTUS_DATA", "../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("outputs/llama-novels"))
    parser.add_argument("--start-from", type=Path, help="a folder that this script wrote: go on from its model")
    parser.add_argument("--corpora", nargs="+", default=["novels"], choices=list(COLUMNS), help="in equal parts")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=704)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key-value-heads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--sequences", type=int, default=40_000, help="to train on, once")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_tokenizer(args):
    if args.start_from is not None:
        AutoTokenizer.from_pretrained(args.start_from).save_pretrained(args.out)
    elif not (args.out / "tokenizer.json").exists():
        texts = load_texts(args.data_dir, "novels", "train", seed=0)[:TOKENIZER_TEXTS]
        train_tokenizer(texts, args.vocab_size).save_pretrained(args.out)
    return AutoTokenizer.from_pretrained(args.out)


def build_model(args, tokenizer):
    if args.start_from is not None:
        return LlamaForCausalLM.from_pretrained(args.start_from)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_value_heads,
        max_position_embeddings=4 * args.length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if (args.out / "config.json").exists():
        print(f"{args.out} holds a model already.")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    tokenizer = load_tokenizer(args)
    blocks = mixed_blocks(
        args.data_dir, args.corpora, tokenizer, length=args.length, num_blocks=args.sequences, seed=args.seed
    )
    held_out = load_blocks(args.data_dir, "novels", "validation", tokenizer, length=args.length, max_blocks=400)
    model = build_model(args, tokenizer)
    checkpoints = args.out / "trainer"
    training = TrainingArguments(
        output_dir=checkpoints,
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=torch.cuda.is_available(),
        logging_steps=100,
        save_steps=500,
        save_total_limit=1,
        seed=args.seed,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=training, train_dataset=as_dataset(blocks), eval_dataset=as_dataset(held_out))
    last = get_last_checkpoint(checkpoints) if checkpoints.exists() else None
    trainer.train(resume_from_checkpoint=last)
    loss = trainer.evaluate()["eval_loss"]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_result(
        args.out / "pretraining.json",
        {
            "settings": settings,
            "num_tokens": blocks.numel(),
            "num_parameters": model.num_parameters(),
            "validation_loss": loss,
            "validation_perplexity": math.exp(loss),
            "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
        },
    )
    model.save_pretrained(args.out)
    shutil.rmtree(checkpoints)
    print(f"{args.out}: validation perplexity {math.exp(loss):.2f} of a token")


if __name__ == "__main__":
    main()
