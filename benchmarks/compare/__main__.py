"""Every method beside every other: same data, batches, steps and head; one line of the table a case.

    python -m benchmarks.compare learning-rates text    # on held-out training rows; writes text-learning_rates.json
    python -m benchmarks.compare run text               # text.jsonl; --tasks, --methods, --seeds pick a part of it
    python -m benchmarks.compare run text --part 0/2    # half of it, beside another process with --part 1/2
    python -m benchmarks.compare report text            # text.md and text.png

The kinds are text, vision and language. A case that is in the table is skipped: stop a run and start it again, and it
goes on where it was.
"""

import itertools
import json
from pathlib import Path

import transformers
from datasets import disable_progress_bars

from benchmarks.compare.cases import (
    EPOCHS,
    EPOCHS_BY_TASK,
    ROWS,
    SEEDS,
    TASKS,
    Case,
    budgets,
    first_stage,
    learning_rate_group,
)
from benchmarks.compare.learning_rates import choose_learning_rates, grid_labels, load_learning_rates
from benchmarks.compare.running import run
from benchmarks.compare.tables import write_report
from benchmarks.harness.arguments import add_data_dir, study_parser
from benchmarks.harness.records import RESULTS


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("command", choices=["learning-rates", "run", "report"])
    parser.add_argument("kind", choices=list(TASKS))
    add_data_dir(parser)
    parser.add_argument("--tasks", nargs="+", help="default: all")
    parser.add_argument("--methods", nargs="+", help="labels as in the table, for instance 'svd-llm+lora 0.4'")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rows", type=int, help="training rows of the table, at most")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th pair of task and seed, from the I-th")
    parser.add_argument("--out", type=Path, default=RESULTS / "compare", help="folder of the tables")
    return parser.parse_args()


def table_cases(args):
    by_group = load_learning_rates(args.out, args.kind)
    for group, rates in by_group.items():
        without = sorted({method for method, *_ in budgets(args.kind)} - set(rates))
        if without:
            print(f"No learning rate yet on {group}, left out there: {', '.join(without)}.")
    for seed, task in itertools.product(args.seeds, args.tasks or TASKS[args.kind]):
        rates = by_group[learning_rate_group(args.kind, task)]
        for method, ratio, storage in budgets(args.kind):
            if method not in rates:
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


def check_methods(asked, labels):
    """Exit with a message if ``--methods`` has one that there is not."""
    unknown = [method for method in asked or () if method not in labels]
    if unknown:
        raise SystemExit(f"--methods: there is no {', '.join(unknown)}, but {', '.join(labels)}.")


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    if args.command == "learning-rates":
        check_methods(args.methods, grid_labels(args.kind))
        print(json.dumps(choose_learning_rates(args), indent=1))
    elif args.command == "run":
        cases = list(table_cases(args))
        check_methods(args.methods, dict.fromkeys(case.label for case in cases))
        run(cases, args)
    else:
        write_report(args.out, args.kind)


if __name__ == "__main__":
    main()
