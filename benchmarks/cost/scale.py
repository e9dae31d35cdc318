"""Time and peak memory of calibration, compression and a training step against the depth and the width of a model.

    python benchmarks/scale.py
    python benchmarks/scale.py --report     # scale.md from scale.json: tables, and the way to larger models

Llamas of random weights, in a fresh process each. Memory: the peak of the process, less what it holds once the model
is loaded (weights and libraries). Depth: without a limit on the statistics, and with one and checkpointed activations,
as is meant for models that do not fit. Width: two blocks, no limit; the exponents are those of time against width,
between neighbours.

Activations of models this small are below the size from which glibc gives freed memory back at once; it keeps several
times what is in use. Those of larger models are above. So that the small ones tell of these, freed memory goes back
from `MMAP_THRESHOLD` bytes on here, against depth.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from _extrapolation import LLAMAS, Llama
from _memory import peak_mib, reset_peak, resident_mib
from _reporting import markdown_table

RESULTS = Path(__file__).parent / "results" / "scale.json"
NUM_BATCHES = 4
# For the way to larger models. The speeds of a GPU are of the order that large products reach on an H100; an
# eigendecomposition reaches much less.
CALIBRATION_TOKENS = 128 * 2048
RETAINED_RATIO = 0.8
GPU_MODEL = 3e14
GPU_FLOAT32 = 3e13
GPU_FLOAT64 = 2e12
VOCABULARY = 1000
MMAP_THRESHOLD = 2**16


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 24], help="blocks")
    parser.add_argument("--width", type=int, default=512, help="of those")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024], help="of two blocks")
    parser.add_argument("--limit", default="64MiB", help="`max_statistics_memory` of the limited runs")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS)
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
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_jactus import JactusConfig, calibrate

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def llama(width, depth):
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=depth,
            num_attention_heads=width // 64,
        )
        return LlamaForCausalLM(config)

    ids = torch.randint(VOCABULARY, (NUM_BATCHES, args.batch_size, args.length))
    batches = [{"input_ids": batch, "labels": batch} for batch in ids]
    # What the first use of a library allocates is not counted; of a small model, since freed memory would be, too.
    llama(64, 1)(**batches[0]).loss.backward()
    model = llama(width, depth)
    if limit is not None:
        model.activation_checkpointing_enable()
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


def write_report(path):
    """Write and return the tables, next to the result file."""
    result = json.loads(path.read_text())
    lines = ["Memory beyond the loaded model (MiB) and time (s), against depth:", ""]
    lines.append(table(result["by_depth"], ("depth", "width", "limit")))
    lines += ["", *growth_with_depth(result["by_depth"])]
    # In models this shallow a training step uses again what the one before has freed, so its peak is no figure.
    lines += ["", "Against width:", "", table(result["by_width"], ("width", "depth"), without=("training_mib",))]
    lines += ["", "Growth of the times with the width, between neighbours:", ""]
    lines += [
        f"- {name}: {', '.join(f'{value:.2f}' for value in found)}" for name, found in result["exponents"].items()
    ]
    lines += ["", *extrapolation(result)]
    text = "\n".join(lines) + "\n"
    path.with_suffix(".md").write_text(text)
    return text


def growth_with_depth(rows):
    """Yield a line for each limit: how much more memory the deepest model takes than the shallowest one."""
    for limit, group in itertools.groupby(rows, key=lambda row: row["limit"]):
        first, *_, last = group
        ratios = (f"{name[:-4]} {last[name] / first[name]:.2f}" for name in ("calibration_mib", "compression_mib"))
        yield f"- limit {limit}, peak of {last['depth']} blocks over that of {first['depth']}: {', '.join(ratios)}"


def table(rows, keys, without=()):
    figures = [name for name in rows[0] if name.endswith(("_mib", "_seconds")) and name not in without]
    lines = [
        [
            *(str(row[key]) for key in keys),
            *(f"{row[name]:.0f}" if name.endswith("_mib") else f"{row[name]:.2f}" for name in figures),
        ]
        for row in rows
    ]
    return markdown_table([*keys, *(name.replace("_", " ") for name in figures)], lines)


def extrapolation(result):
    """Yield a table of larger models: what is counted, over the speed of the widest model that was measured."""
    widest = result["by_width"][-1]
    measured = Llama("", widest["width"], widest["width"] * 8 // 3, widest["width"], widest["depth"])
    tokens = NUM_BATCHES * result["batch_size"] * result["length"]
    calibration_flops = measured.model_flops(tokens) + measured.covariance_flops(tokens)
    calibration_speed = calibration_flops / widest["calibration_seconds"]
    factorization_speed = measured.factorization_flops(RETAINED_RATIO) / widest["compression_seconds"]
    yield (
        f"Counted (`_extrapolation.py`): {CALIBRATION_TOKENS:,} tokens, kept {RETAINED_RATIO}. At width "
        f"{widest['width']} one core reached {calibration_speed / 1e9:.0f} GFLOP/s in calibration and "
        f"{factorization_speed / 1e9:.0f} in the factorization. GPU, assumed and not measured: {GPU_MODEL:.0e} FLOP/s "
        f"for the model in bfloat16, {GPU_FLOAT32:.0e} for covariances in float32, {GPU_FLOAT64:.0e} for the "
        "factorization in float64."
    )
    yield ""
    head = [
        "model",
        "statistics (GB)",
        "passes at 8 GiB; 64 GiB",
        "calibration, a core (h)",
        "factorization, a core (h)",
    ]
    lines = []
    for llama in LLAMAS:
        passes = [math.ceil(llama.statistics_bytes() / (gib * 2**30)) for gib in (8, 64)]
        calibration = llama.model_flops(CALIBRATION_TOKENS) + llama.covariance_flops(CALIBRATION_TOKENS)
        factorization = llama.factorization_flops(RETAINED_RATIO)
        lines.append([
            llama.name,
            f"{llama.statistics_bytes() / 1e9:.0f}",
            f"{passes[0]}; {passes[1]}",
            f"{calibration / calibration_speed / 3600:.0f}",
            f"{factorization / factorization_speed / 3600:.0f}",
        ])
    yield markdown_table(head, lines)
    yield ""
    lines = []
    for llama, gpus in itertools.product(LLAMAS, (1, 8)):
        # Each process holds the sums of its share of the rows: the limit is one of each process.
        passes = math.ceil(llama.statistics_bytes() / (64 * 2**30))
        model = passes * llama.model_flops(CALIBRATION_TOKENS) / GPU_MODEL
        covariances = llama.covariance_flops(CALIBRATION_TOKENS) / GPU_FLOAT32
        factorization = llama.factorization_flops(RETAINED_RATIO) / GPU_FLOAT64
        minutes = [f"{(model + covariances) / gpus / 60:.1f}", f"{factorization / gpus / 60:.1f}"]
        lines.append([llama.name, str(gpus), str(passes), *minutes])
    yield markdown_table(["model", "GPUs", "passes at 64 GiB each", "calibration (min)", "factorization (min)"], lines)


def main():
    args = parse_arguments()
    if args.measure:
        print(json.dumps(measure(args, **args.measure)))
        return
    if args.report:
        print(write_report(args.out))
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
        about_memory = len(rows) < 2 * len(args.depths)
        environ = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)} if about_memory else {})
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(
            {name: round(value) if isinstance(value, float) else value for name, value in rows[-1].items()}, flush=True
        )
    by_depth, by_width = rows[: 2 * len(args.depths)], rows[2 * len(args.depths) :]
    result = {"batch_size": args.batch_size, "length": args.length, "num_batches": NUM_BATCHES}
    result["mmap_threshold"] = MMAP_THRESHOLD
    result |= {"by_depth": by_depth, "by_width": by_width, "exponents": exponents(by_width)}
    write_result(args.out, {**result, "environment": environment()})
    print(write_report(args.out))


if __name__ == "__main__":
    main()
