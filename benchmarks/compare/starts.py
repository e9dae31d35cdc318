"""Starts of LoRA that look at data first, as PEFT has them."""

import warnings
from contextlib import contextmanager

import torch
from peft import get_peft_model, initialize_lora_eva_weights, preprocess_loraga
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling
from torch.utils.data import DataLoader

from peft_jactus import JactusConfig
from peft_jactus.calibration.head_warmup import HeadWarmup, warm_up_head
from peft_jactus.calibration.summed_loss import SummedLoss
from peft_jactus.tuner.targeting import targeted_modules

# More rows than the largest rank, for a pooler sees one vector of each.
EVA_BATCH_SIZE = 64
# Of a new head alone, before anything starts along the gradient.
HEAD_WARMUP_STEPS = 50
HEAD_WARMUP_LEARNING_RATE = 1e-3


def with_eva(model, config, workload):
    """Return the model with rows of A along the inputs."""

    def counted(inputs, positions, name):
        tensor = inputs[0] if isinstance(inputs, tuple) else inputs
        if tensor.dim() == 2:
            return tensor.contiguous()
        return prepare_layer_inputs_fn_language_modeling(tensor, positions, name)

    with warnings.catch_warnings():
        # With it, a fresh head could not run for the start.
        warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage=False")
        model = get_peft_model(model, config)
    loader = DataLoader(workload.train, EVA_BATCH_SIZE, shuffle=True, collate_fn=workload.collator)
    batches = [dict(batch) for batch, _ in zip(loader, range(workload.num_calibration_batches), strict=False)]
    initialize_lora_eva_weights(model, batches, prepare_layer_inputs_fn=counted, show_progress_bar=False)
    return model


def with_corda(model, config, workload):
    """Return the model with both sides along the weight times the inputs' covariance."""
    config.target_modules = targets(model, workload)
    loader = DataLoader(workload.train, shuffle=True, collate_fn=workload.collator)
    num_rows = workload.num_calibration_batches * workload.batch_size

    def forward():
        for row, _ in zip(loader, range(num_rows), strict=False):  # one by one: it takes no batches, nor padding
            model(**row)

    with sequences_only(model, config.target_modules):
        preprocess_corda(model, config, forward)
    return get_peft_model(model, config)


@contextmanager
def sequences_only(model, names):
    """Give the layers ``(1, 1, d)`` for the ``(1, d)`` of a pooler, of which CorDA would drop the first dimension."""

    def as_sequence(layer, args):
        return (args[0].unsqueeze(0) if args[0].dim() == 2 else args[0], *args[1:])

    hooks = [model.get_submodule(name).register_forward_pre_hook(as_sequence) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def with_lora_ga(model, config, workload):
    """Return the model with both sides along the gradient; a fresh head is warmed up for it as for ours."""
    config.target_modules = targets(model, workload)
    if workload.head is not None:
        warmup = HeadWarmup(HEAD_WARMUP_STEPS, HEAD_WARMUP_LEARNING_RATE)
        loss = SummedLoss(None, "mean")
        warm_up_head(model, ours(workload), workload.calibration_batches(), loss, warmup, progress_bar=False)

    def backward():
        for batch in workload.calibration_batches():
            torch.autograd.backward(model(**batch).loss)

    with warnings.catch_warnings():
        # Inputs of the first layer need no gradient.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, backward)
    return get_peft_model(model, config)


def targets(model, workload):
    """Return the names of the layers that ``"all-linear"`` means, which the starts would not find by it."""
    return sorted(targeted_modules(model, ours(workload)))


def ours(workload):
    return JactusConfig(
        task_type=workload.task_type, target_modules="all-linear", modules_to_save=workload.modules_to_save
    )
