"""Every method beside every other: same data, batches, steps and head; one JSON a case.

    python benchmarks/compare.py learning-rates             # on held-out training rows; writes learning_rates.json
    python benchmarks/compare.py run                        # the table; --tasks, --methods, --seeds pick a part of it
    python benchmarks/compare.py run --part 0/2             # half of the cases, beside another process with --part 1/2
    python benchmarks/compare.py report                     # text.md and text.png

A case whose file exists is skipped, so that a run can be stopped, goes on where it was, and spreads over machines.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import _text
import transformers
from _cases import LEARNING_RATE_GRID, SEEDS, TEXT_TASKS, Case, budgets
from _environment import environment, write_result
from _tables import write_report
from tqdm.auto import tqdm

RESULTS = Path(__file__).parent / "results" / "text"
# Tasks that learning rates are chosen on, and rows that are trained on there.
LEARNING_RATE_TASKS = ("trec", "mr")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["learning-rates", "run", "report"])
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("JACTUS_DATA", "../shared/data"))
    parser.add_argument("--tasks", nargs="+", default=TEXT_TASKS)
    parser.add_argument("--methods", nargs="+", help="labels as in the table, for instance 'jactus pivoted 0.8'")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rows", type=int, default=2000, help="training rows at most")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--part", default="0/1", help="I/N: every N-th case, from the I-th")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def learning_rate_cases(args):
    for task in LEARNING_RATE_TASKS:
        for method, ratio, storage in budgets(ratios=(0.6,)):
            for rate in LEARNING_RATE_GRID.get(method, LEARNING_RATE_GRID["default"]):
                yield Case(task, method, ratio, storage, 0, rate, args.rows, args.epochs, "held-out")


def table_cases(args):
    rates = json.loads((args.out / "learning_rates.json").read_text())["learning_rates"]
    for seed in args.seeds:
        for task in args.tasks:
            for method, ratio, storage in budgets():
                yield Case(task, method, ratio, storage, seed, rates[method], args.rows, args.epochs)


def run(cases, args):
    part, parts = map(int, args.part.split("/"))
    cases = [case for case in cases if args.methods is None or case.label in args.methods]
    for case in tqdm(cases[part::parts], unit="case"):
        path = case.path(args.out)
        if path.exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures = _text.run(case, args.data_dir, folder)
        write_result(path, {**case.settings(), **figures, "environment": environment()})
        tqdm.write(f"{path.name} {figures['accuracy']:.4f} {figures['train_seconds']:.0f} s")


def choose_learning_rates(args):
    """Write the best rate of each method: the mean over tasks of the accuracy on held-out training rows."""
    scores = {}
    for case in learning_rate_cases(args):
        result = json.loads(case.path(args.out).read_text())
        scores.setdefault(case.method, {}).setdefault(case.learning_rate, []).append(result["accuracy"])
    means = {m: {rate: statistics.mean(found) for rate, found in by.items()} for m, by in scores.items()}
    chosen = {method: max(by, key=by.get) for method, by in means.items()}
    result = {"learning_rates": chosen, "mean_accuracy": means, "tasks": LEARNING_RATE_TASKS}
    write_result(args.out / "learning_rates.json", result | {"environment": environment()})
    print(json.dumps(chosen, indent=1))


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    if args.command == "learning-rates":
        run(learning_rate_cases(args), args)
        if args.part == "0/1":
            choose_learning_rates(args)
    elif args.command == "run":
        run(list(table_cases(args)), args)
    else:
        write_report(args.out)


if __name__ == "__main__":
    main()
