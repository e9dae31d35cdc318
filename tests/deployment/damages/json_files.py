"""config.json and the index of shards."""

import pickle
import re

from tests.deployment.damages.checkpoints import (
    A_LAYER,
    A_PART,
    HEAD,
    INDEX,
    RANK,
    SHARDS,
    STORAGES,
    WEIGHTS,
    Damage,
    edit_compression,
    edit_json,
    factorised_layers,
    targeted_layers,
    write,
)

LAYER = re.escape(A_LAYER["bert"])
NAN, INFINITY = float("nan"), float("inf")
MISMATCH = "ignore_mismatched_sizes"  # what transformers calls a tensor of another shape, without naming it


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def set_fields(**fields):
    """Change fields of the `quantization_config`."""
    return lambda folder: edit_compression(folder, lambda config: config.update(fields))


def set_model_fields(**fields):
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(fields))


def set_form(layer, **fields):
    return lambda folder: edit_compression(folder, lambda config: config["layers"][layer].update(fields))


def edit_layers(change):
    return lambda folder: edit_compression(folder, lambda config: change(config["layers"]))


# -- ranks and storages -----------------------------------------------------------------------------------


def edited_ranks():
    for checkpoint in STORAGES:
        for name, layer in targeted_layers(checkpoint).items():
            rank = RANK if name in factorised_layers(checkpoint) else min(layer.weight.shape)
            for new in (rank - 1, rank + 1):
                message = f"{re.escape(name)}(: config.json describes a| rank {new}; its weight is)"
                yield Damage(f"rank {new} for {name}", checkpoint, set_form(name, rank=new), message)
    for rank in (32, 33, 2**31, 2**63, 10**300):
        message = rf"config.json gives the pivoted {LAYER} rank {rank}; its weight is 32 x 48"
        yield Damage(f"rank {rank:.3g}", "bert", set_form(A_LAYER["bert"], rank=rank), message)
    for rank in (0, -1, -(2**63), 4.0, NAN, INFINITY, "4", True, None, [4], {"rank": 4}, nested(50)):
        message = rf"layers\['{LAYER}'\].rank` must be a positive integer; got"
        yield Damage(f"rank {rank!r:.20}", "bert", set_form(A_LAYER["bert"], rank=rank), message)


def edited_forms():
    for checkpoint, storage in STORAGES.items():
        for name in factorised_layers(checkpoint)[::2]:
            at = re.escape(name)
            apply = edit_layers(lambda layers, n=name: layers.pop(n))
            yield Damage(f"{name} not listed", checkpoint, apply, rf"does not list \['{at}'\]")
            other = {"factored": "pivoted", "pivoted": "factored"}[storage]
            message = rf"{at}: config.json describes a {other} layer"
            yield Damage(f"{name} {other}", checkpoint, set_form(name, storage=other), message)
            message = rf"config.json gives the dense {at} rank 4"
            yield Damage(f"{name} dense", checkpoint, set_form(name, storage="dense"), message)
            full = min(targeted_layers(checkpoint)[name].weight.shape)
            message = rf"{at}: config.json describes a dense layer"
            apply = set_form(name, storage="dense", rank=full)
            yield Damage(f"{name} dense of rank {full}", checkpoint, apply, message)
    for storage in ("unknown", "", "Factored", None, 1, ["factored"], {"factored": 4}):
        message = rf"layers\['{LAYER}'\].storage` must be one of"
        yield Damage(f"storage {storage!r}", "bert", set_form(A_LAYER["bert"], storage=storage), message)
    for kept in (-0.1, 1.1, NAN, INFINITY, "0.5", True, [0.5]):
        message = rf"layers\['{LAYER}'\].energy_kept` must be null or in \[0, 1\]"
        yield Damage(f"energy_kept {kept!r}", "bert", set_form(A_LAYER["bert"], energy_kept=kept), message)
    dense = {"storage": "dense", "rank": 32}
    for form in ([], {}, None, 4, "pivoted", {"rank": 4}, {"storage": "dense"}, {**dense, "more": 1}, [["rank", 4]]):
        apply = edit_layers(lambda layers, f=form: layers.update({A_LAYER["bert"]: f}))
        message = rf"layers\['{LAYER}'\]` must have `storage`, `rank` and perhaps"
        yield Damage(f"form {form!r}", "bert", apply, message)


def added_layers():
    def add(name, storage, rank):
        return edit_layers(lambda layers: layers.update({name: {"storage": storage, "rank": rank}}))

    for name in ("bert.encoder.layer.2.output.dense", "new", "", "a" * 1000, "bert.*", "../bert", "lm_head"):
        message = rf"lists \['{re.escape(name)}'\], which the checkpoint does not hold"
        yield Damage(f"layer {name[:40]!r} added", "bert", add(name, "dense", 32), message)
    for name in ("bert.embeddings.LayerNorm", "bert.embeddings.word_embeddings"):
        for storage, rank in (("dense", 32), ("pivoted", 4)):
            message = rf"config.json lists {name} as a linear layer; in this model it is a "
            yield Damage(f"{name} as {storage} layer", "bert", add(name, storage, rank), message)


# -- the rest of config.json ------------------------------------------------------------------------------


def edited_fields():
    for version in (0, 2, -1, 10**300, 1.5, 1.0, "1", True, None, [1], NAN, {"version": 1}):
        message = r"quantization_config.format_version` is .*this is peft-jactus .*, which reads version 1"
        yield Damage(f"format_version {version!r:.20}", "bert", set_fields(format_version=version), message)
    for layers in (None, [], {}, 4, "all", [["bert.pooler.dense", 4]]):
        message = r"quantization_config.layers` must say how each layer is stored"
        yield Damage(f"layers {layers!r}", "bert", set_fields(layers=layers), message)
    for ratio in (-1, 1.5, 10**300, NAN, INFINITY, "0.6", True, [0.6], nested(50)):
        message = r"quantization_config.retained_ratio` must be null or in \[0, 1\]"
        yield Damage(f"retained_ratio {ratio!r:.20}", "bert", set_fields(retained_ratio=ratio), message)
    for field in ("base_model", "peft_jactus_version", "transformers_version"):
        for value in (1, ["name"], {"name": nested(50)}, True):
            apply = set_fields(**{field: value})
            yield Damage(f"{field} {value!r:.20}", "bert", apply, rf"quantization_config.{field}` must be")
    for field in ("more", "dequantize", "modules_to_not_convert", "dtype", "__class__", "self"):
        message = rf"unknown fields: \['{field}'\]"
        yield Damage(f"field {field} added", "bert", set_fields(**{field: True}), message)


def without(*path):
    def change(config):
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return lambda folder: edit_json(folder / "config.json", change)


def removed_fields():
    yield Damage("no layers", "bert", without("quantization_config", "layers"), "layers` must say how each")
    yield Damage("no quant_method", "bert", without("quantization_config", "quant_method"), "no `quant_method`")
    yield Damage("quant_method null", "bert", set_fields(quant_method=None), "no `quant_method`")
    yield Damage("quantization_config {}", "bert", set_model_fields(quantization_config={}), "no `quant_method`")
    for checkpoint in STORAGES:
        # Nothing of this package runs then, but a placeholder has not the shape of a weight.
        yield Damage("no quantization_config", checkpoint, without("quantization_config"), MISMATCH)
        yield Damage("quantization_config null", checkpoint, set_model_fields(quantization_config=None), MISMATCH)
        for method in ("jactus2", "JACTUS", 4):
            yield Damage(f"quant_method {method!r}", checkpoint, set_fields(quant_method=method), MISMATCH)


def edited_models():
    for checkpoint in STORAGES:
        describes = "config.json describes a"
        yield Damage("hidden_size 64", checkpoint, set_model_fields(hidden_size=64), describes)
        yield Damage("intermediate_size 96", checkpoint, set_model_fields(intermediate_size=96), describes)
        yield Damage("vocab_size 95", checkpoint, set_model_fields(vocab_size=95), MISMATCH)
        for depth in (1, 3):
            apply = set_model_fields(num_hidden_layers=depth)
            yield Damage(f"{depth} blocks", checkpoint, apply, "has no layers .* with the same number of blocks")
    yield Damage("4 labels", "bert", set_model_fields(id2label={i: str(i) for i in range(4)}), MISMATCH)
    yield Damage("model_type roberta", "bert", set_model_fields(model_type="roberta"), "RobertaFor.* has no layers")
    yield Damage("model_type null", "bert", set_model_fields(model_type=None), "model type `None`")

    def enlarge(config):
        # Too much memory for anybody, if anything were to be allocated.
        config.update(hidden_size=2**30, intermediate_size=2**30)
        for name in factorised_layers("bert"):
            config["quantization_config"]["layers"][name]["rank"] = 2**29

    message = "config.json describes a pivoted layer of rank 536870912"
    yield Damage("features 2**30, rank 2**29", "bert", lambda f: edit_json(f / "config.json", enlarge), message)


def broken_configs():
    def cut(length):
        return lambda folder: write(folder / "config.json", (folder / "config.json").read_bytes()[:length])

    def replace(content):
        return lambda folder: write(folder / "config.json", content)

    message = "/config.json' is not a valid JSON file"
    for length in (0, 1, 100, 1000):
        yield Damage(f"config.json cut to {length} bytes", "bert", cut(length), message)
    contents = {
        "a pickle": pickle.dumps({}),
        "zeros": bytes(100),
        "UTF-16": "{}".encode("utf-16"),
        "text": b"{'a': 1}",
    }
    for name, content in contents.items():
        yield Damage(f"config.json is {name}", "bert", replace(content), message)
    yield Damage("config.json is {}", "bert", replace(b"{}"), "`model_type` key in its config.json")
    yield Damage("no config.json", "bert", lambda folder: (folder / "config.json").unlink(), "config.json")


# -- the index --------------------------------------------------------------------------------------------


def edit_index(change):
    return lambda folder: edit_json(folder / INDEX, change)


def edit_weight_map(change):
    return edit_index(lambda index: change(index["weight_map"]))


def broken_indices():
    def replace(content):
        return lambda folder: write(folder / INDEX, content)

    contents = {
        "empty": b"",
        "not JSON": b"{",
        "not UTF-8": b'{"\xff": 1}',
        "a list": b"[]",
        "null": b"null",
        "a pickle": pickle.dumps({}),
        "nested lists": b"[" * 100_000,
        "nested objects": b'{"weight_map":' * 100_000,
    }
    for name, content in contents.items():
        yield Damage(f"index is {name}", "llama", replace(content), f"/{INDEX} cannot be read as the index")
    must = f"/{INDEX} must have `metadata`, and `weight_map`"
    for value in (None, [], 4, "x", [["a", "b"]]):
        yield Damage(f"weight_map {value!r}", "llama", edit_index(lambda i, v=value: i.update(weight_map=v)), must)
        yield Damage(f"index metadata {value!r}", "llama", edit_index(lambda i, v=value: i.update(metadata=v)), must)
    yield Damage("weight_map {}", "llama", edit_index(lambda i: i.update(weight_map={})), must)
    for field in ("weight_map", "metadata"):
        apply = edit_index(lambda i, f=field: i.pop(f))
        yield Damage(f"index without {field}", "llama", apply, f"/{INDEX} cannot be read as the index")
    for value in (None, 1, [], {}, ["a"], True):
        yield Damage(f"file {value!r}", "llama", edit_weight_map(lambda m, v=value: m.update({HEAD: v})), must)


def edited_indices():
    does_not_say = f"/{INDEX} does not say where these tensors are"
    for file in SHARDS:
        apply = edit_weight_map(lambda m, f=file: m.update(dict.fromkeys(m, f)))
        yield Damage(f"all tensors in {file}", "llama", apply, "does not hold the tensors|" + does_not_say)
    apply = edit_weight_map(lambda m: m.pop(HEAD))
    yield Damage("index without a tensor", "llama", apply, rf"missing \['{HEAD}'\]")
    apply = edit_weight_map(lambda m: m.update(new=SHARDS[0]))
    yield Damage("index with a tensor more", "llama", apply, rf"{does_not_say}: \['new'\]")
    part = A_PART["llama"]
    apply = edit_weight_map(lambda m: m.update({HEAD: m[part], part: m[HEAD]}))
    yield Damage("index with two files exchanged", "llama", apply, does_not_say)
    for file in ("x.safetensors", WEIGHTS, SHARDS[0].upper().replace("SAFETENSORS", "safetensors"), "\0.safetensors"):
        apply = edit_weight_map(lambda m, f=file: m.update({HEAD: f}))
        yield Damage(f"file {file!r}", "llama", apply, r"safetensors cannot be read as safetensors")
    for file in ("", ".", "config.json", "a" * 300):
        apply = edit_weight_map(lambda m, f=file: m.update({HEAD: f}))
        yield Damage(f"file {file[:30]!r}", "llama", apply, "not a safetensors file|outside of its folder")


def escaping_indices():
    outside = "names files outside of its folder"
    others = ("../x.safetensors", f"../other/{SHARDS[2]}", "/etc/passwd", "/dev/null", "sub/x.safetensors", "/")
    for file in others:
        apply = edit_weight_map(lambda m, f=file: m.update({HEAD: f}))
        yield Damage(f"file {file!r}", "llama", apply, outside)
    for prefix in ("../other/", "./../other/", "sub/../../other/", "{parent}/other/"):

        def apply(folder, prefix=prefix):
            start = prefix.format(parent=folder.parent)
            edit_weight_map(lambda m: m.update({name: start + file for name, file in m.items()}))(folder)

        yield Damage(f"all files in {prefix}", "llama", apply, outside)
