"""What a process of `test_distributed.py` runs: `python -m tests.support.distributed_worker MODEL OPTIONS`."""

import functools
import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_jactus import JactusConfig, calibrate
from peft_jactus._processes import gather_objects, num_processes
from peft_jactus.tuner.layer import JactusLayer
from tests.support.compressed_models import batches_for, tiny_bert, tiny_llama
from tests.support.gloo_threads import gloo_threads

LEARNING_RATE = 1e-2
MODELS = {"bert": (tiny_bert, "SEQ_CLS"), "llama": (tiny_llama, "CAUSAL_LM")}


def compressed(name, share, *, kill=None, fields=None, **options):
    """Calibrate on the batches ``share`` and compress; return the model. Process ``kill`` dies in its second batch."""
    build, task_type = MODELS[name]
    model = build(dtype=torch.float64)
    batches = batches_for(model, num_batches=8)[share]
    if kill is not None:
        batches = killed_in_the_second(batches, kill)
    config = JactusConfig(task_type=task_type, target_modules="all-linear", retained_ratio=0.6, **(fields or {}))
    statistics = calibrate(model, config, batches, progress_bar=False, **options)
    assert statistics.num_batches == 8
    return get_peft_model(model, config)


def killed_in_the_second(batches, process):
    for number, batch in enumerate(batches):
        if number == 1 and distributed.get_rank() == process:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def factors_of(model):
    """Return the ranks and dense weights of all layers, and the projectors on the spaces of their bases."""
    tensors, ranks = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, JactusLayer):
            factors = layer.get_factors("default")
            ranks[name] = layer.r["default"]
            tensors[f"{name}.weight"] = factors.dense()
            for side in ("left", "right"):
                basis = torch.linalg.qr(getattr(factors, side))[0]
                tensors[f"{name}.{side}"] = basis @ basis.mT
            if factors.bias is not None:
                tensors[f"{name}.bias"] = factors.bias
            if factors.down is not None:
                tensors[f"{name}.adaptation"] = factors.down.mT @ factors.down
    return ranks, {name: tensor.contiguous() for name, tensor in tensors.items()}


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def losses_of_training(model, share, *, wrap=lambda model: model, num_steps=12):
    """Train on the rows ``share`` of a batch, with mean gradients over processes; return the mean losses."""
    (batch,) = batches_for(model.get_base_model(), num_batches=1)
    model = wrap(model.float().train())
    has_optimizer = hasattr(model, "step")  # DeepSpeed's engine
    optimizer = None if has_optimizer else torch.optim.AdamW(trainable(model), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for _ in range(num_steps):
        loss = model(**{name: tensor[share] for name, tensor in batch.items()}).loss
        if has_optimizer:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(sum(gather_objects(loss.item())) / num_processes())
    return losses


def in_ddp(model):
    wrapped = DistributedDataParallel(model)
    sent = set(wrapped.named_module_buffers)
    assert not [name for name in sent if "jactus" in name]
    return wrapped


def in_fsdp(model):
    model.make_shardable()
    mesh = init_device_mesh("cpu", (num_processes(),))
    for layer in model.modules():
        if isinstance(layer, LlamaDecoderLayer):
            fully_shard(layer, mesh=mesh)
    wrapped = fully_shard(model, mesh=mesh)
    if has_bases_to_shard(model):
        assert sum(p.to_local().numel() for p in bases_of(wrapped)) < 0.6 * sum(p.numel() for p in bases_of(wrapped))
    return wrapped


def in_zero(model, *, stage):
    import deepspeed

    model.make_shardable()
    wrapped, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trainable(model),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0.0, "torch_adam": True}},
        },
    )
    if stage == 3 and has_bases_to_shard(model):
        assert sum(p.ds_tensor.numel() for p in bases_of(model)) < 0.6 * sum(p.ds_numel for p in bases_of(model))
    return wrapped


def has_bases_to_shard(model):
    return model.peft_config["default"].frozen_bits is None  # codes stay buffers


def bases_of(model):
    found = [p for name, p in model.named_parameters() if "jactus_left" in name or "jactus_right" in name]
    assert found
    return found


WRAPPERS = {
    "ddp": in_ddp,
    "fsdp": in_fsdp,
    "zero2": functools.partial(in_zero, stage=2),
    "zero3": functools.partial(in_zero, stage=3),
}


# What these keep for as long as the process runs (caches of DTensor, hooks of DeepSpeed's engine) holds the group.
KEEP_THE_GROUP = {"fsdp", "zero2", "zero3"}


def write_results(folder, name, *, wrapper=None, **options):
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    share = slice(rank, None, world_size)
    model = compressed(name, share, **options)
    ranks, tensors = factors_of(model)
    losses = [] if wrapper is None else losses_of_training(model, share, wrap=WRAPPERS[wrapper])
    header = {"ranks": json.dumps(ranks), "losses": json.dumps(losses)}
    save_file(tensors, Path(folder) / f"{rank}.safetensors", metadata=header)


def main(name, options):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    runs = json.loads(options)  # of each run, by its folder
    for folder, options in runs.items():
        write_results(folder, name, **options)
        distributed.barrier()  # one that ends while others are at work may abort
    if any(options.get("wrapper") in KEEP_THE_GROUP for options in runs.values()):
        os._exit(0)  # a thread of Gloo that is still there when Python shuts down may abort the process
    gc.collect()
    distributed.destroy_process_group()
    assert gloo_threads() == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
