"""The learning rate of each method: the best of its grid, on held-out training rows, for each group of like tasks."""

import itertools
import json
import statistics

from benchmarks.compare.cases import (
    EPOCHS,
    EPOCHS_BY_TASK,
    LEARNING_RATE_GROUPS,
    SAME_LEARNING_RATE,
    Case,
    budgets,
    first_stage,
    grid,
    results_of,
)
from benchmarks.compare.running import run
from benchmarks.harness.environment import environment
from benchmarks.harness.records import write_document

# Whose best rate the other ratios get.
GRID_RATIO = 0.6


def file_of_rates(folder, kind):
    return folder / f"{kind}-learning_rates.json"


def load_learning_rates(folder, kind):
    """Return {group: {method: its rate}}, also of methods that have another's."""
    path = file_of_rates(folder, kind)
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `python -m benchmarks.compare learning-rates {kind}` first.")
    by_group = json.loads(path.read_text())["learning_rates"]
    for rates in by_group.values():
        rates |= {method: rates[other] for method, other in SAME_LEARNING_RATE.items() if other in rates}
    return by_group


def grid_labels(kind):
    """Return the labels of all methods that have a grid."""
    grids = [Case("", *budget) for budget in budgets(kind, ratios=(GRID_RATIO,))]
    return [case.label for case in grids if case.method not in SAME_LEARNING_RATE]


def learning_rate_cases(args, group, rates):
    """Yield the grid of each method on a group's tasks, around the rate that it has in ``rates``, the best so far.

    One with a first stage waits until ``rates`` has the rate of that stage.
    """
    for method, ratio, storage in budgets(args.kind, ratios=(GRID_RATIO,)):
        first = first_stage(method)
        if method in SAME_LEARNING_RATE or (first is not None and first not in rates):
            continue
        for task, rate in itertools.product(group.tasks, grid(args.kind, method, rates.get(method))):
            yield Case(
                task,
                method,
                ratio,
                storage,
                learning_rate=rate,
                num_rows=group.num_rows,
                epochs=EPOCHS_BY_TASK.get(task, EPOCHS),
                scored_on="held-out",
                first_learning_rate=rates.get(first),
            )


def mean_scores(args, group, rates):
    """Return {method: {learning rate: mean over tasks}} of the accuracy, or negative loss, on held-out training rows.

    A method whose grid (see `learning_rate_cases`) is not complete is left out, with a message.
    """
    scores, incomplete = {}, set()
    table = results_of(args.out, args.kind)
    for case in learning_rate_cases(args, group, rates):
        result = table.find(case.settings())
        if result is not None:
            score = result.get("accuracy", -result["loss"])
            scores.setdefault(case.method, {}).setdefault(case.learning_rate, []).append(score)
        else:
            incomplete.add(case.method)
    if incomplete:
        print(f"Grid on {', '.join(group.tasks)} not complete, left out: {', '.join(sorted(incomplete))}.")
    return {
        method: {rate: statistics.mean(found) for rate, found in by_rate.items()}
        for method, by_rate in scores.items()
        if method not in incomplete
    }


def choose_in_group(args, group):
    """Run the grids until no method's best rate is at the end of its grid; return the best rates, and all means."""
    best, previous = {}, None  # also of methods whose grid is not complete, which `args.methods` may leave so
    while best != previous:  # methods with a first stage join in the second round
        previous = dict(best)
        run(
            (case for case in learning_rate_cases(args, group, best) if case.task in (args.tasks or group.tasks)),
            args,
        )
        means = mean_scores(args, group, best)
        rates = {method: max(by_rate, key=by_rate.get) for method, by_rate in means.items()}
        best |= rates
    return rates, means


def choose_learning_rates(args):
    """Choose the rates of each group of tasks; write and return them."""
    groups = LEARNING_RATE_GROUPS[args.kind]
    chosen = {name: choose_in_group(args, group) for name, group in groups.items()}
    rates = {name: best for name, (best, _) in chosen.items()}
    result = {
        "learning_rates": rates,
        "mean_score": {name: means for name, (_, means) in chosen.items()},
        "tasks": {name: group.tasks for name, group in groups.items()},
    }
    write_document(file_of_rates(args.out, args.kind), result | {"environment": environment()})
    return rates
