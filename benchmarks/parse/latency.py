"""How long a routed model takes, in the same run as the dense one and static low-rank ones: a block of Llama-2-7B.

    python -m benchmarks.parse.latency
    python -m benchmarks.parse.latency --shape smollm2    # SmolLM2-135M without its large vocabulary; --dtype bfloat16
    python -m benchmarks.parse.latency --shape small --repeats 2 --out /tmp/latency.json

Weights are random, since values make no difference to time. "native" runs all ranks of the pool as two products, as
they are stored; "static" has uniform ranks of the routed model's active share. A *miss* chooses experts and gathers
their factors, a *hit* finds them remembered. "by the first block": the router reads its output, so that this block
runs once more (in models of several blocks). Models take turns on one thread, and the time is that thread's (see
peft_jactus/cli/stopwatch.py).
"""

import copy
import dataclasses
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cost.latency import parse_timing_arguments, tokens, with_random_factors
from benchmarks.harness.arguments import study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, write_document
from benchmarks.harness.reporting import write_markdown
from benchmarks.parse.latency_tables import markdown
from peft_jactus.cli.stopwatch import Case, compare, decode_case, forward_case, num_bytes
from peft_jactus.deployment.config import LayerForm
from peft_jactus.deployment.layers import LowRankLinear
from peft_jactus.deployment.names import checkpoint_names
from peft_jactus.deployment.quantizer import attach_compression
from peft_jactus.parse.config import RouterConfig
from peft_jactus.parse.inputs import pool_states
from peft_jactus.parse.installation import install_router
from peft_jactus.parse.patterns import ExpertPattern
from peft_jactus.parse.router import RankRouter

SHAPES = {
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 1,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
    },
    "small": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_hidden_layers": 4},
}
RATIOS = (0.8, 0.6, 0.4)
# Blocks of the whole model, whose experts its router scores.
WHOLE_DEPTH = {"llama-7b": 32, "smollm2": 30, "small": 32}
PROMPTS = (128, 512)
BATCH = 8
# Scores then have a standard deviation of one.
WEIGHT_STD = 10.0
# Eight patterns of a wide block fit.
CACHE_BYTES = 2**36
PARTS = ("its router", "its gathering", "router of the whole depth")


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-7b")
    parser.add_argument("--layers", type=int, help="blocks; default: 1 of llama-7b, 30 of smollm2, 4 of small")
    parser.add_argument("--active-ratio", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--pool-ratio", type=float, default=0.95, help="of the dense parameters, in two factors")
    parser.add_argument(
        "--choice",
        choices=("leading", "scattered"),
        default="leading",
        help="of a layer: the leading experts, as trained routers mostly choose, or any, which have to be copied",
    )
    parser.add_argument("--expert-size", type=int, default=16)
    parser.add_argument(
        "--out", type=Path, help="default: results/parse/latency-CHOICE-DEVICE[-SHAPE][-bfloat16].json"
    )
    args = parse_timing_arguments(parser)
    args.layers = args.layers or SHAPES[args.shape]["num_hidden_layers"]
    kind = [args.choice, args.device]
    kind += [args.shape] if args.shape != "llama-7b" else []
    kind += ["bfloat16"] if args.device == "cpu" and args.dtype == torch.bfloat16 else []
    args.out = args.out or RESULTS / "parse" / f"latency-{'-'.join(kind)}.json"
    return args


# -- models -----------------------------------------------------------------------------------------------


def dense_model(args):
    config = LlamaConfig(**{**SHAPES[args.shape], "num_hidden_layers": args.layers}, vocab_size=1024)
    return LlamaForCausalLM(config).to(args.dtype).eval().to(args.device)


def low_rank_model(dense, ratio, args):
    """Return the model with random factors of this share of the parameters in all blocks, as if it had been loaded."""
    model = with_random_factors(dense, "factored", ratio, args)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    forms = {name: LayerForm(layer.storage, layer.rank) for name, layer in layers.items()}
    attach_compression(model, forms, (), retained_ratio=ratio, base_model=None)
    return model.eval().to(args.device)


def routed_model(pool, ratio, args, router_input="embeddings"):
    """Return a routed model with a cache of its own, that shares the factors of the pool."""
    model = copy.deepcopy(pool, {id(tensor): tensor for tensor in (*pool.parameters(), *pool.buffers())})
    layers = [name for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)]
    names = checkpoint_names(model, layers)
    config = RouterConfig(ratio, args.expert_size, cache_bytes=CACHE_BYTES, router_input=router_input)
    randomize_(install_router(model, sorted(layers, key=names.__getitem__), config), args.choice)
    return model


@torch.no_grad()
def randomize_(router, choice):
    """Give a router scores that differ by prompt: of every expert ("scattered"), or of a layer's experts alike."""
    generator = torch.Generator().manual_seed(1)
    if choice == "scattered":
        router.weight.copy_(WEIGHT_STD * torch.randn(router.weight.shape, generator=generator))
        return
    for first, last in router.table.spans:
        router.weight[first:last] = WEIGHT_STD * torch.randn(router.weight.shape[1], generator=generator)
        router.bias[first:last] = torch.linspace(0, -10, last - first)


def router_of_whole_depth(router, args):
    """Return a router over the experts of as many blocks as the whole model has, in multiples of the model's."""
    times = max(1, WHOLE_DEPTH[args.shape] // args.layers)
    width = router.input_mean.shape[0]
    whole = RankRouter(router.router_config, router.layers * times, width, device=args.device)
    randomize_(whole, args.choice)
    return whole


def linear_bytes(model):
    return sum(num_bytes(layer) for layer in model.model.modules() if isinstance(layer, nn.Linear))


# -- what is timed ----------------------------------------------------------------------------------------


class Timed(nn.Module):
    """A model with a case of its own, so that models take turns on different cases."""

    def __init__(self, model, case):
        super().__init__()
        self.model = model
        self.case = case

    def prepare(self):
        return self.case.prepare(self.model)

    def forward(self, state):
        self.case.call(self.model, state)


def times(name, contenders, args):
    """Return the `Timing` of each contender, by name.

    Args:
        name: Of what is timed.
        contenders: By name: a model and its case.
        args: Repeats and threads.
    """
    (num_units,) = {case.num_units for _, case in contenders.values()}
    timings = compare(
        {key: Timed(*contender) for key, contender in contenders.items()},
        [Case(name, lambda timed, state: timed(state), Timed.prepare, num_units)],
        num_repeats=args.repeats,
        num_threads=args.threads,
    )
    for timing in timings:
        print(f"  {name}, {timing.model}: {1000 * timing.min_seconds:.3f} ms", flush=True)
    return {timing.model: timing for timing in timings}


def prefill_case(ids):
    return forward_case("prefill", {"input_ids": ids, "use_cache": True})


def decoding_case(ids):
    return decode_case("decode", ids, num_tokens=4)


def miss_case(ids):
    return dataclasses.replace(prefill_case(ids), prepare=lambda model: model.rank_router.clear_cache())


def choice_case(embeddings):
    return Case("choice", lambda router, _: router.select(pool_states(embeddings, None)).cpu())


def gather_case(selected):
    def gather(router, kept):
        kept.append(ExpertPattern(selected, router.table, router.layers))  # to free it takes time, too

    return Case("gather", gather, lambda _: [])


# -- measurements -----------------------------------------------------------------------------------------


def prefill_times(length, models, whole_router, ratio, args):
    """Return times of a prompt, and of the parts of a miss."""
    ids = tokens(1, length, args.device)
    hit, miss = (routed_model(models["native"], ratio, args) for _ in range(2))
    router = miss.rank_router
    with torch.inference_mode():
        embeddings = miss.get_input_embeddings()(ids)
        selected = router.select(pool_states(embeddings, None))[0].cpu()
    contenders = {name: (model, prefill_case(ids)) for name, model in models.items()} | {
        "routed, hit": (hit, prefill_case(ids)),
        "routed, miss": (miss, miss_case(ids)),
        "its router": (router, choice_case(embeddings)),
        "its gathering": (router, gather_case(selected)),
        "router of the whole depth": (whole_router, choice_case(embeddings)),
    }
    if args.layers > 1:
        reads_block = routed_model(models["native"], ratio, args, "first_block")
        contenders["routed by the first block, hit"] = (reads_block, prefill_case(ids))
    timings = times(f"prefill 1 x {length}", contenders, args)
    info = hit.rank_router.cache_info()
    assert (info.misses, info.entries) == (1, 1), info
    return timings


def decode_times(models, ratio, args):
    contenders = {**models, "routed": routed_model(models["native"], ratio, args)}
    case = decoding_case(tokens(1, 128, args.device))
    return times("decode, batch 1", {name: (model, case) for name, model in contenders.items()}, args)


def batch_times(name, make_case, models, ratio, args):
    """Return times of a batch, whose rows have one pattern or as many as there are rows."""
    many = tokens(BATCH, 32, args.device)
    one = many[:1].expand(BATCH, -1).contiguous()
    same, different = (routed_model(models["native"], ratio, args) for _ in range(2))
    contenders = {key: (model, make_case(many)) for key, model in models.items()} | {
        "routed, one pattern": (same, make_case(one)),
        f"routed, {BATCH} patterns": (different, make_case(many)),
    }
    timings = times(name, contenders, args)
    num_patterns = [model.rank_router.cache_info().patterns for model in (same, different)]
    assert num_patterns == [1, BATCH], num_patterns
    return timings


def rows_of(timings, case, ratio):
    """Yield a row for each model of a case."""
    dense, native = timings["dense"], timings["native"]
    for name, timing in timings.items():
        yield {
            "active_ratio": ratio,
            "case": case,
            "model": name,
            "milliseconds": 1000 * timing.min_seconds,
            "over_dense": timing.min_seconds / dense.min_seconds,
            "median_over_dense": timing.median_seconds / dense.median_seconds,
            "speedup_over_native": native.min_seconds / timing.min_seconds,
            "median_speedup_over_native": native.median_seconds / timing.median_seconds,
        }


def router_row(timings, length, router, whole_router, ratio, args):
    """Return the parts of a miss, and what the router takes beside the model."""
    seconds = {name: timing.min_seconds for name, timing in timings.items()}
    hit, miss = seconds["routed, hit"], seconds["routed, miss"]
    choice, gathering, whole_choice = (seconds[name] for name in PARTS)
    depth = args.layers * len(whole_router.layers) // len(router.layers)
    return {
        "active_ratio": ratio,
        "prompt_tokens": length,
        "experts": len(router.table),
        "miss_milliseconds": 1000 * miss,
        "hit_milliseconds": 1000 * hit,
        "router_milliseconds": 1000 * choice,
        "gathering_milliseconds": 1000 * gathering,
        "rest_milliseconds": 1000 * (miss - choice - gathering),
        "router_over_miss": choice / miss,
        "router_over_hit": choice / hit,
        "estimated_blocks": depth,
        "estimated_experts": len(whole_router.table),
        "estimated_router_milliseconds": 1000 * whole_choice,
        "estimated_router_over_hit": whole_choice / (hit / args.layers * depth),
    }


def memory_row(models, ratio, args):
    routed = routed_model(models["native"], ratio, args)
    router = routed.rank_router
    with torch.inference_mode():
        embeddings = routed.get_input_embeddings()(tokens(1, PROMPTS[0], args.device))
        (pattern,) = router.choose(pool_states(embeddings, None)).patterns
    dense = linear_bytes(models["dense"])
    return {
        "active_ratio": ratio,
        "chosen_ratio": router.table.active_ratio(pattern.selected.unsqueeze(0)).item(),
        "dense_bytes": dense,
        "pattern_bytes": pattern.num_bytes,
        "pattern_over_dense": pattern.num_bytes / dense,
        "pool_over_dense": linear_bytes(models["native"]) / dense,
        "router_over_dense": num_bytes(router) / dense,
    }


def measure(ratio, dense, native, args):
    """Return rows of times, of the router and of memory, for one budget."""
    print(f"active ratio {ratio:g}", flush=True)
    models = {"dense": dense, "native": native, "static": low_rank_model(dense, ratio, args)}
    router = routed_model(native, ratio, args).rank_router
    whole_router = router_of_whole_depth(router, args)
    rows, router_rows = [], []
    for length in PROMPTS:
        timings = prefill_times(length, models, whole_router, ratio, args)
        router_rows.append(router_row(timings, length, router, whole_router, ratio, args))
        whole = {name: timing for name, timing in timings.items() if name not in PARTS}
        rows += rows_of(whole, f"prefill 1 x {length}", ratio)
    rows += rows_of(decode_times(models, ratio, args), "decode, batch 1", ratio)
    for name, case in ((f"prefill {BATCH} x 32", prefill_case), (f"decode, batch {BATCH}", decoding_case)):
        rows += rows_of(batch_times(name, case, models, ratio, args), name, ratio)
    return rows, router_rows, memory_row(models, ratio, args)


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dense = dense_model(args)
    native = low_rank_model(dense, args.pool_ratio, args)
    measured = [measure(ratio, dense, native, args) for ratio in args.active_ratio]
    names = ("shape", "layers", "choice", "pool_ratio", "expert_size", "threads", "repeats")
    result = {
        **{name: getattr(args, name) for name in names},
        "dtype": str(args.dtype).removeprefix("torch."),
        "times": [row for rows, _, _ in measured for row in rows],
        "router": [row for _, rows, _ in measured for row in rows],
        "memory": [row for _, _, row in measured],
        "environment": environment(args.device),
    }
    write_document(args.out, result)
    write_markdown(args.out.with_suffix(".md"), markdown(result, args.device))


if __name__ == "__main__":
    main()
