"""Tensors that are missing, exchanged or changed, under a header that is well-formed."""

import re

import torch
from safetensors.torch import load_file

from tests.deployment.damages.checkpoints import (
    A_LAYER,
    A_PART,
    STORAGES,
    WEIGHTS,
    Damage,
    edit_tensor,
    edit_tensors,
    file_of,
    flip_bit,
    tensors_of,
)


def missing_tensors():
    def drop(name):
        return lambda folder: edit_tensors(file_of(folder, name), lambda tensors: tensors.pop(name))

    def rename(name):
        return lambda folder: edit_tensors(folder / WEIGHTS, lambda ts: ts.update({f"{name}_": ts.pop(name)}))

    for name in tensors_of("bert"):
        yield Damage(f"without {name}", "bert", drop(name), rf"missing \['{re.escape(name)}'\]")
    for name in list(tensors_of("llama"))[::4]:
        yield Damage(f"without {name}", "llama", drop(name), rf"index.json does not say .*\['{re.escape(name)}'\]")
    for name in list(tensors_of("bert"))[::8]:
        yield Damage(f"{name} renamed", "bert", rename(name), rf"missing \['{re.escape(name)}'\], unknown")


def exchanged_tensors():
    def exchange(first, second):
        def apply(folder):
            values = {name: load_file(file_of(folder, name))[name] for name in (first, second)}
            edit_tensor(folder, first, lambda _: values[second])
            edit_tensor(folder, second, lambda _: values[first])

        return apply

    for checkpoint in STORAGES:
        for name, tensor in tensors_of(checkpoint).items():
            if ".0." in name and tensor.numel() > 1:  # placeholders are all the same
                other = name.replace(".0.", ".1.")
                message = rf"2 tensors .* are not what was saved: .*{re.escape(name)}"
                yield Damage(f"{name} exchanged for {other}", checkpoint, exchange(name, other), message)


def changed_tensors():
    def edit(name, change):
        return lambda folder: edit_tensor(folder, name, change)

    changes = {
        "zeros": torch.zeros_like,
        "NaN": lambda t: torch.full_like(t, torch.nan),
        "negated": torch.neg,
        "transposed": lambda t: t.mT.contiguous(),
        "flat": torch.flatten,
        "float16": torch.Tensor.half,
        "float64": torch.Tensor.double,
        "of one row less": lambda t: t[:-1].clone(),
        "empty": lambda t: t[:0].clone(),
        "a number": lambda t: t[0, 0].clone(),
    }
    embeddings = "bert.embeddings.word_embeddings.weight"
    for what, change in changes.items():
        for checkpoint, name in (*A_PART.items(), ("bert", embeddings)):
            message = rf"1 tensors .* are not what was saved: \['{re.escape(name)}'\]"
            yield Damage(f"{name} {what}", checkpoint, edit(name, change), message)


def flipped_bits():
    def flip(name, position):
        return lambda folder: flip_bit(file_of(folder, name), name, position)

    for checkpoint in STORAGES:
        for name, tensor in list(tensors_of(checkpoint).items())[::3]:
            message = rf"1 tensors .* are not what was saved: \['{re.escape(name)}'\]"
            yield Damage(f"first byte of {name} flipped", checkpoint, flip(name, 0), message)
            if tensor.numel() > 1:
                yield Damage(f"last byte of {name} flipped", checkpoint, flip(name, 1), message)
                yield Damage(f"middle of {name} flipped", checkpoint, flip(name, 0.5), message, verify=True)


def signed_tensors():
    """Tensors that cannot be loaded, with digests that match: made on purpose."""

    def edit(name, change):
        return lambda folder: edit_tensor(folder, name, change, sign=True)

    def drop(name):
        return lambda folder: edit_tensors(folder / WEIGHTS, lambda tensors: tensors.pop(name), sign=True)

    layer = A_LAYER["bert"]
    indices = [name for name in tensors_of("bert") if name.endswith("_index")]
    changes = {
        "out of range": lambda t: t + 1,
        "negative": lambda t: t - 1,
        "with a huge number": lambda t: t.index_fill(0, torch.tensor([3]), 2**31 - 1),
        "with the least number": lambda t: t.index_fill(0, torch.tensor([3]), -(2**31)),
        "all zero": torch.zeros_like,
        "with a number twice": lambda t: torch.cat([t[:1], t[:-1]]),
        "int8": torch.Tensor.char,
        "int64": torch.Tensor.long,
        "bool": torch.Tensor.bool,
    }
    for what, change in changes.items():
        for name in sorted({indices[0], indices[-1], f"{layer}.row_index"}):
            message = rf"{re.escape(name)} must hold each of 0 to 31 once"
            yield Damage(f"signed {name} {what}", "bert", edit(name, change), message)
    message = rf"{re.escape(layer)}: config.json describes a pivoted layer of rank 4, with tensors"
    for name in tensors_of("bert"):
        if name.startswith(f"{layer}."):
            other_type = torch.Tensor.float if name.endswith("_index") else torch.Tensor.int
            yield Damage(f"signed {name} of another type", "bert", edit(name, other_type), message)
            yield Damage(f"signed {name} twice as long", "bert", edit(name, lambda t: torch.cat([t, t])), message)
            if name != f"{layer}.weight":
                yield Damage(f"signed, without {name}", "bert", drop(name), message)
    message = rf"lists \['{re.escape(layer)}'\], which the checkpoint does not hold"
    yield Damage(f"signed, without {layer}.weight", "bert", drop(f"{layer}.weight"), message)
