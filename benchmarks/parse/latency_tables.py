"""From the times of routed models to tables."""

from benchmarks.harness.reporting import markdown_table

NOTES = """\
Times over the dense model's in the same run; in brackets the speed-up over "native": all ranks of the pool as two
products. "static" has uniform ranks of the same active share, also as two products. On a GPU, the routed model decodes
with its fused kernel, which the static ones do not have."""
ROUTER_NOTES = """\
A miss in parts: "router" pools the embeddings, scores all experts of this model and selects; "gathering" copies the
chosen factors; both were timed alone, and "rest" is what remains. "router / hit" is measured, of this model as it is.
"whole depth" is an estimate: a router over the experts of {blocks} such blocks, timed alone, over as many
times the time of a hit for each block of this model (with its embedding and its head of 1024 tokens)."""
MEMORY_NOTES = "Memory of a pattern's gathered factors, of the pool and of the router, over the dense linear layers'."


def times_table(rows, ratios):
    cells = {(row["case"], row["model"], row["active_ratio"]): row for row in rows}
    lines = []
    for case, model in dict.fromkeys((row["case"], row["model"]) for row in rows):
        found = [cells[case, model, ratio] for ratio in ratios]
        if model == "dense":
            values = [f"{row['milliseconds']:.2f} ms" for row in found]
        else:
            values = [f"{row['over_dense']:.2f} ({row['speedup_over_native']:.2f} x)" for row in found]
        lines.append([case, model, *values])
    return markdown_table(["case", "model", *(f"active {ratio:g}" for ratio in ratios)], lines)


def router_table(rows):
    lines = []
    for row in rows:
        miss = row["miss_milliseconds"]
        parts = [row[f"{name}_milliseconds"] for name in ("router", "gathering", "rest")]
        shares = [f"{part:.2f} ms ({100 * part / miss:.1f} %)" for part in parts]
        ratios = [f"{100 * row[name]:.2f} %" for name in ("router_over_hit", "estimated_router_over_hit")]
        numbers = [f"{row['hit_milliseconds']:.2f} ms", f"{miss:.2f} ms"]
        lines.append([str(row["prompt_tokens"]), f"{row['active_ratio']:g}", *numbers, *shares, *ratios])
    header = ["prompt", "active", "hit", "miss", "router", "gathering", "rest", "router / hit"]
    return markdown_table([*header, "the same, whole depth"], lines)


def memory_table(rows):
    keys = ("chosen_ratio", "pattern_over_dense", "pool_over_dense", "router_over_dense")
    lines = [[f"{row['active_ratio']:g}", *(f"{row[key]:.3f}" for key in keys)] for row in rows]
    return markdown_table(["active", "chosen", "pattern", "pool", "router"], lines)


def markdown(result, device):
    title = f"{result['shape']}, {result['layers']} block(s), {device}, {result['dtype']}, "
    title += f"pool {result['pool_ratio']:g}, {result['choice']} experts"
    ratios = [row["active_ratio"] for row in result["memory"]]
    router_notes = ROUTER_NOTES.format(blocks=result["router"][0]["estimated_blocks"])
    tables = [NOTES, times_table(result["times"], ratios), router_notes, router_table(result["router"])]
    return "\n\n".join([title, *tables, MEMORY_NOTES, memory_table(result["memory"])])
