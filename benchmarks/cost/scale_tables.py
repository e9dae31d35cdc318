"""From the measurements of scale.py to tables, and to what larger models would take."""

import itertools
import json
import math

from benchmarks.cost.extrapolation import LLAMAS, Llama
from benchmarks.harness.reporting import markdown_table, write_markdown

# For the way to larger models. The speeds of a GPU are of the order that large products reach on an H100; an
# eigendecomposition reaches much less.
CALIBRATION_TOKENS = 128 * 2048
RETAINED_RATIO = 0.8
GPU_MODEL = 3e14
GPU_FLOAT32 = 3e13
GPU_FLOAT64 = 2e12


def write_report(path):
    """Write the tables beside the result file."""
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
    write_markdown(path.with_suffix(".md"), "\n".join(lines))


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
    """Yield tables of larger models: what is counted, over the speed of the widest model that was measured."""
    calibration_speed, factorization_speed = measured_speeds(result)
    width = result["by_width"][-1]["width"]
    yield (
        f"Counted (`benchmarks/cost/extrapolation.py`): {CALIBRATION_TOKENS:,} tokens, kept {RETAINED_RATIO}. At "
        f"width {width} one core reached {calibration_speed / 1e9:.0f} GFLOP/s in calibration and "
        f"{factorization_speed / 1e9:.0f} in the factorization. GPU, assumed and not measured: {GPU_MODEL:.0e} FLOP/s "
        f"for the model in bfloat16, {GPU_FLOAT32:.0e} for covariances in float32, {GPU_FLOAT64:.0e} for the "
        "factorization in float64."
    )
    yield ""
    yield on_a_core(calibration_speed, factorization_speed)
    yield ""
    yield on_gpus()


def measured_speeds(result):
    """Return the operations in a second that the widest model reached, in calibration and in the factorization."""
    widest = result["by_width"][-1]
    llama = Llama("", widest["width"], widest["width"] * 8 // 3, widest["width"], widest["depth"])
    tokens = result["num_batches"] * result["batch_size"] * result["length"]
    calibration = llama.model_flops(tokens) + llama.covariance_flops(tokens)
    return (
        calibration / widest["calibration_seconds"],
        llama.factorization_flops(RETAINED_RATIO) / widest["compression_seconds"],
    )


def num_passes(llama, gibibytes):
    """Return the passes over the calibration data, at a limit on the statistics."""
    return math.ceil(llama.statistics_bytes() / (gibibytes * 2**30))


def on_a_core(calibration_speed, factorization_speed):
    lines = []
    for llama in LLAMAS:
        calibration = llama.model_flops(CALIBRATION_TOKENS) + llama.covariance_flops(CALIBRATION_TOKENS)
        lines.append([
            llama.name,
            f"{llama.statistics_bytes() / 1e9:.0f}",
            f"{num_passes(llama, 8)}; {num_passes(llama, 64)}",
            f"{calibration / calibration_speed / 3600:.0f}",
            f"{llama.factorization_flops(RETAINED_RATIO) / factorization_speed / 3600:.0f}",
        ])
    head = ["model", "statistics (GB)", "passes at 8 GiB; 64 GiB", "calibration, a core (h)"]
    return markdown_table([*head, "factorization, a core (h)"], lines)


def on_gpus():
    lines = []
    for llama, gpus in itertools.product(LLAMAS, (1, 8)):
        # Each process holds the sums of its share of the rows: the limit is one of each process.
        passes = num_passes(llama, 64)
        model = passes * llama.model_flops(CALIBRATION_TOKENS) / GPU_MODEL
        covariances = llama.covariance_flops(CALIBRATION_TOKENS) / GPU_FLOAT32
        factorization = llama.factorization_flops(RETAINED_RATIO) / GPU_FLOAT64
        minutes = [f"{(model + covariances) / gpus / 60:.1f}", f"{factorization / gpus / 60:.1f}"]
        lines.append([llama.name, str(gpus), str(passes), *minutes])
    return markdown_table(
        ["model", "GPUs", "passes at 64 GiB each", "calibration (min)", "factorization (min)"], lines
    )
