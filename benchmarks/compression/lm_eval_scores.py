"""Accuracy of folders on a task of lm-evaluation-harness, as its own command gives it: `lm_eval run --model hf`.

    python examples/causal_lm.py ...    # as docs/howto/llama.md has it
    python -m benchmarks.compression.lm_eval_scores outputs/llama/pretrained outputs/llama/remote --limit 250

A compressed folder is one that `export_remote_code` wrote: it is loaded with the code that it brings.
"""

from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from benchmarks.harness.arguments import study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, write_document

TASKS = Path(__file__).parents[2] / "examples" / "lm_eval"
METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--task", default="local_openbookqa", help="of examples/lm_eval")
    parser.add_argument("--limit", type=int, help="questions; default: all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression" / "lm_eval_scores.json")
    return parser.parse_args()


def measure(folder, args):
    """Return accuracies in percent, and the size of the weights."""
    model = {"pretrained": str(folder), "dtype": args.dtype, "softmax_dtype": "float32", "trust_remote_code": True}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    options = {"task_manager": manager, "batch_size": 16, "device": "cpu", "limit": args.limit}
    figures = simple_evaluate("hf", model, tasks=[args.task], log_samples=False, **options)["results"][args.task]
    megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    return {"folder": folder.name, "megabytes": megabytes, **{name: 100 * figures[f"{name},none"] for name in METRICS}}


def main():
    args = parse_arguments()
    rows = [measure(folder, args) for folder in args.folders]
    for row in rows:
        print(row)
    settings = {name: getattr(args, name) for name in ("task", "limit", "dtype")}
    write_document(args.out, {**settings, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
