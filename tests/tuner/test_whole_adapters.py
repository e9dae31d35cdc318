"""An adapter that lacks tensors is neither saved, nor merged, nor exported, nor loaded."""

import copy
import json

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from peft_jactus import JactusConfig, compressed_copy, export_compressed
from peft_jactus.tuner import frozen_copies
from tests.support.compressed_models import tiny_bert
from tests.tuner.test_all_or_nothing import IDS, layers_of, tiny_roberta, tuned

WEIGHTS = "adapter_model.safetensors"


def last_layer(model):
    return list(layers_of(model).values())[-1]


def without_a_tensor(name):
    def change(model):
        del getattr(last_layer(model), name)["default"]

    return change


def set_to_none(model):
    last_layer(model).jactus_adapt_up["default"] = None


def emptied(model):
    """As DeepSpeed ZeRO-3 leaves what it has spread over processes."""
    up = last_layer(model).jactus_adapt_up
    up["default"] = torch.nn.Parameter(up["default"].data[:0])


def without_head(model):
    inner = model.get_base_model()
    inner.classifier = inner.classifier.original_module


def without_trained_copy(model):
    del model.get_base_model().classifier.modules_to_save["default"]


def without_bias_of_head(model):
    model.get_base_model().classifier.modules_to_save["default"].out_proj.bias = None


DAMAGES = {
    "a trained tensor": (without_a_tensor("jactus_adapt_up"), "jactus_adapt_up"),
    "a frozen tensor": (without_a_tensor("jactus_frozen_factor"), "jactus_frozen_factor"),
    "a bias": (without_a_tensor("jactus_bias"), "jactus_bias"),
    "a tensor of None": (set_to_none, "jactus_adapt_up"),
    "an empty tensor": (emptied, "jactus_adapt_up"),
    "the head": (without_head, r"4 of its \d+ tensors .*classifier"),
    "the head's trained copy": (without_trained_copy, "classifier"),
    "a tensor of the head": (without_bias_of_head, "classifier.*out_proj.bias"),
}
DAMAGED = pytest.mark.parametrize("damage", sorted(DAMAGES))


def damaged(damage, **options):
    model = tuned(tiny_roberta(), **options)
    change, message = DAMAGES[damage]
    change(model)
    return model, message


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@DAMAGED
def test_an_adapter_that_lacks_tensors_is_not_saved(damage, tmp_path):
    model, message = damaged(damage)
    with pytest.raises(RuntimeError, match=f"'default' cannot be saved: .*{message}"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RuntimeError, match=r"cannot be saved: .* tensors are missing or empty"):
        get_peft_model_state_dict(model)


def test_a_whole_adapter_is_saved_with_all_its_tensors(tmp_path):
    model = tuned(tiny_roberta())
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS).keys() == get_peft_model_state_dict(model).keys()


def test_what_is_in_the_folder_stays_if_one_of_several_adapters_cannot_be_saved(tmp_path):
    model = tuned(tiny_bert(), keep_base_weights=True)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.save_pretrained(tmp_path)
    before = files_in(tmp_path)
    with torch.no_grad():
        model.classifier.modules_to_save.default.weight.add_(1.0)  # it would be written first
    del last_layer(model).jactus_adapt_up["second"]
    with pytest.raises(RuntimeError, match="'second' cannot be saved"):
        model.save_pretrained(tmp_path)
    assert files_in(tmp_path) == before
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert files_in(tmp_path) != before


@pytest.mark.parametrize("part", ["jactus_frozen_factor", "classifier"])
def test_a_state_dict_that_lacks_tensors_is_not_saved(part, tmp_path):
    model = tuned(tiny_roberta())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if part not in name}
    with pytest.raises(RuntimeError, match=f"cannot be saved: .*{part}.* If you pass a `state_dict`"):
        model.save_pretrained(tmp_path / "new", state_dict=tensors)
    assert not (tmp_path / "new").exists()


@DAMAGED
def test_the_trainer_writes_no_checkpoint_of_an_adapter_that_lacks_tensors(damage, tmp_path):
    model, _ = damaged(damage)
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    trainer = transformers.Trainer(model=model, args=arguments)
    with pytest.raises(RuntimeError, match="'default' cannot be saved"):
        trainer.save_model(tmp_path / "checkpoint")
    assert not files_in(tmp_path / "checkpoint")


def test_a_transformers_model_is_not_saved_without_a_tensor_of_its_adapter():
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"], "decomposition": "svd"}
    model = inject_adapter_in_model(JactusConfig(**options), tiny_bert())
    del last_layer(model).jactus_adapt_up["default"]
    with pytest.raises(RuntimeError, match="cannot be saved: 1 of its"):
        get_peft_model_state_dict(model)
    model = inject_adapter_in_model(JactusConfig(**options), tiny_bert())
    model.classifier = model.classifier.original_module
    with pytest.raises(RuntimeError, match=r"cannot be saved: 2 of its .*classifier"):
        get_peft_model_state_dict(model)


@DAMAGED
def test_an_adapter_that_lacks_tensors_is_not_exported(damage, tmp_path):
    model, _ = damaged(damage)
    with pytest.raises(RuntimeError, match="'default' cannot be exported"):
        export_compressed(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RuntimeError, match="'default' cannot be exported"):
        compressed_copy(model)


@DAMAGED
@pytest.mark.parametrize("what", ["merge_adapter", "merge_and_unload"])
def test_an_adapter_that_lacks_tensors_is_not_merged(damage, what):
    model, _ = damaged(damage)
    layers = layers_of(model)
    with pytest.raises(RuntimeError, match="'default' cannot be merged"):
        getattr(model, what)()
    assert layers_of(model) == layers
    assert not any(layer.merged for layer in layers.values())


def test_an_adapter_that_no_file_has_filled_is_not_saved(tmp_path):
    folder = saved_without("jactus_adapt_up", tmp_path)
    model = tiny_roberta()
    model.load_adapter(str(folder))
    with pytest.raises(RuntimeError, match="`jactus_adapt_up` of adapter 'default' was never filled"):
        get_peft_model_state_dict(model)


def saved_without(part, tmp_path, **options):
    tuned(tiny_roberta(), **options).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(file)
    gone = [name for name in tensors if part in name]
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, file, {"format": "pt"})
    return tmp_path / "adapter"


@pytest.mark.parametrize("part", ["classifier", "out_proj.bias"])
def test_a_file_without_the_trained_head_is_not_loaded(part, tmp_path):
    folder = saved_without(part, tmp_path)
    number = {"classifier": 4, "out_proj.bias": 1}[part]
    with pytest.raises(ValueError, match=rf"lacks {number} tensors of modules that were trained whole"):
        PeftModel.from_pretrained(tiny_roberta(), folder)


@pytest.mark.parametrize("part", ["classifier", "query.jactus_adapt_up"])
def test_a_further_adapter_that_cannot_be_loaded_leaves_the_model_as_it_was(part, tmp_path):
    folder = saved_without(part, tmp_path, keep_base_weights=True)
    model = tuned(tiny_roberta(), keep_base_weights=True)
    expected, names = model(**IDS).logits, list(model.state_dict())
    with pytest.raises(ValueError, match="damaged"):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == names
    assert torch.equal(model(**IDS).logits, expected)


def test_other_errors_of_loading_are_passed_on(tmp_path):
    tuned(tiny_bert()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "UNKNOWN"}))
    model = get_peft_model(tiny_bert(), JactusConfig(target_modules=["query"], decomposition="svd"))
    with pytest.raises(KeyError, match="UNKNOWN"):
        model.load_adapter(tmp_path, "second")


@pytest.fixture
def spread(monkeypatch):
    """Return what spreads a model's frozen parameters over processes, as DeepSpeed ZeRO-3 does.

    It gives what is left in one process, as the Trainer does for saving.
    """
    monkeypatch.setattr(frozen_copies, "check_deepspeed_zero3_enabled", lambda: True)

    def apply(model):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data[:0]
        return {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}

    return apply


def test_frozen_tensors_in_shards_are_saved_from_their_copies(spread, tmp_path):
    model = tuned(tiny_roberta())
    expected = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    model.base_model.make_shardable()
    model.save_pretrained(tmp_path, state_dict=spread(model))
    saved = load_file(tmp_path / WEIGHTS)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())


def made_again(model, folder):
    del folder
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", copy.deepcopy(model.peft_config["other"]))
    model.set_adapter("default")


def loaded_again(model, folder):
    model.load_adapter(folder, "default")


@pytest.mark.parametrize("change", [made_again, loaded_again])
def test_a_copy_of_what_another_adapter_had_is_not_saved(change, spread, tmp_path):
    model = tuned(tiny_roberta(), keep_base_weights=True)
    model.save_pretrained(tmp_path / "first")
    model.base_model.make_shardable()
    change(model, tmp_path / "first")
    with pytest.raises(RuntimeError, match=r"'default' cannot be saved: .* missing or empty \(.*jactus_"):
        model.save_pretrained(tmp_path / "new", state_dict=spread(model), selected_adapters=["default"])
    assert not (tmp_path / "new").exists()
