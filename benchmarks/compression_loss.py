"""The loss right after compression, without training: every decomposition, budget, allocation and storage.

    python benchmarks/compression_loss.py --tasks trec mr --seeds 0 1 2
    python benchmarks/compression_loss.py --report

MiniLM, fine-tuned on the task first: far from a minimum, truncation moves the loss to first order, and says little
about the metric. One calibration serves all decompositions. A result that is there is not computed again.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
from _environment import environment, write_result
from _text import load_workload
from _training import CALIBRATION_BATCHES, make_trainer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import set_seed

from peft_jactus import JactusConfig, calibrate
from peft_jactus.allocation import LayerGains, allocate
from peft_jactus.decomposition import DecompositionOptions, project_weight

DECOMPOSITIONS = ("jactus", "kfac", "svd-llm", "asvd", "fwsvd", "svd")
RATIOS = (0.8, 0.6, 0.4)
STORAGES = ("pivoted", "factored")
ALLOCATIONS = ("global", "uniform")
BATCH_SIZE = 32
LEARNING_RATE = 1e-4
EPOCHS = 3
RESULTS = Path(__file__).parent / "results" / "compression_loss"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("JACTUS_DATA", "../shared/data"))
    parser.add_argument("--tasks", nargs="+", default=["trec", "mr"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=2000, help="training rows at most")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="write compression_loss.md from the results and stop")
    return parser.parse_args()


@torch.no_grad()
def loss_and_accuracy(model, rows, collator):
    losses, hits = 0.0, 0
    for batch in DataLoader(rows, 100, collate_fn=collator):
        output = model(**batch)
        losses += float(output.loss) * len(batch["labels"])
        hits += int((output.logits.argmax(-1) == batch["labels"]).sum())
    return {"loss": losses / len(rows), "accuracy": hits / len(rows)}


def fine_tuned(workload, seed):
    """Train all of the model."""
    set_seed(seed)
    model = workload.make_model()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(model, workload, folder, learning_rate=LEARNING_RATE, epochs=EPOCHS, seed=seed).train()
    return model.eval()


def calibrated(task, seed, args):
    """Return a fine-tuned model, its statistics, and test rows."""
    workload = load_workload(args.data_dir, task, num_rows=args.rows, scored_on="test")
    model = fine_tuned(workload, seed)
    # Asks for all statistics that any of the decompositions needs.
    config = JactusConfig(task_type="SEQ_CLS", target_modules="all-linear", decomposition="fwsvd")
    loader = DataLoader(workload.train, BATCH_SIZE, shuffle=True, collate_fn=workload.collator)
    found = calibrate(model, config, loader, max_batches=CALIBRATION_BATCHES, progress_bar=False)
    return model, found, workload.test.sort("labels"), workload.collator


@torch.no_grad()
def compress_(model, dense, projected, ranks, found, decomposition):
    """Write the truncated weights, and the corrected biases, into ``model``."""
    for name, rank in ranks.items():
        layer, weight = model.get_submodule(name), dense[name].weight.double()
        truncated = weight if rank >= min(weight.shape) else projected[name].truncate(rank).dense()
        layer.weight.copy_(truncated)
        layer.bias.copy_(dense[name].bias)
        if decomposition != "svd":  # which is data-free
            layer.bias.add_(((weight - truncated) @ found[name].input.mean).float())


def measure(task, seed, args):
    """Return a row for each way to compress."""
    model, found, test, collator = calibrated(task, seed, args)
    dense = {name: copy.deepcopy(model.get_submodule(name)) for name in found}
    rows = [{"decomposition": "dense", **loss_and_accuracy(model, test, collator)}]
    for decomposition in tqdm(DECOMPOSITIONS, desc=f"{task} {seed}"):
        options = DecompositionOptions(decomposition=decomposition)
        projected = {name: project_weight(layer.weight, found[name], options) for name, layer in dense.items()}
        gains = {
            name: LayerGains(
                *dense[name].weight.shape,
                found[name].num_tokens * p.gains(),
                found[name].num_tokens * p.total_energy,
            )
            for name, p in projected.items()
        }
        for ratio, storage, allocation in itertools.product(RATIOS, STORAGES, ALLOCATIONS):
            allocated = allocate(gains, retained_ratio=ratio, strategy=allocation, storage=storage)
            compress_(model, dense, projected, allocated.ranks, found, decomposition)
            rows.append({
                "decomposition": decomposition,
                "retained_ratio": ratio,
                "storage": storage,
                "allocation": allocation,
                **loss_and_accuracy(model, test, collator),
            })
    return rows


def report(folder):
    """Return the mean loss over tasks and seeds as Markdown, and how often a row beats those of the peers."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    losses = {}
    for result in results:
        for row in result["rows"]:
            key = tuple(row.get(name) for name in ("decomposition", "storage", "allocation", "retained_ratio"))
            losses.setdefault(key, []).append(row["loss"])
    columns = [(storage, allocation) for storage in STORAGES for allocation in ALLOCATIONS]
    dense = statistics.mean(losses[("dense", None, None, None)])
    runs = ", ".join(f"{result['task']} {result['seed']}" for result in results)
    lines = [f"Mean test loss over {len(results)} runs ({runs}); dense {dense:.3f}. ± is the deviation over runs.", ""]
    lines += [f"| kept | decomposition | {' | '.join(map(' '.join, columns))} |", "|---" * (2 + len(columns)) + "|"]
    for ratio, decomposition in itertools.product(RATIOS, DECOMPOSITIONS):
        cells = [losses[(decomposition, *column, ratio)] for column in columns]
        text = [f"{statistics.mean(cell):.3f} ± {statistics.pstdev(cell):.3f}" for cell in cells]
        lines.append(f"| {ratio:g} | {decomposition} | {' | '.join(text)} |")
    return "\n".join(lines)


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    if args.report:
        table = report(args.out)
        args.out.with_suffix(".md").write_text(table + "\n")
        print(table)
        return
    for task, seed in itertools.product(args.tasks, args.seeds):
        path = args.out / f"{task}_seed{seed}.json"
        if not path.exists():
            rows = measure(task, seed, args)
            write_result(path, {"task": task, "seed": seed, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
