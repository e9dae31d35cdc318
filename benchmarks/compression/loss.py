"""The loss right after compression, without training: every decomposition, budget, allocation and storage.

    python -m benchmarks.compression.loss run text --tasks trec mr --seeds 0 1 2    # loss-text.jsonl
    python -m benchmarks.compression.loss report text                               # loss-text.md and loss-text.png

The kinds are text, vision and language. A classifier is fine-tuned on its task first, to the epoch that has the least
loss on held-out training rows: far from a minimum, with a fresh head or when it has become too sure of itself,
truncation moves the loss to first order, and says little about the metric. A language model is compressed as
it was pretrained, calibrated on training rows of the text that it is scored on; its seed chooses these rows, and no
more. One calibration serves all decompositions. JACTUS is as it is by default; the peers are as published, so
without its correction of the bias, and with ranks of any number. A result that is there is not computed again.
"""

import copy
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import set_seed

from benchmarks.compare.adapting import rank_multiple
from benchmarks.compare.cases import RATIOS, SEEDS, STORAGES
from benchmarks.compare.training import make_trainer
from benchmarks.compression.loss_tables import ALLOCATIONS, DECOMPOSITIONS, results_of, write_report
from benchmarks.harness.arguments import add_data_dir, study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS
from benchmarks.tasks.loading import load_workload
from peft_jactus import JactusConfig, calibrate
from peft_jactus.numerics.allocation import allocate
from peft_jactus.numerics.factorization import layer_gains

TASKS = {
    "text": ("trec", "mr"),
    "vision": ("fashion_mnist", "flowers5"),
    "language": ("novels", "ptb", "wikitext2"),
}
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


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("kind", choices=list(TASKS))
    add_data_dir(parser)
    parser.add_argument("--tasks", nargs="+", help="default: two or three of the kind's")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows at most")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression", help="folder of the tables")
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

    def load(scored_on):
        return load_workload(args.kind, args.data_dir, task, num_rows=args.rows, scored_on=scored_on)

    scored = load("test")
    workload = scored if scored.head is None else load("held-out")
    model = pretrained(workload, seed)
    # Asks for all statistics that any of the decompositions needs.
    config = JactusConfig(
        task_type=workload.task_type,
        target_modules="all-linear",
        modules_to_save=workload.modules_to_save,
        decomposition="fwsvd",
        adaptation_rank=0,
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
        defaults = JactusConfig(decomposition=decomposition).factorization_options()
        options = defaults.decomposition
        gains, projected = {}, {}
        for name, layer in dense.items():
            statistics_of_layer = found[name] if options.needs_statistics else None
            gains[name], projected[name] = layer_gains(
                name, layer.weight, statistics_of_layer, options, centred=layer.bias is not None, adaptation_rank=0
            )
        for ratio, storage, allocation in itertools.product(RATIOS, STORAGES, ALLOCATIONS):
            allocated = allocate(
                gains,
                retained_ratio=ratio,
                strategy=allocation,
                storage=storage,
                rank_floor=defaults.rank_floor,
                rank_multiple=rank_multiple(decomposition),
                fixed_ranks={},
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


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    if args.command == "report":
        write_report(args.out, args.kind)
        return
    started_at = environment()  # the code that runs, whatever becomes of the files meanwhile
    table = results_of(args.out, args.kind)
    for seed, task in itertools.product(args.seeds, args.tasks or TASKS[args.kind]):
        case = {"task": task, "seed": seed, "num_rows": args.rows}
        if not table.contains(case):
            table.add({**case, "rows": measure(args, task, seed), "environment": started_at})


if __name__ == "__main__":
    main()
