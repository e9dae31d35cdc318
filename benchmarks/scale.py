"""Time and peak memory of calibration, compression and a training step against the depth and the width of a model.

    python benchmarks/scale.py

Llamas of random weights, in a fresh process each. Memory: the peak of the process, less what it holds once the model
is loaded (weights and libraries). Depth: with and without a limit on the statistics; the width is such that six blocks
already fill the gibibyte that the choice of ranks may keep for the factorization. Width: two blocks, no limit; the
exponents are those of time against width, between neighbours.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from _memory import peak_mib, reset_peak, resident_mib

RESULTS = Path(__file__).parent / "results" / "scale.json"
NUM_BATCHES = 4
VOCABULARY = 1000


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 24], help="blocks")
    parser.add_argument("--width", type=int, default=768, help="of those")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048], help="of two blocks")
    parser.add_argument("--limit", default="64MiB", help="`max_statistics_memory` of the limited runs")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=json.loads, help="used internally")
    return parser.parse_args()


def measured(step):
    """Run ``step``; return its result, the peak meanwhile in MiB, and the seconds."""
    reset_peak()
    started = time.perf_counter()
    result = step()
    return result, peak_mib(), time.perf_counter() - started


def measure(args, depth, width, limit):
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_jactus import JactusConfig, calibrate

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(VOCABULARY, (NUM_BATCHES, args.batch_size, args.length))
    batches = [{"input_ids": batch, "labels": batch} for batch in ids]
    model(**batches[0]).loss.backward()  # what the first use of a library allocates is not counted
    model.zero_grad()
    jactus = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    loaded = resident_mib()
    _, calibrating, calibration_seconds = measured(
        lambda: calibrate(model, jactus, batches, max_statistics_memory=limit, progress_bar=False)
    )
    dense_seconds = forward_seconds(model, batches)
    model, compressing, compression_seconds = measured(lambda: get_peft_model(model, jactus))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def train():
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train()
    before = resident_mib()
    _, training, training_seconds = measured(train)
    return {
        "depth": depth,
        "width": width,
        "limit": limit,
        "loaded_mib": loaded,
        "calibration_mib": calibrating - loaded,
        "compression_mib": compressing - loaded,
        "training_mib": training - before,
        "calibration_seconds": calibration_seconds,
        "compression_seconds": compression_seconds,
        "step_seconds": training_seconds / NUM_BATCHES,
        "forward_seconds": forward_seconds(model, batches),
        "dense_forward_seconds": dense_seconds,
    }


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


def main():
    args = parse_arguments()
    if args.measure:
        print(json.dumps(measure(args, **args.measure)))
        return
    from _environment import environment, write_result

    rows = []
    settings = [
        *(
            {"depth": depth, "width": args.width, "limit": limit}
            for limit in (args.limit, None)
            for depth in args.depths
        ),
        *({"depth": 2, "width": width, "limit": None} for width in args.widths),
    ]
    for setting in settings:
        command = [sys.executable, *sys.argv, "--measure", json.dumps(setting)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(
            {name: round(value) if isinstance(value, float) else value for name, value in rows[-1].items()}, flush=True
        )
    by_depth, by_width = rows[: 2 * len(args.depths)], rows[2 * len(args.depths) :]
    result = {"batch_size": args.batch_size, "length": args.length, "num_batches": NUM_BATCHES}
    result |= {"by_depth": by_depth, "by_width": by_width, "exponents": exponents(by_width)}
    write_result(args.out, {**result, "environment": environment()})


if __name__ == "__main__":
    main()
