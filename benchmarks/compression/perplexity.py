"""Perplexity and size of causal language models: folders, compressed or not, or GGUF files.

    peft-jactus compress SmolLM2-135M-Instruct.Q4_1.gguf outputs/smollm2-4bit --data-dir ../shared/data/wikitext2 \\
        --split validation --max-batches 4 --batch-size 8 --max-length 256 --bits 4 --dtype bfloat16
    python -m benchmarks.compression.perplexity SmolLM2-135M-Instruct.Q4_1.gguf outputs/smollm2-4bit
"""

import math
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_jactus  # noqa: F401  # so that transformers loads compressed folders
from benchmarks.harness.arguments import add_data_dir, study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, write_document
from benchmarks.tasks.language import LENGTH, load_blocks


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    add_data_dir(parser)
    parser.add_argument("--task", default="wikitext2")
    parser.add_argument("--test-rows", type=int, default=24, help=f"of {LENGTH} tokens")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression" / "perplexity.json")
    return parser.parse_args()


@torch.no_grad()
def measure(path, args):
    place = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(**place)
    blocks = load_blocks(args.data_dir, args.task, "test", tokenizer, length=LENGTH, max_blocks=args.test_rows)
    losses = [float(model(block[None], labels=block[None]).loss) for block in tqdm(blocks, desc=path.name)]
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return {
        "model": path.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "file_mb": sum(file.stat().st_size for file in files) / 1e6,
        "perplexity": math.exp(sum(losses) / len(losses)),
    }


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    rows = [measure(path, args) for path in args.models]
    for row in rows:
        print(row)
    settings = {"task": args.task, "test_rows": args.test_rows}
    write_document(args.out, {**settings, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
