"""What is damaged, and the tools to do it.

A `Damage` changes a directory with a copy of one of two checkpoints: ``bert``, pivoted, in one file, and ``llama``,
factored, in shards. Beside it is ``other``, a Llama of the same shapes with other numbers.
"""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from peft_jactus.deployment.integrity import digest_metadata
from peft_jactus.deployment.layers import FORMS
from tests.support.compressed_models import tiny_bert, tiny_llama

BUILD = {"bert": tiny_bert, "llama": tiny_llama}
STORAGES = {"bert": "pivoted", "llama": "factored"}
RANK = 4  # of all layers but these
DENSE_LAYERS = r".*(intermediate\.dense|v_proj)"

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_SIZE = 12_000  # bytes
SHARDS = [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]

# Layers and tensors that stand for all others.
A_LAYER = {"bert": "bert.encoder.layer.0.output.dense", "llama": "model.layers.0.mlp.down_proj"}
A_PART = {"bert": f"{A_LAYER['bert']}.rows.weight", "llama": f"{A_LAYER['llama']}.down.weight"}
HEAD = "lm_head.weight"  # of the Llama: alone in its shard


@dataclass(frozen=True)
class Damage:
    """One way to damage one checkpoint.

    Attributes:
        name: For people.
        checkpoint: ``"bert"`` or ``"llama"``.
        apply: Changes the directory.
        message: What the error says, a regular expression.
        verify: Whether it is found with ``verify=True`` only.
    """

    name: str
    checkpoint: str
    apply: Callable[[Path], None]
    message: str
    verify: bool = False

    def __str__(self):
        return f"{self.checkpoint}: {self.name}"


@cache
def targeted_layers(checkpoint):
    """Return the linear layers that ``target_modules="all-linear"`` finds, by name."""
    model = BUILD[checkpoint]()
    heads = ("classifier", "lm_head")
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in heads}


def factorised_layers(checkpoint):
    return [name for name in targeted_layers(checkpoint) if not re.fullmatch(DENSE_LAYERS, name)]


@cache
def tensors_of(checkpoint):
    """Return the tensors of a checkpoint, by name, without their values."""
    model = BUILD[checkpoint]()
    for name in factorised_layers(checkpoint):
        layer = targeted_layers(checkpoint)[name]
        out_features, in_features = layer.weight.shape
        empty = FORMS[STORAGES[checkpoint]].empty(in_features, out_features, RANK, bias=layer.bias is not None)
        model.set_submodule(name, empty)
    return model.state_dict()


# -- bytes ------------------------------------------------------------------------------------------------


def write(path, content):
    """Write a new file: the old one is shared with other copies of the checkpoint."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def split(path):
    """Return the header and the data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


def join(path, header, data):
    write(path, struct.pack("<Q", len(header)) + header + data)


def flip_bit(path, tensor, position):
    """Flip a bit at ``position``, in [0, 1], of a tensor's data."""
    header, data = split(path)
    start, stop = json.loads(header)[tensor]["data_offsets"]
    data = bytearray(data)
    data[min(start + int((stop - start) * position), stop - 1)] ^= 0x10
    join(path, header, bytes(data))


# -- changes in place: each takes a function that changes what it is given ----------------------------------


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write(path, json.dumps(content).encode())


def edit_compression(folder, change):
    edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))


def edit_header(path, change):
    header, data = split(path)
    header = json.loads(header)
    change(header)
    join(path, json.dumps(header).encode(), data)


def edit_tensors(path, change, *, sign=False):
    """Change the tensors of a file; the digests in its header only if ``sign``."""
    metadata = json.loads(split(path)[0])["__metadata__"]
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata | (digest_metadata(tensors) if sign else {}))


def edit_tensor(folder, name, change, *, sign=False):
    edit_tensors(file_of(folder, name), lambda tensors: tensors.update({name: change(tensors[name])}), sign=sign)


def file_of(folder, tensor):
    """Return the file that has a tensor of an undamaged checkpoint."""
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS
    return folder / json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"][tensor]
