"""Every method beside every other: same data, batches, steps and head; one JSON a case.

    python benchmarks/compare.py learning-rates text        # on held-out training rows; writes learning_rates.json
    python benchmarks/compare.py run text                   # the table; --tasks, --methods, --seeds pick a part of it
    python benchmarks/compare.py run text --part 0/2        # half of it, beside another process with --part 1/2
    python benchmarks/compare.py report text                # text.md and text.png

The kinds are text, vision and language. A case whose file exists is skipped, so that a run can be stopped, goes on
where it was, and spreads over machines.
"""

import argparse
import functools
import importlib
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path

import transformers
from _cases import (
    EPOCHS,
    EPOCHS_BY_TASK,
    LEARNING_RATE_ROWS,
    LEARNING_RATE_TASKS,
    ROWS,
    SEEDS,
    TASKS,
    Case,
    budgets,
    first_stage,
    grid,
)
from _environment import environment, write_result
from _tables import write_report
from _training import run as run_case
from datasets import disable_progress_bars
from tqdm.auto import tqdm

RESULTS = Path(__file__).parent / "results"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["learning-rates", "run", "report"])
    parser.add_argument("kind", choices=list(TASKS))
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("JACTUS_DATA", "../shared/data"))
    parser.add_argument("--tasks", nargs="+", help="default: all")
    parser.add_argument("--methods", nargs="+", help="labels as in the table, for instance 'svd-llm+lora 0.4'")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rows", type=int, help="training rows of the table, at most")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th pair of task and seed, from the I-th")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder for each kind is made in it")
    return parser.parse_args()


def learning_rate_cases(args, tasks, rates):
    """Yield the grid of each method, around the rate that it has in ``rates``, the best so far.

    One with a first stage waits until ``rates`` has the rate of that stage.
    """
    for method, ratio, storage in budgets(args.kind, ratios=(0.6,), storages=("pivoted",)):
        first = first_stage(method)
        if first is not None and first not in rates:
            continue
        for task, rate in itertools.product(tasks, grid(args.kind, method, rates.get(method))):
            yield Case(
                task,
                method,
                ratio,
                storage,
                learning_rate=rate,
                num_rows=LEARNING_RATE_ROWS[args.kind],
                epochs=EPOCHS_BY_TASK.get(task, EPOCHS),
                scored_on="held-out",
                first_learning_rate=rates.get(first),
            )


def table_cases(args):
    path = args.out / args.kind / "learning_rates.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `compare.py learning-rates {args.kind}` first.")
    rates = json.loads(path.read_text())["learning_rates"]
    without = sorted({method for method, *_ in budgets(args.kind)} - set(rates))
    if without:
        print(f"No learning rate yet, left out: {', '.join(without)}.")
    for seed, task in itertools.product(args.seeds, args.tasks or TASKS[args.kind]):
        for method, ratio, storage in budgets(args.kind):
            if method in without:
                continue
            yield Case(
                task,
                method,
                ratio,
                storage,
                seed,
                rates[method],
                args.rows or ROWS[args.kind],
                EPOCHS_BY_TASK.get(task, EPOCHS),
                first_learning_rate=rates.get(first_stage(method)),
            )


def run(cases, args):
    started_at = environment()  # the code that runs, whatever becomes of the files meanwhile
    part, parts = map(int, args.part.split("/"))
    groups = {}  # the cases of a group start from the same data, and many from the same first stage
    for case in cases:
        if args.methods is None or case.label in args.methods:
            groups.setdefault((case.seed, case.task), []).append(case)
    cases = list(itertools.chain.from_iterable(list(groups.values())[part::parts]))
    module = importlib.import_module(f"_{args.kind}")
    load_workload = functools.lru_cache(maxsize=1)(functools.partial(module.load_workload, args.data_dir))
    for case in tqdm(cases, unit="case"):
        path = case.path(args.out / args.kind)
        if path.exists():
            continue
        workload = load_workload(case.task, num_rows=case.num_rows, scored_on=case.scored_on)
        with tempfile.TemporaryDirectory() as folder:
            figures = run_case(case, workload, folder)
        write_result(path, {**case.settings(), **figures, "environment": started_at})
        score = figures.get("accuracy", figures["loss"])
        tqdm.write(f"{path.name} {score:.4f} {figures['train_seconds']:.0f} s")


def mean_scores(args, rates):
    """Return {method: {learning rate: mean over tasks}} of the accuracy, or negative loss, on held-out training rows.

    A method whose grid (see `learning_rate_cases`) is not complete is left out, with a message.
    """
    scores, incomplete = {}, set()
    for case in learning_rate_cases(args, LEARNING_RATE_TASKS[args.kind], rates):
        path = case.path(args.out / args.kind)
        if path.exists():
            result = json.loads(path.read_text())
            score = result.get("accuracy", -result["loss"])
            scores.setdefault(case.method, {}).setdefault(case.learning_rate, []).append(score)
        else:
            incomplete.add(case.method)
    if incomplete:
        print(f"Grid not complete, left out: {', '.join(sorted(incomplete))}.")
    return {
        method: {rate: statistics.mean(found) for rate, found in by_rate.items()}
        for method, by_rate in scores.items()
        if method not in incomplete
    }


def choose_learning_rates(args):
    """Run the grids until no method's best rate is at the end of its grid; write and return the best rates."""
    rates, previous = {}, None
    while rates != previous:  # methods with a first stage join in the second round
        previous = rates
        run(learning_rate_cases(args, args.tasks or LEARNING_RATE_TASKS[args.kind], rates), args)
        means = mean_scores(args, rates)
        rates = {method: max(by_rate, key=by_rate.get) for method, by_rate in means.items()}
    result = {"learning_rates": rates, "mean_score": means, "tasks": LEARNING_RATE_TASKS[args.kind]}
    write_result(args.out / args.kind / "learning_rates.json", result | {"environment": environment()})
    return rates


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    if args.command == "learning-rates":
        print(json.dumps(choose_learning_rates(args), indent=1))
    elif args.command == "run":
        cases = list(table_cases(args))
        labels = dict.fromkeys(case.label for case in cases)
        unknown = [method for method in args.methods or () if method not in labels]
        if unknown:
            raise SystemExit(f"--methods: there is no {', '.join(unknown)}, but {', '.join(labels)}.")
        run(cases, args)
    else:
        write_report(args.out / args.kind)


if __name__ == "__main__":
    main()
