"""Language-model text: tokens in blocks of one length, from folders of parquet files; and the language tasks."""

import ast
import importlib.util
import math
import os
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, default_data_collator

from benchmarks.tasks.workload import Workload, split_rows

LLAMA = os.environ.get("JACTUS_LLAMA", "outputs/llama-novels")
SMOLLM2 = os.environ.get("JACTUS_SMOLLM2", "outputs/smollm2")
# Tokens in a row of the language tasks, and rows to score on at most.
LENGTH = 256
MAX_TEST_BLOCKS = 300
# By corpus: which column holds the text, and what parts one row from the next.
COLUMNS = {
    "novels": "text",
    "ptb": "sentence",
    "wikitext2": "text",
    "ag_news": "text",
    "gsm8k": "question",
    "trec": "text",
}
# Whose docstrings are the corpus of that name; every fourth file is the test split.
DOCUMENTED = ("sklearn", "torch")


def load_texts(data_dir, corpus, split, *, seed=None):
    """Return the texts of one split that are not empty, shuffled if a seed is given."""
    if corpus == "docstrings":
        return docstrings(split)
    rows = load_dataset("parquet", data_dir=str(Path(data_dir) / corpus), split=split)
    rows = rows if seed is None else rows.shuffle(seed=seed)
    return [text.strip() for text in rows[COLUMNS[corpus]] if text.strip()]


def docstrings(split):
    """Return the docstrings of installed packages, in the order of their files."""
    texts = []
    for package in DOCUMENTED:
        files = sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py"))
        chosen = [file for number, file in enumerate(files) if (number % 4 == 0) == (split == "test")]
        nodes = (node for file in chosen for node in syntax_nodes(file.read_text(encoding="utf-8")))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts += filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, kinds)))
    return texts


def syntax_nodes(code):
    """Return the nodes of its syntax tree; none of code for a newer Python, of which packages install some."""
    try:
        return list(ast.walk(ast.parse(code)))
    except SyntaxError:
        return []


def load_blocks(data_dir, corpus, split, tokenizer, *, length, max_blocks=None, seed=None):
    """Return ``(blocks, length)`` token ids: rows are joined, with a newline between, and cut.

    Args:
        data_dir: Folder of the corpora.
        corpus: One of `COLUMNS`, or ``"docstrings"``.
        split: Of the corpus.
        tokenizer: Its ids.
        length: Tokens in a block.
        max_blocks: Return so many at most.
        seed: Shuffle rows of novels, which are long, before they are joined; and then the blocks.
    """
    texts = load_texts(data_dir, corpus, split, seed=seed if corpus == "novels" else None)
    tokens, needed = [], math.inf if max_blocks is None else max_blocks * length
    for start in range(0, len(texts), 1000):
        batch = [text + "\n" for text in texts[start : start + 1000]]
        tokens += chain.from_iterable(tokenizer(batch, add_special_tokens=False)["input_ids"])
        if len(tokens) >= needed and corpus == "novels":  # of the others, blocks are shuffled over all text
            break
    blocks = torch.tensor(tokens[: len(tokens) // length * length]).reshape(-1, length)
    if seed is not None:
        blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]
    return blocks[:max_blocks]


def mixed_blocks(data_dir, corpora, tokenizer, *, length, num_blocks, seed):
    """Return blocks of several corpora in equal parts, shuffled; a small corpus is repeated.

    A corpus is a name, whose training split is meant, or ``"name/split"``.
    """
    share = num_blocks // len(corpora)
    parts = []
    for corpus in corpora:
        name, _, split = corpus.partition("/")
        blocks = load_blocks(data_dir, name, split or "train", tokenizer, length=length, max_blocks=share, seed=seed)
        parts.append(blocks.repeat(-(-share // len(blocks)), 1)[:share])
    blocks = torch.cat(parts)
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]


def as_dataset(blocks):
    """Return blocks as rows of a data set for the Trainer."""
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")


def train_tokenizer(texts, vocab_size):
    """Train a byte-level BPE that starts each text with ``<s>``, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def load_workload(data_dir, task, *, num_rows, scored_on):
    """Return blocks of a corpus, the same for every seed; of wikitext2 the validation split is trained on."""
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    splits = {"train": "validation" if task == "wikitext2" else "train", "test": "test"}
    data = {name: as_dataset(load_blocks(data_dir, task, of, tokenizer, length=LENGTH)) for name, of in splits.items()}
    train, test = split_rows(data, num_rows=num_rows, scored_on=scored_on, max_test_rows=MAX_TEST_BLOCKS)
    return Workload(
        train,
        test,
        default_data_collator,
        lambda: AutoModelForCausalLM.from_pretrained(LLAMA),
        None,
        task_type="CAUSAL_LM",
        head=None,
    )
