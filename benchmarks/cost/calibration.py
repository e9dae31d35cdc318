"""What calibration takes: without and with sketches of the weight's gradient, over a forward and a backward pass.

    python -m benchmarks.cost.calibration        # results/cost/calibration.json, .md; alone on the machine

"pass" is what calibration can't do without: the model forward, and back to its activations. The kinds take turns, on
the same random batches; a ratio is the median over rounds.
"""

import itertools
import statistics
import time
from argparse import Namespace
from pathlib import Path

import torch

from benchmarks.cost.training_step import batches, load_model, task_type
from benchmarks.harness.arguments import study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, write_document
from benchmarks.harness.reporting import markdown_table, write_markdown
from peft_jactus import JactusConfig, calibrate

# Adaptation ranks, and so directions of the sketch; with none, there is no sketch.
RANKS = (0, 16, 32)
# As a training step's: models and batches of one shape.
SUBJECTS = {
    "MiniLM": Namespace(width=None, batch_size=32, length=128, dtype="float32"),
    "a block of a Llama, width 2,048": Namespace(width=2048, blocks=1, batch_size=4, length=256, dtype="float32"),
}


def run_pass(model, data):
    """Run the model forward and back, with gradients of activations only."""
    embeddings = model.get_input_embeddings()
    for batch in data:
        inputs = embeddings(batch["input_ids"]).detach().requires_grad_(True)
        others = {name: value for name, value in batch.items() if name != "input_ids"}
        model(inputs_embeds=inputs, **others).loss.backward()


def measure(subject, args):
    """Return the seconds of a batch, by kind and round; the first round only warms up."""
    shape = SUBJECTS[subject]
    model, data = load_model(shape).requires_grad_(False).eval(), list(batches(shape, args.batches))
    kinds = {"pass": lambda: run_pass(model, data)}
    for rank in RANKS:
        config = JactusConfig(
            task_type=task_type(shape),
            target_modules="all-linear",
            adaptation_rank=rank,
            train_core=not rank,
        )
        kinds[f"{rank} ranks"] = lambda config=config: calibrate(model, config, data, progress_bar=False)
    seconds = {kind: [] for kind in kinds}
    for _, (kind, call) in itertools.product(range(1 + args.rounds), kinds.items()):
        started = time.perf_counter()
        call()
        seconds[kind].append((time.perf_counter() - started) / args.batches)
    return {kind: found[1:] for kind, found in seconds.items()}


def rows_of(subject, seconds):
    for kind, found in seconds.items():
        over_none, over_pass = (
            [own / other for own, other in zip(found, seconds[reference], strict=True)]
            for reference in ("0 ranks", "pass")
        )
        yield {
            "model": subject,
            "kind": kind,
            "seconds_a_batch": statistics.median(found),
            "over_none": statistics.median(over_none),
            "over_none_quartiles": statistics.quantiles(over_none, n=4)[::2],
            "over_pass": statistics.median(over_pass),
        }


def main():
    parser = study_parser(__doc__)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "cost" / "calibration.json")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2.")
    torch.set_num_threads(1)
    started_at = environment()
    rows = [row for subject in SUBJECTS for row in rows_of(subject, measure(subject, args))]
    settings = {"batches": args.batches, "rounds": args.rounds}
    write_document(args.out, {**settings, "rows": rows, "environment": started_at})
    lines = [
        [row["model"], row["kind"], f"{row['over_none']:.2f}", f"{row['over_pass']:.2f}"]
        for row in rows
        if row["kind"] != "pass"
    ]
    head = ["model", "adaptation ranks", "over calibration without sketches", "over a forward and a backward pass"]
    write_markdown(args.out.with_suffix(".md"), markdown_table(head, lines))


if __name__ == "__main__":
    main()
