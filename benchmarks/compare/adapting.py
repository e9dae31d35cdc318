"""Every method of the comparison as functions: a model comes in, a model that is ready to train goes out."""

import time
from functools import partial

from peft import EvaConfig, HiraConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import nn

from benchmarks.compare.cases import FULL_SIZE, IN_FEW_BITS, is_ours
from benchmarks.compare.starts import (
    HEAD_WARMUP_LEARNING_RATE,
    HEAD_WARMUP_STEPS,
    with_corda,
    with_eva,
    with_lora_ga,
)
from peft_jactus import JactusConfig, calibrate, rank_summary
from peft_jactus.deployment.export import compressed_copy

RANK = 16
RANKS = {"rslora": 64}
STARTS = {"eva": with_eva, "corda": with_corda, "lora-ga": with_lora_ga}
CONFIGS = {
    "lora": partial(LoraConfig, lora_alpha=2 * RANK),
    "lora-embeddings": partial(LoraConfig, lora_alpha=2 * RANK),
    "dora": partial(LoraConfig, lora_alpha=2 * RANK, use_dora=True),
    # As its authors do: no scaling, so that the adapter starts as the leading directions of the weight.
    "pissa": partial(LoraConfig, lora_alpha=RANK, init_lora_weights="pissa"),
    # As PEFT's own comparison has it.
    "rslora": partial(LoraConfig, lora_alpha=64, use_rslora=True),
    # Rows of A along the inputs, of length one, and the ranks shared out by what they explain.
    "eva": partial(LoraConfig, lora_alpha=RANK, init_lora_weights="eva", eva_config=EvaConfig(use_label_mask=False)),
    # The leading directions of the weight times the inputs' covariance, its authors' choice for the best accuracy.
    "corda": partial(
        LoraConfig, lora_alpha=RANK, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm")
    ),
    # Both sides along the gradient, with its authors' scale.
    "lora-ga": partial(
        LoraConfig,
        lora_alpha=RANK,
        use_rslora=True,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    ),
    # The weight itself, times a matrix of this rank, element by element.
    "hira": HiraConfig,
}


def full_size(model, method, workload):
    """Return the model ready for one of `FULL_SIZE`, which keep every parameter; a fresh head trains whole in each."""
    return model.requires_grad_(True) if method == "full" else with_adapter(model, method, workload)


def adapt(model, case, workload):
    """Return the model ready for the last stage, and figures about it."""
    stages = case.last_stages
    if stages in FULL_SIZE:
        return full_size(model, stages, workload), {}
    decomposition, _, on_top = stages.partition("+")
    decomposition, _, what_trains = decomposition.partition("-") if is_ours(decomposition) else (decomposition, "", "")
    model, figures = compressed(model, case, workload, decomposition)
    if what_trains == "embeddings":
        train_embeddings_(model)
    return full_size(compressed_copy(model), on_top, workload) if on_top else model, figures


def with_adapter(model, name, workload):
    config = CONFIGS[name](
        task_type=workload.task_type,
        target_modules="all-linear",
        modules_to_save=workload.modules_to_save,
        r=RANKS.get(name, RANK),
    )
    start = STARTS.get(name)
    model = get_peft_model(model, config) if start is None else start(model, config, workload)
    if name == "lora-embeddings":
        train_embeddings_(model)
    return model


def train_embeddings_(model):
    """Train embeddings and norms, too."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
            module.requires_grad_(True)


def rank_multiple(decomposition):
    """Return what ranks are multiples of: of JACTUS its default; of a peer, as published, any that fit the budget."""
    return JactusConfig().rank_multiple if decomposition == "jactus" else 1


def adaptation_rank(method):
    """Return how many ranks are left to the task: none where cores train, or something that comes on top."""
    adapts = method in ("jactus", "jactus-embeddings", "jactus-retained", *IN_FEW_BITS)
    return JactusConfig().adaptation_rank if adapts else 0


def compressed(model, case, workload, decomposition):
    """Return the model compressed, JACTUS with its own allocation, a peer with uniform ranks; and figures about it."""
    adapting = adaptation_rank(case.last_stages)
    config = JactusConfig(
        task_type=workload.task_type,
        target_modules="all-linear",
        modules_to_save=workload.modules_to_save,
        retained_ratio=case.retained_ratio,
        storage=case.storage,
        decomposition=decomposition,
        allocation=JactusConfig().allocation if decomposition == "jactus" else "uniform",
        rank_multiple=rank_multiple(decomposition),
        adaptation_rank=adapting,
        adaptation_space="retained" if case.last_stages == "jactus-retained" else "free",
        frozen_bits=IN_FEW_BITS.get(case.last_stages),
        # On for all that are calibrated. The published peers have none, so it is in their favour.
        bias_correction=True,
    )
    started = time.perf_counter()
    if config.factorization_options().decomposition.needs_statistics:
        config.statistics = statistics_for(model, config, case, workload)
    calibrated = time.perf_counter()
    model = get_peft_model(model, config)
    return model, {
        "calibration_seconds": calibrated - started,
        "factorization_seconds": time.perf_counter() - calibrated,
        "retained_ratio_reached": rank_summary(model).retained_ratio,
    }


def statistics_for(model, config, case, workload):
    """Return what calibration finds, after a head warm-up if the head is new; or what a shared file has of it."""
    file = None
    if workload.statistics_files is not None:
        file = f"{workload.statistics_files}-{case.seed}.safetensors"
        config = JactusConfig(task_type=workload.task_type, target_modules="all-linear")  # whatever the case needs
    new_head = workload.head is not None and not case.first_epochs
    warmup = HEAD_WARMUP_STEPS if config.adaptation_rank and new_head else 0
    return calibrate(
        model,
        config,
        workload.calibration_batches(),
        head_warmup_steps=warmup,
        head_warmup_lr=HEAD_WARMUP_LEARNING_RATE,
        statistics_file=file,
        progress_bar=False,
    )
