"""Pretrain a small Llama on English novels, for the benchmarks that need a language model.

    python -m benchmarks.pretrain.language --data-dir ../shared/data --out outputs/llama-novels
    python -m benchmarks.pretrain.language --start-from outputs/llama-novels --out outputs/llama-broad \
        --corpora novels ptb ag_news gsm8k --sequences 6400 --learning-rate 1e-3     # then on more kinds of text

Stop it and run it again: it goes on at its last checkpoint. A folder that holds a finished model is left alone.
"""

import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, set_seed

from benchmarks.pretrain.training import is_pretrained, pretraining_parser, train_and_save, training_arguments
from benchmarks.tasks.language import COLUMNS, as_dataset, load_blocks, load_texts, mixed_blocks, train_tokenizer

# Texts that the tokenizer is trained on.
TOKENIZER_TEXTS = 500


def parse_arguments():
    parser = pretraining_parser(__doc__, out="outputs/llama-novels", batch_size=16, learning_rate=2e-3)
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
    if is_pretrained(args.out):
        return
    args.out.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    tokenizer = load_tokenizer(args)
    blocks = mixed_blocks(
        args.data_dir, args.corpora, tokenizer, length=args.length, num_blocks=args.sequences, seed=args.seed
    )
    held_out = load_blocks(args.data_dir, "novels", "validation", tokenizer, length=args.length, max_blocks=400)
    trainer = Trainer(
        model=build_model(args, tokenizer),
        args=training_arguments(
            args,
            num_train_epochs=1,
            per_device_eval_batch_size=32,
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=as_dataset(blocks),
        eval_dataset=as_dataset(held_out),
    )

    def figures(metrics):
        loss = metrics["eval_loss"]
        return {
            "num_tokens": blocks.numel(),
            "validation_loss": loss,
            "validation_perplexity": math.exp(loss),
        }

    train_and_save(trainer, args, figures)


if __name__ == "__main__":
    main()
