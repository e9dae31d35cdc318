"""Routed models of the small Llama: how they are made, trained and scored."""

import copy
import dataclasses
import math

import torch
from _language import as_dataset, load_blocks
from peft import get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from peft_jactus import JactusConfig, calibrate
from peft_jactus.export import compressed_copy
from peft_jactus.parse import RouterConfig, RouterTrainer, add_router, expert_importance
from peft_jactus.parse.training import embeddings_of
from peft_jactus.routing.router import pool_embeddings
from peft_jactus.routing.selection import select_experts

DECOMPOSITIONS = ("svd", "fwsvd", "asvd", "svd-llm", "jactus")
CORPORA = ("novels", "ptb", "wikitext2")
LENGTH = 256
# What a prompt is; the other half of a block is scored.
PROMPT = 128
CALIBRATION_BLOCKS = 128
BATCH_SIZE = 16


def load_dense(path):
    return AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)


def load_corpora(path, data_dir, *, num_test):
    """Return calibration blocks, blocks for routers, and test blocks by corpus: no two share text."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    options = {"tokenizer": tokenizer, "length": LENGTH}
    blocks = load_blocks(data_dir, "novels", "train", max_blocks=8192, seed=1, **options)
    test = {name: load_blocks(data_dir, name, "test", max_blocks=num_test, seed=0, **options) for name in CORPORA}
    return blocks[:CALIBRATION_BLOCKS], blocks[CALIBRATION_BLOCKS:], test


def batches_of(blocks):
    return [{"input_ids": ids, "labels": ids} for ids in blocks.split(BATCH_SIZE)]


def statistics_for(dense, blocks):
    """Return statistics that serve every decomposition."""
    config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", decomposition="fwsvd")
    return calibrate(copy.deepcopy(dense), config, batches_of(blocks), progress_bar=False)


def compressed(dense, statistics, decomposition, retained_ratio, *, allocation="uniform", storage="factored"):
    """Return the model that the decomposition gives, deployed."""
    config = JactusConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        decomposition=decomposition,
        retained_ratio=retained_ratio,
        allocation=allocation,
        storage=storage,
    )
    config.statistics = statistics
    return compressed_copy(get_peft_model(copy.deepcopy(dense), config)).eval().requires_grad_(False)


def routed_model(dense, statistics, decomposition, pool_ratio, config, storage="factored"):
    pool = compressed(dense, statistics, decomposition, pool_ratio, storage=storage)
    return add_router(pool, config, statistics=statistics, decomposition=decomposition, progress_bar=False)


def train_router(routed, dense, blocks, folder, *, seed, epochs=1, learning_rate=2e-3, **options):
    args = TrainingArguments(
        output_dir=folder,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=epochs,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    data = as_dataset(blocks).remove_columns("labels")
    trainer = RouterTrainer(routed, dense, args, train_dataset=data, **options)
    trainer.train()
    return trainer.state.log_history


@torch.no_grad()
def losses(model, blocks, expected=None, selected=None):
    """Return the mean loss of the second half of the blocks, and its divergence from the expected logits.

    Args:
        model: Runs whole blocks.
        blocks: ``(num, LENGTH)``.
        expected: Logits of the dense model for the second half, by batch.
        selected: ``(num, experts)``: what a routed model runs; its router does not.
    """
    total, divergence, kept = 0.0, 0.0, []
    for number, ids in enumerate(blocks.split(BATCH_SIZE)):
        if selected is None:
            logits = model(input_ids=ids).logits[:, PROMPT - 1 : -1]
        else:
            gates = selected[number * BATCH_SIZE :][: len(ids)].float()
            with model.rank_router.gated(gates):
                logits = model(input_ids=ids).logits[:, PROMPT - 1 : -1]
        total += functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT:].flatten(), reduction="sum").item()
        kept.append(logits.log_softmax(-1))
        if expected is not None:
            wanted = expected[number]
            divergence += (wanted.exp() * (wanted - kept[-1])).sum().item()
    count = len(blocks) * (LENGTH - PROMPT)
    return {"loss": total / count, "perplexity": math.exp(total / count), "divergence": divergence / count}, kept


@torch.no_grad()
def prompts_of(routed, blocks):
    """Return what the router sees of the first half of each block."""
    return pool_embeddings(embeddings_of(routed, {"input_ids": blocks[:, :PROMPT]}), None)


def choices(routed, blocks, ratio, kind, importance=None):
    """Return ``(num, experts)``: what runs for each block.

    Args:
        routed: The model.
        blocks: Their first halves are the prompts.
        ratio: Active share.
        kind: ``"routed"``; ``"average"``: the trained scores of the average prompt, for all alike; ``"oracle"``: the
            experts of most ``importance`` for each block.
        importance: ``(num, experts)``.
    """
    router = routed.rank_router
    if kind == "routed":
        scores = router(prompts_of(routed, blocks)).detach()
    elif kind == "average":
        scores = router.bias.detach().expand(len(blocks), -1)
    else:
        scores = importance / router.table.costs
    return select_experts(scores, router.table, router.budgets(ratio), router.router_config.allocation)


def oracle_importance(routed, blocks, *, num_samples, seed=0):
    """Return each expert's importance for the second half of each block, which a router cannot know."""
    generator = torch.Generator().manual_seed(seed)
    positions = (torch.arange(LENGTH) >= PROMPT - 1).expand(BATCH_SIZE, -1)
    return torch.cat(
        [
            expert_importance(
                routed, {"input_ids": ids}, positions=positions[: len(ids)], num_samples=num_samples, generator=generator
            )
            for ids in blocks.split(BATCH_SIZE)
        ]
    )
