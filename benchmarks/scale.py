"""Peak memory of calibration and compression against the depth of a model, with and without a memory limit.

    python benchmarks/scale.py

A Llama of random weights for each depth, in a fresh process each: the peak of the process, less what it holds once the
model is loaded (weights and libraries), while `calibrate` runs, and while `get_peft_model` does. The width is such
that six blocks already fill the gibibyte that the choice of ranks may keep for the factorization.
"""

import argparse
import itertools
import json
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
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=2048)
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


def measure(args, depth, limit):
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_jactus import JactusConfig, calibrate

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=args.intermediate,
        num_hidden_layers=depth,
        num_attention_heads=args.width // 64,
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
    _, compressing, compression_seconds = measured(lambda: get_peft_model(model, jactus))
    return {
        "depth": depth,
        "limit": limit,
        "loaded_mib": loaded,
        "calibration_mib": calibrating - loaded,
        "compression_mib": compressing - loaded,
        "calibration_seconds": calibration_seconds,
        "compression_seconds": compression_seconds,
    }


def main():
    args = parse_arguments()
    if args.measure:
        print(json.dumps(measure(args, **args.measure)))
        return
    from _environment import environment, write_result

    rows = []
    for limit, depth in itertools.product((args.limit, None), args.depths):
        command = [sys.executable, *sys.argv, "--measure", json.dumps({"depth": depth, "limit": limit})]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(
            {name: round(value) if isinstance(value, float) else value for name, value in rows[-1].items()}, flush=True
        )
    settings = {name: getattr(args, name) for name in ("width", "intermediate", "batch_size", "length")}
    write_result(args.out, {**settings, "num_batches": NUM_BATCHES, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
