"""Time and peak memory of calibration, compression and a training step against the depth and the width of a model.

    python -m benchmarks.cost.scale
    python -m benchmarks.cost.scale --report    # scale.md from scale.json: tables, and the way to larger models

Llamas of random weights, in a fresh process each. Memory: the peak of the process, less what it holds once the model
is loaded (weights and libraries). Depth: without a limit on the statistics, and with one and checkpointed activations,
as is meant for models that do not fit. Width: two blocks, no limit; the exponents are those of time against width,
between neighbours.

Activations of models this small are below the size from which glibc gives freed memory back at once; it keeps several
times what is in use. Those of larger models are above. So that the small ones tell of these, freed memory goes back
from `MMAP_THRESHOLD` bytes on here, against depth.
"""

import itertools
import json
import math
import os
import time
from pathlib import Path

from benchmarks.cost.scale_tables import write_report
from benchmarks.harness.arguments import study_parser
from benchmarks.harness.memory import peak_mib, reset_peak, resident_mib
from benchmarks.harness.processes import run_fresh
from benchmarks.harness.records import RESULTS, write_document

NUM_BATCHES = 4
VOCABULARY = 1000
MMAP_THRESHOLD = 2**16


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 24], help="blocks")
    parser.add_argument("--width", type=int, default=512, help="of those")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024], help="of two blocks")
    parser.add_argument("--limit", default="64MiB", help="`max_statistics_memory` of the limited runs")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS / "cost" / "scale.json")
    parser.add_argument("--report", action="store_true", help="from the result file alone")
    parser.add_argument("--measure", type=json.loads, help="used internally")
    return parser.parse_args()


def measured(step):
    """Run ``step``; return its result, the peak meanwhile in MiB, and the seconds."""
    reset_peak()
    started = time.perf_counter()
    result = step()
    return result, peak_mib(), time.perf_counter() - started


def measure(args, depth, width, limit):
    """Return the row of one model."""
    import torch
    from peft import get_peft_model

    from peft_jactus import JactusConfig, calibrate

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (NUM_BATCHES, args.batch_size, args.length))
    batches = [{"input_ids": batch, "labels": batch} for batch in ids]
    # What the first use of a library allocates is not counted; of a small model, since freed memory would be, too.
    random_llama(64, 1)(**batches[0]).loss.backward()
    model = random_llama(width, depth)
    if limit is not None:
        model.activation_checkpointing_enable()
    jactus = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    loaded = resident_mib()
    _, calibrating, calibration_seconds = measured(
        lambda: calibrate(model, jactus, batches, max_statistics_memory=limit, progress_bar=False)
    )
    dense_seconds = forward_seconds(model, batches)
    model, compressing, compression_seconds = measured(lambda: get_peft_model(model, jactus))
    training_mib, step_seconds = train_steps(model, batches)
    return {
        "depth": depth,
        "width": width,
        "limit": limit,
        "loaded_mib": loaded,
        "calibration_mib": calibrating - loaded,
        "compression_mib": compressing - loaded,
        "training_mib": training_mib,
        "calibration_seconds": calibration_seconds,
        "compression_seconds": compression_seconds,
        "step_seconds": step_seconds,
        "forward_seconds": forward_seconds(model, batches),
        "dense_forward_seconds": dense_seconds,
    }


def random_llama(width, depth):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
    )
    return LlamaForCausalLM(config)


def train_steps(model, batches):
    """Return memory beyond what is there after a first pass over the batches, and the time of a step."""
    import torch

    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def train():
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train()
    before = resident_mib()
    _, peak, seconds = measured(train)
    return peak - before, seconds / len(batches)


def forward_seconds(model, batches):
    """Return the least time of a forward pass without gradients."""
    import torch

    seconds = []
    with torch.no_grad():
        for batch in batches:
            started = time.perf_counter()
            model(**batch)
            seconds.append(time.perf_counter() - started)
    return min(seconds)


def exponents(rows):
    """Return the growth of each time against the width, between neighbours."""
    names = [name for name in rows[0] if name.endswith("_seconds")]
    return {
        name: [
            math.log(wide[name] / narrow[name]) / math.log(wide["width"] / narrow["width"])
            for narrow, wide in itertools.pairwise(rows)
        ]
        for name in names
    }


def settings_of(args):
    """Return what is measured against depth, and what against width."""
    by_depth = [
        {"depth": depth, "width": args.width, "limit": limit} for limit in (args.limit, None) for depth in args.depths
    ]
    return by_depth, [{"depth": 2, "width": width, "limit": None} for width in args.widths]


def run_measure(args, setting, environ):
    """Measure one model in a process of its own; return its row."""
    options = ["--batch-size", args.batch_size, "--length", args.length, "--measure", json.dumps(setting)]
    row = run_fresh(__spec__.name, *options, env=environ)
    print({name: round(value) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    return row


def main():
    args = parse_arguments()
    if args.measure:
        print(json.dumps(measure(args, **args.measure)))
        return
    if args.report:
        write_report(args.out)
        return
    from benchmarks.harness.environment import environment

    about_depth, about_width = settings_of(args)
    gives_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)}
    by_depth = [run_measure(args, setting, gives_back) for setting in about_depth]
    by_width = [run_measure(args, setting, dict(os.environ)) for setting in about_width]
    result = {
        "batch_size": args.batch_size,
        "length": args.length,
        "num_batches": NUM_BATCHES,
        "mmap_threshold": MMAP_THRESHOLD,
        "by_depth": by_depth,
        "by_width": by_width,
        "exponents": exponents(by_width),
        "environment": environment(),
    }
    write_document(args.out, result)
    write_report(args.out)


if __name__ == "__main__":
    main()
