"""The loss right after compression, without training: every decomposition, budget, allocation and storage.

    python benchmarks/compression_loss.py run text --tasks trec mr --seeds 0 1 2
    python benchmarks/compression_loss.py report text     # compression_loss-text.md and .png

The kinds are text, vision and language. A classifier is fine-tuned on its task first: with a fresh head, far from a
minimum, truncation moves the loss to first order, and says little about the metric. A language model is compressed as
it was pretrained, calibrated on the text that it is scored on. One calibration serves all decompositions. The peers
are as published, so without JACTUS's correction of the bias. A result that is there is not computed again.
"""

import argparse
import copy
import importlib
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
from _cases import RATIOS, SEEDS, STORAGES
from _environment import environment, write_result
from _tables import mean_and_spread
from _training import make_trainer
from datasets import disable_progress_bars
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import set_seed

from peft_jactus import JactusConfig, calibrate
from peft_jactus.allocation import LayerGains, allocate
from peft_jactus.decomposition import DecompositionOptions, project_weight

TASKS = {"text": ("trec", "mr"), "vision": ("fashion_mnist", "flowers5"), "language": ("ptb", "wikitext2")}
DECOMPOSITIONS = ("jactus", "kfac", "svd-llm", "asvd", "fwsvd", "svd")
ALLOCATIONS = ("global", "uniform")
# Of the fine-tuning; rows are those of a language model's calibration, too.
ROWS = 2000
LEARNING_RATE = 2e-4
EPOCHS = 3
# Rows to score on: the logits of the dense model are kept.
MAX_TEST_ROWS = {"text": 1000, "vision": 1000, "language": 100}
BATCH_SIZE = 50
# How a decomposition is used: JACTUS by its defaults, a peer as published.
AS_USED = {name: ("pivoted", "global") if name == "jactus" else ("factored", "uniform") for name in DECOMPOSITIONS}
RESULTS = Path(__file__).parent / "results"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("kind", choices=list(TASKS))
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("JACTUS_DATA", "../shared/data"))
    parser.add_argument("--tasks", nargs="+", help="default: two of the kind's")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows at most")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder for each kind is made in it")
    return parser.parse_args()


class Scorer:
    """Scores a model by its loss, and by how far its logits are from the dense model's."""

    def __init__(self, model, rows, collator):
        self.batches = list(DataLoader(rows, BATCH_SIZE, collate_fn=collator))
        with torch.no_grad():
            self.dense = [model(**batch).logits.log_softmax(-1) for batch in self.batches]

    @torch.no_grad()
    def score(self, model):
        """Return the mean loss of a row, and the mean KL divergence of a prediction from the dense model's."""
        loss, divergence, num_rows, num_predictions = 0.0, 0.0, 0, 0
        for batch, dense in zip(self.batches, self.dense, strict=True):
            output = model(**batch)
            loss += float(output.loss) * len(batch["labels"])
            num_rows += len(batch["labels"])
            divergence += float(kl_div(output.logits.log_softmax(-1), dense, log_target=True, reduction="sum"))
            num_predictions += dense.shape[:-1].numel()
        return {"loss": loss / num_rows, "divergence": divergence / num_predictions}


def pretrained(workload, seed):
    """Return the model to compress; one with a fresh head is trained whole first."""
    set_seed(seed)
    model = workload.make_model()
    if workload.head is not None:
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(model, workload, folder, learning_rate=LEARNING_RATE, epochs=EPOCHS, seed=seed).train()
    return model.eval()


def calibrated(args, task, seed):
    """Return a model, its statistics, and what scores it."""
    module = importlib.import_module(f"_{args.kind}")
    workload = module.load_workload(args.data_dir, task, num_rows=args.rows, scored_on="test")
    model = pretrained(workload, seed)
    # Asks for all statistics that any of the decompositions needs.
    config = JactusConfig(
        task_type=workload.task_type,
        target_modules="all-linear",
        modules_to_save=workload.modules_to_save,
        decomposition="fwsvd",
    )
    found = calibrate(model, config, workload.calibration_batches(), progress_bar=False)
    rows = Subset(workload.test, range(min(MAX_TEST_ROWS[args.kind], len(workload.test))))
    return model, found, Scorer(model, rows, workload.collator)


@torch.no_grad()
def compress_(model, dense, projected, ranks, found, decomposition):
    """Write the truncated weights, and JACTUS's corrected biases, into ``model``."""
    for name, rank in ranks.items():
        layer, weight = model.get_submodule(name), dense[name].weight.double()
        truncated = weight if rank >= min(weight.shape) else projected[name].truncate(rank).dense()
        layer.weight.copy_(truncated)
        if layer.bias is not None:
            layer.bias.copy_(dense[name].bias)
            if decomposition == "jactus":
                layer.bias.add_(((weight - truncated) @ found[name].input.mean).float())


def measure(args, task, seed):
    """Return a row for each way to compress."""
    model, found, scorer = calibrated(args, task, seed)
    dense = {name: copy.deepcopy(model.get_submodule(name)) for name in found}
    rows = [{"decomposition": "dense", **scorer.score(model)}]
    for decomposition in tqdm(DECOMPOSITIONS, desc=f"{task} {seed}"):
        options = DecompositionOptions(decomposition=decomposition)
        projected = {
            name: project_weight(layer.weight, found[name], options, centred=layer.bias is not None)
            for name, layer in dense.items()
        }
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
                **scorer.score(model),
            })
    return rows


def load_rows(folder):
    """Return {(decomposition, storage, allocation, retained ratio): rows} over all runs, and the names of the runs.

    To each row comes its ``increase``: its loss less that of the dense model of the same run.
    """
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = {}
    for result in results:
        dense = result["rows"][0]
        for row in result["rows"]:
            key = tuple(row.get(name) for name in ("decomposition", "storage", "allocation", "retained_ratio"))
            found.setdefault(key, []).append(row | {"increase": row["loss"] - dense["loss"]})
    return found, [f"{result['task']} {result['seed']}" for result in results]


def mean(rows, figure):
    return statistics.mean(row[figure] for row in rows)


def markdown(found, runs):
    """Return increase of the loss, and divergence: of each as it is used, then in every way to use it."""
    columns = list(itertools.product(STORAGES, ALLOCATIONS))
    figures = {"increase": ("loss over the dense model's", "+.4f"), "divergence": ("divergence", ".2e")}

    def cell(rows, figure):
        return mean_and_spread((row[figure] for row in rows), figures[figure][1])

    lines = [
        f"Mean over {len(runs)} runs ({', '.join(runs)}); ± is the standard deviation over runs. Loss of the dense "
        f"model: {mean(found['dense', None, None, None], 'loss'):.3f}. Divergence: of a prediction from the dense "
        "model's, in nats; it is what the loss goes up by where labels follow the dense model's predictions.",
        "",
        "JACTUS as it is by default (pivoted, global ranks), peers as published (factored, uniform ranks):",
    ]
    for figure, (name, _) in figures.items():
        lines += ["", f"| {name} at | {' | '.join(DECOMPOSITIONS)} |", "|---" * (1 + len(DECOMPOSITIONS)) + "|"]
        for ratio in RATIOS:
            cells = [cell(found[(peer, *AS_USED[peer], ratio)], figure) for peer in DECOMPOSITIONS]
            lines.append(f"| {ratio:g} | {' | '.join(cells)} |")
    lines += ["", "Every one in every storage, with both allocations:"]
    for figure, (name, _) in figures.items():
        lines += ["", f"| kept | {name} | {' | '.join(map(' '.join, columns))} |", "|---" * (2 + len(columns)) + "|"]
        for ratio, peer in itertools.product(RATIOS, DECOMPOSITIONS):
            cells = [cell(found[(peer, *column, ratio)], figure) for column in columns]
            lines.append(f"| {ratio:g} | {peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found, path):
    """Draw the divergence against kept parameters, a line for each decomposition as it is used."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in DECOMPOSITIONS:
        divergences = [mean(found[(name, *AS_USED[name], ratio)], "divergence") for ratio in RATIOS]
        axes.semilogy([100 * ratio for ratio in RATIOS], divergences, marker="o", label=name)
    axes.set_xlabel("kept of the targeted parameters, %")
    axes.set_ylabel("divergence from the dense model right after compression")
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    folder = args.out / f"compression_loss-{args.kind}"
    if args.command == "report":
        found, runs = load_rows(folder)
        table = markdown(found, runs)
        folder.with_suffix(".md").write_text(table + "\n")
        plot(found, folder.with_suffix(".png"))
        print(table)
        return
    for task, seed in itertools.product(args.tasks or TASKS[args.kind], args.seeds):
        path = folder / f"{task}_seed{seed}.json"
        if not path.exists():
            rows = measure(args, task, seed)
            write_result(path, {"task": task, "seed": seed, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
