"""Run cases, and add what comes out to the table."""

import functools
import itertools
import tempfile

from tqdm.auto import tqdm

from benchmarks.compare import training
from benchmarks.compare.cases import results_of
from benchmarks.harness.environment import environment
from benchmarks.tasks.loading import load_workload


def run(cases, args):
    """Run the cases of this process's part that the table does not have."""
    started_at = environment()  # the code that runs, whatever becomes of the files meanwhile
    load = functools.lru_cache(maxsize=1)(functools.partial(load_workload, args.kind, args.data_dir))
    table = results_of(args.out, args.kind)
    for case in tqdm(cases_of_part(cases, args), unit="case"):
        if table.contains(case.settings()):
            continue
        workload = load(case.task, num_rows=case.num_rows, scored_on=case.scored_on)
        with tempfile.TemporaryDirectory() as folder:
            figures = training.run(case, workload, folder)
        table.add({**case.settings(), **figures, "environment": started_at})
        score = figures.get("accuracy", figures["loss"])
        tqdm.write(f"{case.task} {case.label}, seed {case.seed}: {score:.4f} {figures['train_seconds']:.0f} s")


def cases_of_part(cases, args):
    """Return the cases of ``args.part``, grouped: a group has the same data, and often the same first stage."""
    part, parts = map(int, args.part.split("/"))
    groups = {}
    for case in cases:
        if args.methods is None or case.label in args.methods:
            groups.setdefault((case.seed, case.task), []).append(case)
    return list(itertools.chain.from_iterable(list(groups.values())[part::parts]))
