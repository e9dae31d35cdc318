"""The loss right after compression, without training: every decomposition, budget, allocation and storage.

    python benchmarks/compression_loss.py run text --tasks trec mr --seeds 0 1 2
    python benchmarks/compression_loss.py report text     # compression_loss-text.md and .png

The kinds are text, vision and language. A classifier is fine-tuned on its task first, to the epoch that has the least
loss on held-out training rows: far from a minimum, with a fresh head or when it has become too sure of itself,
truncation moves the loss to first order, and says little about the metric. A language model is compressed as
it was pretrained, calibrated on training rows of the text that it is scored on; its seed chooses these rows, and no
more. One calibration serves all decompositions. JACTUS is as it is by default; the peers are as published, so
without its correction of the bias, and with ranks of any number. A result that is there is not computed again.
"""

import argparse
import copy
import importlib
import itertools
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from _adapting import rank_multiple
from _cases import RATIOS, SEEDS, STORAGES
from _environment import environment, write_result
from _reporting import markdown_table, mean_and_spread
from _training import make_trainer
from datasets import disable_progress_bars
from peft_jactus.allocation import allocate
from peft_jactus.decomposition import DecompositionOptions
from peft_jactus.factorization import layer_gains
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import set_seed

from peft_jactus import JactusConfig, calibrate

TASKS = {
    "text": ("trec", "mr"),
    "vision": ("fashion_mnist", "flowers5"),
    "language": ("novels", "ptb", "wikitext2"),
}
DECOMPOSITIONS = ("jactus", "kfac", "svd-llm", "asvd", "fwsvd", "svd")
ALLOCATIONS = ("global", "uniform")
# Of the fine-tuning; rows are those of a language model's calibration, too.
ROWS = 2000
LEARNING_RATE = 2e-4
EPOCHS = 3
KEEP_BEST_EPOCH = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
}
# Rows to score on: the logits of the dense model are kept.
MAX_TEST_ROWS = {"text": 1000, "vision": 4000, "language": 100}
BATCH_SIZE = 50
# How a decomposition is used: JACTUS by its defaults, a peer as published.
AS_USED = {name: ("pivoted", "global") if name == "jactus" else ("factored", "uniform") for name in DECOMPOSITIONS}
RESULTS = Path(__file__).parent / "results"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("kind", choices=list(TASKS))
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("JACTUS_DATA", "../shared/data"))
    parser.add_argument("--tasks", nargs="+", help="default: two or three of the kind's")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows at most")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder for each kind is made in it")
    return parser.parse_args()


def log_probabilities(output):
    """Return them in float64: some divergences are below the rounding of float32."""
    return output.logits.double().log_softmax(-1)


class Scorer:
    """Scores a model by its loss, and by how far its logits are from the dense model's."""

    def __init__(self, model, rows, collator):
        self.batches = list(DataLoader(rows, BATCH_SIZE, collate_fn=collator))
        with torch.no_grad():
            self.dense = [log_probabilities(model(**batch)) for batch in self.batches]

    @torch.no_grad()
    def score(self, model):
        """Return the mean loss of a row, and the mean KL divergence of a prediction from the dense model's."""
        loss, divergence, num_rows, num_predictions = 0.0, 0.0, 0, 0
        for batch, dense in zip(self.batches, self.dense, strict=True):
            output = model(**batch)
            loss += float(output.loss) * len(batch["labels"])
            num_rows += len(batch["labels"])
            divergence += float(kl_div(log_probabilities(output), dense, log_target=True, reduction="sum"))
            num_predictions += dense.shape[:-1].numel()
        return {"loss": loss / num_rows, "divergence": divergence / num_predictions}


def pretrained(workload, seed):
    """Return the model to compress; one with a fresh head is trained whole first.

    Of its epochs it is the one with the least loss on ``workload.test``.
    """
    set_seed(seed)
    model = workload.make_model()
    if workload.head is not None:
        workload = replace(workload, training_arguments=workload.training_arguments | KEEP_BEST_EPOCH)
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(model, workload, folder, learning_rate=LEARNING_RATE, epochs=EPOCHS, seed=seed).train()
    return model.eval()


def calibrated(args, task, seed):
    """Return a model, its statistics, and what scores it."""
    module = importlib.import_module(f"_{args.kind}")

    def load_workload(scored_on):
        return module.load_workload(args.data_dir, task, num_rows=args.rows, scored_on=scored_on)

    scored = load_workload("test")
    workload = scored if scored.head is None else load_workload("held-out")
    model = pretrained(workload, seed)
    # Asks for all statistics that any of the decompositions needs.
    config = JactusConfig(
        task_type=workload.task_type,
        target_modules="all-linear",
        modules_to_save=workload.modules_to_save,
        decomposition="fwsvd",
    )
    found = calibrate(model, config, workload.calibration_batches(), progress_bar=False)
    rows = Subset(scored.test, range(min(MAX_TEST_ROWS[args.kind], len(scored.test))))
    return model, found, Scorer(model, rows, scored.collator)


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
        gains, projected = {}, {}
        for name, layer in dense.items():
            statistics_of_layer = found[name] if options.needs_statistics else None
            gains[name], projected[name] = layer_gains(
                name, layer.weight, statistics_of_layer, options, centred=layer.bias is not None
            )
        for ratio, storage, allocation in itertools.product(RATIOS, STORAGES, ALLOCATIONS):
            allocated = allocate(
                gains,
                retained_ratio=ratio,
                strategy=allocation,
                storage=storage,
                rank_multiple=rank_multiple(decomposition),
            )
            compress_(model, dense, projected, allocated.ranks, found, decomposition)
            rows.append({
                "decomposition": decomposition,
                "retained_ratio": ratio,
                "storage": storage,
                "allocation": allocation,
                **scorer.score(model),
            })
    return rows


def load_results(folder):
    """Return the results; seeds that do not have all tasks are left out.

    Raises:
        ValueError: If two are of the same task and seed.
    """
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if len({(result["task"], result["seed"]) for result in results}) < len(results):
        raise ValueError(
            f"{folder} has two results of one task and seed; delete the one that the table shall not have."
        )
    tasks = {result["task"] for result in results}
    complete = {seed for seed in seeds(results) if {r["task"] for r in results if r["seed"] == seed} == tasks}
    return [result for result in results if result["seed"] in complete]


def seeds(results):
    return sorted({result["seed"] for result in results})


def means_by_seed(results):
    """Return {(decomposition, storage, allocation, retained ratio): {figure: [mean over tasks for each seed]}}.

    To the figures comes the ``increase``: the loss less that of the dense model of the same run.
    """
    found = {}
    for result in results:
        dense = result["rows"][0]
        for row in result["rows"]:
            key = tuple(row.get(name) for name in ("decomposition", "storage", "allocation", "retained_ratio"))
            figures = {name: row[name] for name in ("loss", "divergence")}
            figures["increase"] = row["loss"] - dense["loss"]
            for name, figure in figures.items():
                found.setdefault(key, {}).setdefault(name, {}).setdefault(result["seed"], []).append(figure)
    return {
        key: {name: [statistics.mean(of_seed) for of_seed in by_seed.values()] for name, by_seed in figures.items()}
        for key, figures in found.items()
    }


def markdown(results):
    """Return increase of the loss, and divergence: of each as it is used, then in every way to use it."""
    found = means_by_seed(results)
    columns = list(itertools.product(STORAGES, ALLOCATIONS))
    # Name, format and factor; on images much of the increase is below 1e-5.
    figures = {
        "increase": ("loss over the dense model's, 1e-3", "+.3f", 1000),
        "divergence": ("divergence", ".2e", 1),
    }
    dense = {}
    for result in results:
        dense.setdefault(result["task"], []).append(result["rows"][0]["loss"])

    def cell(of_seeds, figure):
        _, form, factor = figures[figure]
        return mean_and_spread((factor * value for value in of_seeds[figure]), form)

    losses = ", ".join(f"{task} {mean_and_spread(of_seeds, '.3f')}" for task, of_seeds in sorted(dense.items()))
    lines = [
        f"Mean over {len(dense)} tasks; ± is the standard deviation over {len(seeds(results))} seeds. Loss of the "
        f"dense model: {losses}. Divergence: of a prediction from the dense model's, in nats; it is what the loss "
        "goes up by where labels follow the dense model's predictions.",
        "",
        "JACTUS as it is by default (pivoted, global ranks), peers as published (factored, uniform ranks):",
    ]
    for figure, (name, *_) in figures.items():
        rows = [
            [f"{ratio:g}", *(cell(found[(peer, *AS_USED[peer], ratio)], figure) for peer in DECOMPOSITIONS)]
            for ratio in RATIOS
        ]
        lines += ["", markdown_table([f"{name} at", *DECOMPOSITIONS], rows)]
    lines += ["", "Every one in every storage, with both allocations:"]
    for figure, (name, *_) in figures.items():
        rows = [
            [f"{ratio:g}", peer, *(cell(found[(peer, *column, ratio)], figure) for column in columns)]
            for ratio, peer in itertools.product(RATIOS, DECOMPOSITIONS)
        ]
        lines += ["", markdown_table(["kept", name, *map(" ".join, columns)], rows)]
    return "\n".join(lines)


def plot(results, path):
    """Draw the divergence against kept parameters, a line for each decomposition as it is used."""
    from matplotlib.figure import Figure

    found = means_by_seed(results)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in DECOMPOSITIONS:
        divergences = [statistics.mean(found[(name, *AS_USED[name], ratio)]["divergence"]) for ratio in RATIOS]
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
        results = load_results(folder)
        table = markdown(results)
        folder.with_suffix(".md").write_text(table + "\n")
        plot(results, folder.with_suffix(".png"))
        print(table)
        return
    started_at = environment()  # the code that runs, whatever becomes of the files meanwhile
    for seed, task in itertools.product(args.seeds, args.tasks or TASKS[args.kind]):
        path = folder / f"{task}_{args.rows}rows_seed{seed}.json"
        if not path.exists():
            rows = measure(args, task, seed)
            result = {"task": task, "seed": seed, "num_rows": args.rows, "rows": rows, "environment": started_at}
            write_result(path, result)


if __name__ == "__main__":
    main()
