"""Routed models of a Llama: how they are made, trained and scored."""

import copy
import math
import statistics
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from benchmarks.tasks.language import SMOLLM2, as_dataset, load_blocks, mixed_blocks
from peft_jactus import JactusConfig, calibrate
from peft_jactus.deployment.export import compressed_copy
from peft_jactus.parse import RouterTrainer, routed_copy
from peft_jactus.parse.experts import relaxed_gates, select_experts
from peft_jactus.parse.inputs import pool_states, prompt_states

DECOMPOSITIONS = ("svd", "fwsvd", "asvd", "svd-llm", "jactus")
LENGTH = 256
# What a prompt is; the other half of a block is scored.
PROMPT = 128
CALIBRATION_BLOCKS = 128
BATCH_SIZE = 16


@dataclass(frozen=True)
class Subject:
    """A language model, and the texts of its study.

    Attributes:
        title: What a report calls it.
        path: Where it is.
        calibrated_on: Corpus and split.
        tested_on: Corpora.
        routed_on: By name, corpora that a router is trained on, in equal parts, and where it is not "train", their
            split; the main one first.
        expert_size: Ranks that are chosen together.
        studied: Decomposition whose routers are varied.
        batch_size: Of the router's training: the logits of 16 blocks of a large vocabulary take a gigabyte, several
            times.
    """

    title: str
    path: str
    calibrated_on: tuple[str, str]
    tested_on: tuple[str, ...]
    routed_on: dict[str, tuple[str, ...]]
    expert_size: int = 8
    batch_size: int = 16
    studied: str = "svd-llm"


SUBJECTS = {
    "small": Subject(
        "a small Llama",
        "outputs/llama-broad",
        ("novels", "train"),
        ("novels", "ptb", "wikitext2"),
        {"broad": ("novels", "ptb", "ag_news", "gsm8k"), "novels": ("novels",)},
    ),
    # Prompts of unlike kinds: encyclopedia, financial news, news, school mathematics, questions, documentation.
    "smollm2": Subject(
        "SmolLM2-135M-Instruct",
        SMOLLM2,
        ("wikitext2", "validation"),
        ("wikitext2", "ptb", "ag_news", "gsm8k", "trec", "docstrings"),
        {
            "broad": ("novels", "ptb", "ag_news", "gsm8k", "trec", "docstrings"),
            "all kinds": ("novels", "ptb", "ag_news", "gsm8k", "trec", "docstrings", "wikitext2/validation"),
        },
        expert_size=16,
        batch_size=4,
        studied="jactus",
    ),
}


def load_dense(subject):
    model = AutoModelForCausalLM.from_pretrained(subject.path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def load_corpora(subject, data_dir, *, num_test):
    """Return calibration blocks, and test blocks by corpus."""
    options = {"tokenizer": AutoTokenizer.from_pretrained(subject.path), "length": LENGTH}
    calibration = load_blocks(data_dir, *subject.calibrated_on, max_blocks=CALIBRATION_BLOCKS, seed=1, **options)
    test = {
        name: load_blocks(data_dir, name, "test", max_blocks=num_test, seed=0, **options) for name in subject.tested_on
    }
    return calibration, test


def router_corpus(subject, data_dir, names, num_blocks, *, calibration, seed, length=LENGTH):
    """Return blocks of several corpora in equal parts, without those of the calibration."""
    tokenizer = AutoTokenizer.from_pretrained(subject.path)
    blocks = mixed_blocks(data_dir, names, tokenizer, length=length, num_blocks=num_blocks, seed=2 + seed)
    seen = set(map(tuple, calibration.reshape(-1, length).tolist()))
    return blocks[[tuple(block) not in seen for block in blocks.tolist()]]


def batches_of(blocks):
    return [{"input_ids": ids, "labels": ids} for ids in blocks.split(BATCH_SIZE)]


def statistics_for(dense, blocks):
    """Return statistics that serve every decomposition."""
    config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", decomposition="fwsvd", adaptation_rank=0)
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
        adaptation_rank=0,
        rank_multiple=1,  # all of the budget, as routed ranks are given
    )
    config.statistics = statistics
    return compressed_copy(get_peft_model(copy.deepcopy(dense), config)).eval().requires_grad_(False)


def routed_model(dense, statistics, decomposition, pool_ratio, config):
    """Return an untrained routed model; the ratio of its ranks counts pivoted layers, to have many."""
    pool = compressed(dense, statistics, decomposition, pool_ratio, storage="pivoted")
    return routed_copy(pool, config, statistics=statistics, decomposition=decomposition, progress_bar=False)


def train_router(routed, dense, blocks, folder, *, batch_size, seed, epochs=1, learning_rate=2e-3, **options):
    args = TrainingArguments(
        output_dir=folder,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=batch_size,
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
    total, divergences, kept = 0.0, [], []
    for number, ids in enumerate(blocks.split(BATCH_SIZE)):
        if selected is None:
            logits = model(input_ids=ids).logits[:, PROMPT - 1 : -1].float()
        else:
            gates = selected[number * BATCH_SIZE :][: len(ids)].float()
            with model.rank_router.gated(gates):
                logits = model(input_ids=ids).logits[:, PROMPT - 1 : -1].float()
        total += functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT:].flatten(), reduction="sum").item()
        kept.append(logits.log_softmax(-1))
        if expected is not None:
            # In float64: some divergences are below the rounding of float32.
            wanted, found = (values.double().log_softmax(-1) for values in (expected[number], logits))
            divergence = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(2).mean(1)
            divergences += divergence.tolist()
    loss = total / len(blocks) / (LENGTH - PROMPT)
    figures = {"loss": loss, "perplexity": math.exp(loss)}
    if divergences:
        figures |= {"divergence": statistics.mean(divergences), "divergence_by_block": divergences}
    return figures, kept


def read_by_router(routed, input_ids, attention_mask=None):
    """Return the means ``(num, dim)`` of what the router reads of prompts."""
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    return pool_states(prompt_states(routed, batch, routed.rank_router.router_config.router_input), attention_mask)


@torch.no_grad()
def prompts_of(routed, blocks):
    """Return what the router reads of the first half of each block."""
    return read_by_router(routed, blocks[:, :PROMPT])


def choices(routed, blocks, ratio, kind):
    """Return ``(num, experts)``: what runs for each block, of which the first half is the prompt; see `choose`."""
    return choose(routed, prompts_of(routed, blocks), ratio, kind)


def choose(routed, pooled, ratio, kind):
    """Return ``(num, experts)``: what runs for each prompt.

    Args:
        routed: The model.
        pooled: ``(num, dim)``: what `read_by_router` returns.
        ratio: Active share.
        kind: ``"routed"``; or ``"average"``: the scores of the average prompt, for all alike.
    """
    router = routed.rank_router
    scores = router(pooled) if kind == "routed" else router.bias.expand(len(pooled), -1)
    return select_experts(scores, router.table, router.budgets(ratio), router.router_config.allocation)


def optimized_choices(routed, blocks, ratio, expected, *, steps, learning_rate=0.2):
    """Return the best choice found for each block by descent on its own scored half, which a router cannot see.

    Args:
        routed: The model.
        blocks: One batch.
        ratio: Active share.
        expected: Log probabilities of the dense model for the second half.
        steps: Of Adam, from the trained router's scores.
        learning_rate: Of the scores.
    """
    router = routed.rank_router
    scores = router(prompts_of(routed, blocks)).detach().requires_grad_(True)
    optimizer = torch.optim.Adam([scores], lr=learning_rate)
    best, chosen = torch.full((len(blocks),), torch.inf), None
    for _ in range(steps + 1):
        gates = relaxed_gates(
            scores, router.table, router.budgets(ratio), router.router_config.allocation, temperature=0.5
        )
        with router.gated(gates):
            logits = routed(input_ids=blocks).logits[:, PROMPT - 1 : -1].float().log_softmax(-1)
        divergence = (expected.exp() * (expected - logits)).sum((1, 2))
        is_better = divergence.detach() < best
        best = torch.where(is_better, divergence.detach(), best)
        hard = gates.detach() > 0.5
        chosen = hard if chosen is None else torch.where(is_better.unsqueeze(1), hard, chosen)
        optimizer.zero_grad()
        (divergence.sum() / divergence.numel()).backward()
        optimizer.step()
    return chosen


def overlap(first, second):
    """Return the Jaccard index of choices ``(..., experts)``: common experts over all that either has."""
    return (first & second).sum(-1) / (first | second).sum(-1)


@torch.no_grad()
def overlap_while_decoding(routed, test, ratio, *, start=64, every=16):
    """Return by corpus: lengths of text, and how much the choice for them is that for the first ``start`` tokens."""
    router = routed.rank_router

    def choose(ids):
        pooled = read_by_router(routed, ids)
        return select_experts(router(pooled), router.table, router.budgets(ratio), router.router_config.allocation)

    lengths = list(range(start, LENGTH + 1, every))
    return {
        name: {
            "lengths": lengths,
            "overlap": [overlap(choose(blocks[:, :start]), choose(blocks[:, :n])).mean().item() for n in lengths],
        }
        for name, blocks in test.items()
    }


@torch.no_grad()
def prompt_similarity(routed, test, ratio, *, width=0.1):
    """Return the mean overlap of two prompts' choices, and the number of pairs, by cosine of their router inputs."""
    router = routed.rank_router
    blocks = torch.cat(list(test.values()))
    features = router.features(prompts_of(routed, blocks))
    selected = choices(routed, blocks, ratio, "routed")
    first, second = torch.triu_indices(len(blocks), len(blocks), offset=1)
    cosines = functional.cosine_similarity(features[first], features[second])
    overlaps = overlap(selected[first], selected[second])
    bins = (cosines / width).floor().long()
    return [
        {
            "cosine": (number + 0.5) * width,
            "overlap": overlaps[bins == number].mean().item(),
            "pairs": int((bins == number).sum()),
        }
        for number in bins.unique().tolist()
    ]
