"""What is shipped: accuracy, size and exactness of the compressed checkpoint of a trained MiniLM, in each form.

    python -m benchmarks.compression.checkpoint

For each retained ratio one model is trained (lora+jactus-cores of the comparison, at its learning rates). It is
exported as pivoted and as factored, in float32, in bfloat16, and with int8 weights through torchao, where that is
installed. All forms are the same function.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from benchmarks.compare.cases import EPOCHS, Case, learning_rate_group
from benchmarks.compare.learning_rates import load_learning_rates
from benchmarks.compare.training import trained
from benchmarks.harness.arguments import add_data_dir, study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, write_document
from benchmarks.tasks.text import load_workload
from peft_jactus import export_compressed, rank_summary

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
METHOD = "lora+jactus-cores"


def parse_arguments():
    parser = study_parser(__doc__)
    add_data_dir(parser)
    parser.add_argument("--task", default="trec")
    parser.add_argument("--retained-ratio", type=float, nargs="+", default=[0.8, 0.4])
    parser.add_argument("--rows", type=int, default=6000, help="training rows at most")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "compression" / "checkpoint.json")
    return parser.parse_args()


@torch.no_grad()
def logits_and_labels(model, test, collator):
    logits, labels = [], []
    for batch in DataLoader(test, 100, collate_fn=collator):
        labels.append(batch.pop("labels"))
        logits.append(model(**batch).logits.float())
    return torch.cat(logits), torch.cat(labels)


def tensor_bytes(tensors):
    """Return the bytes of tensors; of the parts of a quantised one."""
    total = 0
    for tensor in tensors:
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        total += sum(getattr(tensor, part).nbytes for part in parts) if parts else tensor.nbytes
    return total


def targeted_bytes(model):
    """Return the bytes that the layers named by the checkpoint hold in memory, biases left out."""
    tensors = []
    for row in rank_summary(model).rows:
        layer = model.get_submodule(row.name)
        tensors += [tensor for name, tensor in layer.state_dict().items() if not name.endswith("bias")]
    return tensor_bytes(tensors)


def quantized(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def measured(model, reference, test, collator, dense_bytes):
    logits, labels = logits_and_labels(model, test, collator)
    targeted = targeted_bytes(model)
    return {
        "accuracy": float((logits.argmax(-1) == labels).float().mean()),
        "relative_logit_difference": float((logits - reference).norm() / reference.norm()),
        "targeted_mb_in_memory": targeted / 1e6,
        "targeted_over_dense_float32": targeted / dense_bytes,
        "whole_mb_in_memory": tensor_bytes([*model.parameters(), *model.buffers()]) / 1e6,
    }


def forms_of(model, test, collator):
    """Return a row for each form of one trained adapter."""
    reference, _ = logits_and_labels(model.eval(), test, collator)
    dense_bytes = 4 * sum(row.num_dense for row in rank_summary(model).rows)
    rows = []
    for storage in ("pivoted", "factored"):
        for dtype in (torch.float32, torch.bfloat16):
            with tempfile.TemporaryDirectory() as folder:
                export_compressed(model, folder, storage=storage, dtype=dtype, overwrite=True, progress_bar=False)
                file_bytes = (Path(folder) / "model.safetensors").stat().st_size
                loaded = AutoModelForSequenceClassification.from_pretrained(folder)
            row = {"storage": storage, "dtype": str(dtype).removeprefix("torch."), "file_mb": file_bytes / 1e6}
            rows.append(row | measured(loaded, reference, test, collator, dense_bytes))
            if dtype == torch.float32 and HAS_TORCHAO:
                row = {"storage": storage, "dtype": "int8 weights"}
                rows.append(row | measured(quantized(loaded), reference, test, collator, dense_bytes))
    return rows


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    rates = load_learning_rates(RESULTS / "compare", "text")[learning_rate_group("text", args.task)]
    workload = load_workload(args.data_dir, args.task, num_rows=args.rows, scored_on="test")
    results = []
    for ratio in args.retained_ratio:
        case = Case(
            args.task,
            METHOD,
            ratio,
            "pivoted",
            args.seed,
            rates[METHOD],
            args.rows,
            args.epochs,
            first_learning_rate=rates["lora"],
        )
        with tempfile.TemporaryDirectory() as folder:
            model, figures = trained(case, workload, folder)
        for row in forms_of(model, workload.test, workload.collator):
            results.append({"retained_ratio": ratio, "accuracy_as_trained": figures["accuracy"], **row})
            print(results[-1], flush=True)
    settings = {name: value for name, value in case.settings().items() if name not in ("retained_ratio", "label")}
    write_document(args.out, {**settings, "rows": results, "environment": environment()})


if __name__ == "__main__":
    main()
