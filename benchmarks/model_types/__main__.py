"""Every model type that transformers knows, tiny and random: compressed, exported, loaded again.

    python -m benchmarks.model_types run                 # all of them; an hour
    python -m benchmarks.model_types run --types bert t5
    python -m benchmarks.model_types report              # docs/models.md, from what `run` wrote

Each type is calibrated (by its own loss, or by the mean square of its outputs), compressed to half of its linear
layers, trained for a step, exported in both storages, and loaded by its Auto class. No tensor may be missing, new or
another, and the outputs must be those of the exported model; else, or if the checkpoint does not load, the command
ends with exit code 1. A type that is in the table is skipped: stop a run and start it again, and it goes on where it
was. To measure a type again, delete its line.
"""

import sys
from pathlib import Path

import tqdm

from benchmarks.harness.arguments import study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, Table
from benchmarks.model_types.cases import UNSOUND
from benchmarks.model_types.classes import model_types
from benchmarks.model_types.tables import summary, write_report
from benchmarks.model_types.workers import measured

KEY = ("type",)


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--types", nargs="+", help="default: all")
    parser.add_argument("--seconds", type=float, default=60, help="the most that one type may take, of CPU time")
    parser.add_argument("--out", type=Path, default=RESULTS / "model_types", help="folder of the table")
    return parser.parse_args()


def run(types, table, seconds):
    """Measure the types that are not in the table."""
    started_at = environment()
    done = {record["type"] for record in table.read()}
    tqdm.tqdm.monitor_interval = 0  # its thread would be forked
    for model_type in tqdm.tqdm([each for each in types if each not in done], unit="type"):
        record = measured(model_type, seconds=seconds)
        table.add({**record, "environment": started_at})
        if record["outcome"] in UNSOUND:
            tqdm.tqdm.write(f"{model_type}: {record['outcome']}, {record['stage']}: {record['reason']}")


def main():
    args = parse_arguments()
    known = model_types()
    unknown = sorted(set(args.types or ()) - set(known))
    if unknown:
        sys.exit(f"transformers knows no model types {unknown}.")
    types = args.types or known
    table = Table(args.out / "model_types.jsonl", KEY)
    if args.command == "report":
        write_report(table.read())
        return
    run(types, table, args.seconds)
    records = [record for record in table.read() if record["type"] in set(types)]
    print(summary(records))
    if any(record["outcome"] in UNSOUND for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
