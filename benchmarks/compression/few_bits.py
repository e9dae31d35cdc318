"""Low rank and few bits: what a model loses in 8 and 4 bits a number, dense and compressed, and how small it gets.

    python -m benchmarks.compression.few_bits run text --task trec --seeds 0 1 2 --rows 1000
    JACTUS_LLAMA=outputs/smollm2 python -m benchmarks.compression.few_bits run language --task wikitext2 \\
        --calibration-rows 48 --test-rows 8
    python -m benchmarks.compression.few_bits report

A classifier is trained: whole for the dense rows, in one pass with JACTUS for the others, at the comparison's
learning rates. A language model is compressed as it was pretrained. Dense weights have the same groups, levels and
rounding with feedback as the package's own, so that the rank alone makes the difference. Sizes are those of the
targeted layers.
"""

import copy
import itertools
import math
import statistics
import tempfile

import torch
from peft import get_peft_model

from benchmarks.compare.cases import EPOCHS, EPOCHS_BY_TASK, Case, learning_rate_group
from benchmarks.compare.learning_rates import load_learning_rates
from benchmarks.compare.training import trained
from benchmarks.compression.bits import bits_parser, calibration, model_name, parse, table_of, test_rows
from benchmarks.compression.checkpoint import logits_and_labels, tensor_bytes
from benchmarks.compression.loss import ROWS, Scorer, pretrained
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS
from benchmarks.harness.reporting import markdown_table, mean_and_spread, write_markdown
from benchmarks.tasks.loading import load_workload
from peft_jactus import JactusConfig
from peft_jactus.deployment.export import compressed_copy
from peft_jactus.deployment.quantization import quantized_layer

BITS = (32, 16, 8, 4)


def parse_arguments():
    parser = bits_parser(__doc__, "few_bits", ratios=[0.8, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of a classifier at most")
    return parse(parser)


# -- forms ------------------------------------------------------------------------------------------------


def options_of(bits):
    """Return dtype and bits as `export_compressed` takes them."""
    return {"dtype": torch.float32 if bits == 32 else torch.bfloat16, "bits": bits if bits < 16 else None}


def dense_form(model, found, bits):
    """Return a dense model, its targeted weights in some bits, rounded as the package rounds its own."""
    options = options_of(bits)
    form = copy.deepcopy(model).to(options["dtype"])
    if options["bits"] is not None:
        for name in found:
            layer = quantized_layer(
                copy.deepcopy(model.get_submodule(name)).float(),
                bits,
                dtype=options["dtype"],
                second_moment=found[name].input.covariance,
            )
            form.set_submodule(name, layer)
    return form.eval()


def forms(dense, compressed, found):
    """Yield (name, bits, model): dense, and from models with an adapter, by ratio."""
    for bits in BITS:
        yield "dense", bits, dense_form(dense, found, bits)
    for ratio, model in compressed.items():
        for bits in BITS:
            options = options_of(bits)
            known = found if options["bits"] else None
            yield f"jactus {ratio:g}", bits, compressed_copy(model, statistics=known, **options).eval()


def targeted_mb(model, names):
    layers = [model.get_submodule(name) for name in names]
    return tensor_bytes(t for layer in layers for n, t in layer.state_dict().items() if not n.endswith("bias")) / 1e6


# -- measuring --------------------------------------------------------------------------------------------


def trained_classifiers(args, seed):
    """Return a model fine-tuned whole, those of one pass by ratio, and what scores them."""
    rates = load_learning_rates(RESULTS / "compare", "text")[learning_rate_group("text", args.task)]
    workload = load_workload("text", args.data_dir, args.task, num_rows=args.rows, scored_on="test")

    def train(method, ratio):
        storage = "factored" if ratio == 1 else "pivoted"
        epochs = EPOCHS_BY_TASK.get(args.task, EPOCHS)
        rate = rates[method] if method in rates else rates[f"{method} {storage} {ratio:g}"]
        case = Case(args.task, method, ratio, storage, seed, rate, args.rows, epochs)
        with tempfile.TemporaryDirectory() as folder:
            return trained(case, workload, folder)[0].eval()

    dense = train("full", 1.0)
    found = calibration(copy.deepcopy(dense), workload, args.calibration_rows)

    def score(model):
        logits, labels = logits_and_labels(model, workload.test, workload.collator)
        return {"accuracy": float((logits.argmax(-1) == labels).float().mean())}

    return dense, {ratio: train("jactus", ratio) for ratio in args.retained_ratio}, found, score


def compressed_language_models(args, seed):
    """Return a language model, it compressed by ratio, and what scores them."""
    workload = load_workload("language", args.data_dir, args.task, num_rows=ROWS, scored_on="test")
    dense = pretrained(workload, seed)
    found = calibration(dense, workload, args.calibration_rows)
    scorer = Scorer(dense, test_rows(args, workload), workload.collator)

    def score(model):
        figures = scorer.score(model)
        return {"perplexity": math.exp(figures["loss"]), "divergence": figures["divergence"]}

    compressed = {}
    for ratio in args.retained_ratio:
        config = JactusConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=ratio, adaptation_rank=0
        )
        config.statistics = found
        compressed[ratio] = get_peft_model(copy.deepcopy(dense), config).eval()
    return dense, compressed, found, score


def run(args, seed):
    made = trained_classifiers(args, seed) if args.kind == "text" else compressed_language_models(args, seed)
    dense, compressed, found, score = made
    rows = []
    for name, bits, model in forms(dense, compressed, found):
        rows.append({"form": name, "bits": bits, "targeted_mb": targeted_mb(model, found), **score(model)})
        print(rows[-1], flush=True)
    return rows


def report(table):
    lines, cells = [], {}
    for record in table.read():
        for row in record["rows"]:
            cells.setdefault((record["model"], record["task"], row["form"], row["bits"]), []).append(row)
    for (model, task, form, bits), rows in cells.items():
        scores = [name for name in ("accuracy", "perplexity", "divergence") if name in rows[0]]
        values = {
            "accuracy": lambda row: 100 * row["accuracy"],
            "perplexity": lambda row: row["perplexity"],
            "divergence": lambda row: 1e3 * row["divergence"],
        }
        shown = [mean_and_spread([values[name](row) for row in rows], ".1f") for name in scores]
        size = statistics.mean(row["targeted_mb"] for row in rows)
        lines.append([model, task, form, str(bits), f"{size:.2f}", *itertools.islice([*shown, "", ""], 2)])
    head = ["model", "task", "form", "bits", "MB of targeted layers", "accuracy, % or perplexity", "KL, 1e-3"]
    write_markdown(table.path.with_suffix(".md"), markdown_table(head, lines))


def main():
    args = parse_arguments()
    table = table_of(args)
    if args.command == "report":
        report(table)
        return
    for seed in args.seeds:
        case = {"model": model_name(args.kind), "task": args.task, "seed": seed}
        if not table.contains(case):
            started_at = environment()
            settings = {name: getattr(args, name) for name in ("rows", "calibration_rows", "test_rows")}
            table.add({**case, **settings, "rows": run(args, seed), "environment": started_at})


if __name__ == "__main__":
    main()
