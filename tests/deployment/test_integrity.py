"""Digests of tensors, and what the headers of a checkpoint must agree on."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_jactus import DamagedCheckpointError
from peft_jactus.deployment.integrity import METADATA_KEY, NOT_COMPUTED, CheckpointFiles, check_index, digest_metadata

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
LARGE = 3000  # float32: more than twice the 4 KiB that are read at each end


def tensors_to_save():
    generator = torch.Generator().manual_seed(0)
    return {
        "large": torch.randn(LARGE, generator=generator),
        "matrix": torch.randn(5, 7, generator=generator),
        "number": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "index": torch.arange(6, dtype=torch.int32),
    }


def digests_of(tensors):
    return json.loads(digest_metadata(tensors)[METADATA_KEY])


def save(folder, shards, *, digests=None):
    """Write a file for each of ``shards``, and their index if there are several."""
    metadata = digest_metadata({n: t for shard in shards for n, t in shard.items()}) if digests is None else digests
    paths = [folder / f"model-{number}.safetensors" for number in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path, metadata)
    if len(paths) > 1:
        weight_map = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def in_two_files():
    tensors = tensors_to_save()
    return [{name: tensors.pop(name) for name in ("large", "index")}, tensors]


# -- digests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digests_depend_on_bytes_alone_not_on_strides_or_gradients(dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    expected = digests_of({"x": tensor})
    assert digests_of({"x": tensor.mT.contiguous().mT}) == expected
    assert digests_of({"x": torch.stack([tensor, tensor])[1]}) == expected
    if dtype.is_floating_point:
        assert digests_of({"x": torch.nn.Parameter(tensor)}) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digests_of_a_saved_tensor_are_those_of_the_tensor_in_memory(tmp_path, dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    path = tmp_path / "x.safetensors"
    save_file({"x": tensor}, path)
    assert digests_of(load_file(path)) == digests_of({"x": tensor})


def test_digests_of_edges_depend_on_shape_and_dtype():
    zeros = torch.zeros(4, 4)
    others = (zeros.reshape(16), zeros.reshape(2, 8), zeros.int(), zeros.reshape(4, 4, 1), zeros.half().repeat(2, 1))
    edges = {digests_of({"x": tensor})["x"][0] for tensor in (zeros, *others)}
    assert len(edges) == 1 + len(others)


@pytest.mark.parametrize("position", [0, 1023, 1024, LARGE // 2, LARGE - 1025, LARGE - 1024, LARGE - 1])
def test_digest_of_edges_covers_4_kib_at_both_ends_and_the_other_everything(position):
    tensor = torch.zeros(LARGE)
    changed = tensor.index_fill(0, torch.tensor([position]), 1.0)
    (edges, whole), (changed_edges, changed_whole) = (digests_of({"x": t})["x"] for t in (tensor, changed))
    assert whole != changed_whole
    is_at_an_end = position < 1024 or position >= LARGE - 1024
    assert (edges != changed_edges) == is_at_an_end


# -- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [[tensors_to_save()], in_two_files()], ids=["one file", "two files"])
def test_saved_files_are_whole(tmp_path, shards):
    files = CheckpointFiles.read(save(tmp_path, shards), tmp_path)
    assert files.entries.keys() == tensors_to_save().keys()
    assert files.entries["matrix"].shape == (5, 7)
    for all_bytes in (False, True):
        files.check_contents(all_bytes=all_bytes)


def test_all_files_are_read_and_all_tensors_that_differ_are_named(tmp_path):
    shards = in_two_files()
    metadata = digest_metadata(tensors_to_save())
    shards[0]["index"][3] = 9
    shards[1]["matrix"][0, 0] += 1
    files = CheckpointFiles.read(save(tmp_path, shards, digests=metadata))
    with pytest.raises(DamagedCheckpointError, match=r"2 tensors in .* \['index', 'matrix'\]"):
        files.check_contents(all_bytes=False)


def test_a_file_that_vanishes_after_its_header_was_read_is_an_error(tmp_path):
    paths = save(tmp_path, in_two_files())
    files = CheckpointFiles.read(paths)
    paths[1].unlink()
    with pytest.raises(DamagedCheckpointError, match=r"model-1\.safetensors cannot be read"):
        files.check_contents(all_bytes=False)


def test_without_digests_contents_are_not_compared_and_cannot_be_verified(tmp_path):
    files = CheckpointFiles.read(save(tmp_path, [tensors_to_save()], digests={METADATA_KEY: NOT_COMPUTED}))
    assert files.digests is None
    files.check_contents(all_bytes=False)
    with pytest.raises(DamagedCheckpointError, match="carries no digests: it was saved from a model spread over"):
        files.check_contents(all_bytes=True)


def test_without_digests_tensors_are_still_compared_with_the_index(tmp_path):
    paths = save(tmp_path, in_two_files(), digests={METADATA_KEY: NOT_COMPUTED})
    tensors = load_file(paths[1])
    del tensors["matrix"]
    save_file(tensors, paths[1], {METADATA_KEY: NOT_COMPUTED})
    with pytest.raises(DamagedCheckpointError, match=r"index.json does not say .* \['matrix'\]"):
        CheckpointFiles.read(paths)


def test_files_must_be_in_the_folder(tmp_path):
    folder, outside = tmp_path / "a", tmp_path / "b"
    for path in (folder, outside):
        path.mkdir()
    path = save(outside, [tensors_to_save()])[0]
    CheckpointFiles.read([path], outside)
    CheckpointFiles.read([path], "organisation/name on the Hub")
    for escaping in (path, folder / ".." / "b" / path.name):
        with pytest.raises(DamagedCheckpointError, match="names files outside of its folder"):
            CheckpointFiles.read([escaping], folder)


# -- layers -----------------------------------------------------------------------------------------------


@pytest.fixture
def layer_files(tmp_path):
    tensors = {
        "block.0.linear.weight": torch.zeros(1),
        "block.0.linear.down.weight": torch.ones(2, 5),
        "block.0.linear.up.weight": torch.ones(4, 2, dtype=torch.bfloat16),
        "block.0.norm.weight": torch.ones(1),
        "head.weight": torch.ones(3, 4),
    }
    return CheckpointFiles.read(save(tmp_path, [tensors]))


def test_factorised_layers_must_be_listed_and_listed_layers_must_have_tensors(layer_files):
    layer_files.check_layer_names(["block.0.linear"])
    layer_files.check_layer_names(["block.0.linear", "head"])
    with pytest.raises(DamagedCheckpointError, match=r"does not list \['block.0.linear'\]"):
        layer_files.check_layer_names(["head"])
    with pytest.raises(DamagedCheckpointError, match=r"lists \['block.1.linear'\], which the checkpoint does not"):
        layer_files.check_layer_names(["block.0.linear", "block.1.linear"])


def test_layers_must_have_all_of_their_tensors_in_any_precision(layer_files):
    tensors = {"weight": torch.zeros(1), "down.weight": torch.ones(2, 5), "up.weight": torch.ones(4, 2)}
    layer_files.check_layer("block.0.linear", {k: t.to("meta", torch.float16) for k, t in tensors.items()}, "layer")
    others = (
        tensors | {"bias": torch.ones(4)},
        {name: tensor for name, tensor in tensors.items() if name != "up.weight"},
        tensors | {"up.weight": torch.ones(2, 4)},
        tensors | {"up.weight": torch.ones(4, 2, dtype=torch.int32)},
    )
    for other in others:
        with pytest.raises(DamagedCheckpointError, match=r"block.0.linear: config.json describes a layer, with"):
            layer_files.check_layer("block.0.linear", other, "layer")


def test_a_folder_without_an_index_has_no_broken_one(tmp_path):
    check_index(tmp_path)
    check_index(tmp_path / "organisation" / "name")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"index\.json cannot be read"):
        check_index(tmp_path)
