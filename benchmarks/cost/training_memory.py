"""Memory of weights and optimizer states while a large Llama trains in bfloat16: counted, not measured.

    python -m benchmarks.cost.training_memory    # results/cost/training_memory.json, .md

Activations come on top. With checkpointing they are a block's inputs for each block, alike for all methods, and those
of one block (measured by `cost.training_step --checkpointing`).
"""

from pathlib import Path

from benchmarks.cost.extrapolation import LLAMAS
from benchmarks.harness.arguments import study_parser
from benchmarks.harness.records import RESULTS, write_document
from benchmarks.harness.reporting import markdown_table, write_markdown

LORA_RANK = 16
ADAPTATION_RANK = 32
RATIOS = (0.8, 0.6, 0.4)
FROZEN_BITS = (8, 4)


def rows_of(llama):
    lora = llama.training_bytes(1.0, LORA_RANK)
    found = {f"LoRA, rank {LORA_RANK}": lora}
    for ratio in RATIOS:
        found[f"JACTUS {ratio}"] = llama.training_bytes(ratio, ADAPTATION_RANK, inside=True)
    found[f"QLoRA, rank {LORA_RANK}, 4 bits"] = llama.training_bytes(1.0, LORA_RANK, frozen_bits=4)
    for bits in FROZEN_BITS:
        for rank in (ADAPTATION_RANK, LORA_RANK):
            few_bits = llama.training_bytes(RATIOS[0], rank, inside=True, frozen_bits=bits)
            found[f"JACTUS {RATIOS[0]}, {rank} adaptation ranks, {bits} bits"] = few_bits
    return [
        {"model": llama.name, "method": method, "gigabytes": count / 1e9, "over_lora": count / lora}
        for method, count in found.items()
    ]


def main():
    parser = study_parser(__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "cost", help="folder")
    args = parser.parse_args()
    rows = [row for llama in LLAMAS for row in rows_of(llama)]
    settings = {"lora_rank": LORA_RANK, "adaptation_rank": ADAPTATION_RANK, "dtype": "bfloat16"}
    write_document(args.out / "training_memory.json", {**settings, "rows": rows})
    table = markdown_table(
        ["model", "method", "weights and states, GB", "over LoRA's"],
        [[row["model"], row["method"], f"{row['gigabytes']:.1f}", f"{row['over_lora']:.2f}"] for row in rows],
    )
    write_markdown(
        args.out / "training_memory.md",
        "Counted: weights in bfloat16; of what trains, weight, gradient and Adam's two states in float32. All linear "
        f"layers; JACTUS with {ADAPTATION_RANK} adaptation ranks. In 8 and 4 bits: what is frozen of the blocks, with "
        "a scale in bfloat16 for 64 numbers. Without activations.\n\n" + table,
    )


if __name__ == "__main__":
    main()
