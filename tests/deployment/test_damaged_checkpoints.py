"""Damaged compressed checkpoints are refused, and the error says which file, tensor, layer or field is wrong."""

import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_jactus import DamagedCheckpointError, export_compressed, loading_options
from peft_jactus.deployment.config import QUANT_METHOD, CompressionConfig
from tests.deployment.damages import DAMAGES
from tests.deployment.damages.checkpoints import (
    BUILD,
    DENSE_LAYERS,
    HEAD,
    INDEX,
    RANK,
    SHARD_SIZE,
    SHARDS,
    STORAGES,
    WEIGHTS,
    edit_compression,
    edit_json,
    file_of,
    flip_bit,
    join,
    split,
    targeted_layers,
    tensors_of,
    write,
)
from tests.support.compressed_models import logits_of, trained

AUTO = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}
# What people can act on. DamagedCheckpointError is a ValueError; OSError and RuntimeError come from transformers.
CLEAR = (ValueError, OSError, RuntimeError)
UNCLEAR = (UnicodeError, RecursionError, NotImplementedError, json.JSONDecodeError)


def export(name, folder, *, seed=0):
    """Compress a model of which no two tensors are equal."""
    model = BUILD[name](seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    layers = targeted_layers(name)
    full = min(min(layers[layer].weight.shape) for layer in layers if re.fullmatch(DENSE_LAYERS, layer))
    model = trained(model, storage=STORAGES[name], rank_pattern={DENSE_LAYERS: full, ".*": RANK})
    shard_size = SHARD_SIZE if name == "llama" else "5GB"
    export_compressed(model, folder, max_shard_size=shard_size, progress_bar=False)
    for path in folder.iterdir():
        if path.suffix not in {".json", ".safetensors"}:  # model card, plot
            path.unlink()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in STORAGES:
        export(name, folder / name)
    export("llama", folder / "other", seed=1)
    return folder


@pytest.fixture
def copy_of(checkpoints, tmp_path):
    """Give a directory that may be damaged: a file is replaced, not written to."""

    def copy(name):
        for source in (name, "other"):
            shutil.copytree(checkpoints / source, tmp_path / source, copy_function=os.link)
        return tmp_path / name

    return copy


def load(folder):
    return AUTO[folder.name].from_pretrained(folder)


@pytest.fixture(scope="module")
def expected_logits(checkpoints):
    return {name: logits_of(load(checkpoints / name)) for name in STORAGES}


# -- refused ----------------------------------------------------------------------------------------------


def test_there_are_at_least_200_damages_of_different_names():
    assert len(DAMAGES) >= 200
    assert len(set(map(str, DAMAGES))) == len(DAMAGES)


def test_tensors_to_damage_are_those_of_the_checkpoints(checkpoints):
    header = json.loads(split(checkpoints / "bert" / WEIGHTS)[0])
    assert header.keys() - {"__metadata__"} == tensors_of("bert").keys()
    weight_map = json.loads((checkpoints / "llama" / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == tensors_of("llama").keys()
    assert sorted(set(weight_map.values())) == SHARDS
    assert [name for name, file in weight_map.items() if file == weight_map[HEAD]] == [HEAD]


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damaged_checkpoint_is_refused(copy_of, damage):
    folder = copy_of(damage.checkpoint)
    damage.apply(folder)
    with loading_options(verify=damage.verify), pytest.raises(CLEAR, match=damage.message) as caught:
        load(folder)
    assert not isinstance(caught.value, UNCLEAR)


@pytest.mark.parametrize("name", STORAGES)
def test_undamaged_checkpoint_passes_verification(checkpoints, expected_logits, name):
    with loading_options(verify=True):
        model = load(checkpoints / name)
    assert torch.equal(logits_of(model), expected_logits[name])


@pytest.mark.parametrize(
    ("checkpoint", "tensor"), [("bert", "bert.embeddings.word_embeddings.weight"), ("llama", HEAD)]
)
def test_only_verification_reads_the_middle_of_a_large_tensor(copy_of, checkpoint, tensor):
    assert tensors_of(checkpoint)[tensor].nbytes > 2 * 4096
    folder = copy_of(checkpoint)
    flip_bit(file_of(folder, tensor), tensor, 0.5)
    load(folder)
    with loading_options(verify=True), pytest.raises(DamagedCheckpointError, match=rf"\['{re.escape(tensor)}'\]"):
        load(folder)


def test_options_end_with_their_block_also_after_an_error(copy_of):
    folder = copy_of("llama")
    flip_bit(file_of(folder, HEAD), HEAD, 0.5)
    with pytest.raises(DamagedCheckpointError), loading_options(verify=True):
        load(folder)
    load(folder)


def test_a_flipped_bit_anywhere_in_a_header_is_found_or_changes_nothing(copy_of, expected_logits):
    folder = copy_of("bert")
    header, data = split(folder / WEIGHTS)
    generator = random.Random(0)
    outcomes = set()
    for _ in range(60):
        flipped = bytearray(header)
        flipped[generator.randrange(len(header))] ^= 1 << generator.randrange(8)
        join(folder / WEIGHTS, bytes(flipped), data)
        try:
            model = load(folder)
        except DamagedCheckpointError:
            outcomes.add("refused")
            continue
        outcomes.add("loaded")  # a digest of all bytes, which is compared on demand
        assert torch.equal(logits_of(model), expected_logits["bert"])
    assert outcomes == {"refused", "loaded"}


# -- no damage --------------------------------------------------------------------------------------------


def add_file(folder):
    write(folder / "more.safetensors", b"")


def add_index_of_another_variant(folder):
    index = {"metadata": {}, "weight_map": {HEAD: "model.fp16-00001-of-00001.safetensors"}}
    write(folder / "model.fp16.safetensors.index.json", json.dumps(index).encode())


def indent_json(folder):
    for path in folder.glob("*.json"):
        write(path, json.dumps(json.loads(path.read_text()), indent=8).encode())


def rename_shard(folder):
    (folder / SHARDS[2]).rename(folder / "head.safetensors")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({HEAD: "head.safetensors"}))


def forget_what_is_for_people(folder):
    edit_compression(folder, lambda config: config.update(base_model=None, retained_ratio=None))


def forget_a_dense_layer(folder):
    edit_compression(folder, lambda config: config["layers"].pop("model.layers.1.self_attn.v_proj"))


@pytest.mark.parametrize(
    "change",
    [
        add_file,
        add_index_of_another_variant,
        indent_json,
        rename_shard,
        forget_what_is_for_people,
        forget_a_dense_layer,
    ],
)
def test_what_does_not_change_the_model_is_no_damage(copy_of, expected_logits, change):
    folder = copy_of("llama")
    change(folder)
    with loading_options(verify=True):
        assert torch.equal(logits_of(load(folder)), expected_logits["llama"])


def test_symbolic_links_as_in_the_cache_of_the_hub_are_no_damage(copy_of, expected_logits):
    folder = copy_of("llama")
    blobs = folder.parent / "blobs"
    folder.rename(blobs)
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(Path("..", "blobs", path.name))
    assert torch.equal(logits_of(load(folder)), expected_logits["llama"])


def test_relative_paths_are_no_damage(copy_of, expected_logits, monkeypatch):
    folder = copy_of("llama")
    monkeypatch.chdir(folder.parent / "other")
    assert torch.equal(logits_of(load(Path("..", "llama"))), expected_logits["llama"])


# -- what others read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"null", b"4", b'{"a":' * 100_000, b'{"model_type": "bert", "quantization_config": []}'],
    ids=lambda content: content[:50].decode(),
)
def test_a_config_at_which_transformers_itself_stumbles_is_refused(copy_of, content):
    # No code of this package runs before; these errors are less clear than ours.
    folder = copy_of("bert")
    write(folder / "config.json", content)
    with pytest.raises((TypeError, AttributeError, RecursionError)):
        load(folder)


class Mark:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_a_checkpoint_is_run(copy_of):
    folder = copy_of("bert")
    mark = folder / "was run"
    write(folder / "evil.py", f"import pathlib; pathlib.Path({str(mark)!r}).touch()".encode())
    classes = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=classes))
    load(folder)
    (folder / WEIGHTS).unlink()
    pickled = pickle.dumps(Mark(mark))
    for file in (WEIGHTS, "pytorch_model.bin"):
        write(folder / file, pickled)
        with pytest.raises(DamagedCheckpointError):
            load(folder)
        (folder / file).unlink()
    assert not mark.exists()
    pickle.loads(pickled)
    assert mark.exists(), "the pickle does what it is to do"


# -- config.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORAGES)
def test_config_is_the_same_after_a_round_trip(checkpoints, tmp_path, name):
    written = json.loads((checkpoints / name / "config.json").read_text())
    config = CompressionConfig.from_dict(written["quantization_config"])
    assert json.loads(config.to_json_string()) == written["quantization_config"]
    assert config.quant_method == QUANT_METHOD
    model = load(checkpoints / name)
    assert vars(model.config.quantization_config) == vars(config)
    model.save_pretrained(tmp_path / name)
    assert json.loads((tmp_path / name / "config.json").read_text()) == written
    assert logits_of(load(tmp_path / name)).shape == logits_of(model).shape
