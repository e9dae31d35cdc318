"""What the first call of a model under `torch.compile` costs: MiniLM dense, as two factors, and pivoted.

    python -m benchmarks.cost.compilation        # results/cost/compilation.json, .md

Each in a process of its own, with an empty cache. The time is that of the process and of the compilers it starts; the
kernels are the C++ files that inductor writes.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModel

from benchmarks.cost.latency import MINILM
from benchmarks.harness.arguments import study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.processes import run_fresh
from benchmarks.harness.records import RESULTS, write_document
from benchmarks.harness.reporting import markdown_table, write_markdown
from peft_jactus import JactusConfig, compressed_copy
from peft_jactus.deployment.layers import FactorizedLinear

FORMS = ("dense", "factored", "pivoted")


def build(form, retained_ratio):
    model = AutoModel.from_pretrained(MINILM)
    if form == "dense":
        return model.eval()
    config = JactusConfig(
        target_modules="all-linear",
        decomposition="svd",
        storage=form,
        retained_ratio=retained_ratio,
        adaptation_rank=0,
    )
    return compressed_copy(get_peft_model(model, config)).eval()


def processor_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(form, retained_ratio):
    """Return what the first call costs, in this process."""
    torch.set_num_threads(1)
    model = build(form, retained_ratio)
    tokens = torch.randint(1000, (1, 128), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model)
    with torch.no_grad():
        model(tokens)
        start = processor_seconds()
        compiled(tokens)
        seconds = processor_seconds() - start
    ranks = {module.rank for module in model.modules() if isinstance(module, FactorizedLinear)}
    kernels = len(list(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.cpp")))
    return {"form": form, "distinct_ranks": len(ranks), "kernels": kernels, "processor_seconds": seconds}


def measure_fresh(form, retained_ratio):
    with tempfile.TemporaryDirectory() as cache:
        environment_of_it = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        return run_fresh(__spec__.name, "--form", form, "--retained-ratio", retained_ratio, env=environment_of_it)


def main():
    parser = study_parser(__doc__)
    parser.add_argument("--retained-ratio", type=float, default=0.6)
    parser.add_argument("--out", type=Path, default=RESULTS / "cost" / "compilation.json")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.form is not None:
        print(json.dumps(measure(args.form, args.retained_ratio)))
        return
    rows = [measure_fresh(form, args.retained_ratio) for form in FORMS]
    write_document(args.out, {"retained_ratio": args.retained_ratio, "rows": rows, "environment": environment("cpu")})
    columns = ["", "distinct ranks", "kernels", "processor time, s", "over dense"]
    lines = [
        [
            row["form"],
            str(row["distinct_ranks"] or ""),
            str(row["kernels"]),
            f"{row['processor_seconds']:.0f}",
            f"{row['processor_seconds'] / rows[0]['processor_seconds']:.2f}",
        ]
        for row in rows
    ]
    write_markdown(args.out.with_suffix(".md"), markdown_table(columns, lines))


if __name__ == "__main__":
    main()
