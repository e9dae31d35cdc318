"""`save_pretrained` of a compressed model with what it may be asked for, and tools that do not know this package."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_jactus import loading_options
from peft_jactus.deployment.layers import FORMS
from tests.deployment.test_export import BUILDERS, export, layers_of, load, tensors_in
from tests.support.compressed_models import batches_for, logits_of, tiny_bert, tiny_llama, tiny_t5, tiny_vit, trained
from tests.support.routed_models import routed

STORAGES = list(FORMS)


@pytest.fixture
def loaded(tmp_path):
    """A function that compresses a model, and loads its checkpoint, by columns if asked to."""

    def make(build, *, column_layout=False, **fields):
        export(trained(build(), **fields), tmp_path / "compressed")
        with loading_options(column_layout=column_layout):
            return load(build, tmp_path / "compressed")

    return make


def halved(model):
    return {name: t / 2 if t.is_floating_point() else t.clone() for name, t in model.state_dict().items()}


def assert_holds(model, state_dict):
    tensors = model.state_dict()
    assert tensors.keys() == state_dict.keys()
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in tensors.items())


# -- another state dict -----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("build", BUILDERS)
def test_the_tensors_that_are_passed_are_saved(build, storage, loaded, tmp_path):
    model = loaded(build, storage=storage)
    averaged = halved(model)
    passed = dict(averaged)
    model.save_pretrained(tmp_path / "averaged", state_dict=passed, max_shard_size="20KB")
    assert passed.keys() == averaged.keys()
    with loading_options(verify=True):
        assert_holds(load(build, tmp_path / "averaged"), averaged)
    model.save_pretrained(tmp_path / "again")
    with loading_options(verify=True):
        assert_holds(load(build, tmp_path / "again"), model.state_dict())


def exported(tmp_path):
    return load(tiny_llama, export(trained(tiny_llama()), tmp_path / "compressed"))


def copied(tmp_path):
    return copy.deepcopy(exported(tmp_path))


def unpickled(tmp_path):
    return pickle.loads(pickle.dumps(exported(tmp_path)))


def wrapped(tmp_path):
    return torch.compile(exported(tmp_path), backend="eager")


@pytest.mark.parametrize("make", [copied, unpickled, wrapped, lambda _: routed(tiny_llama())])
def test_copies_and_compiled_models_save_them_too(make, tmp_path):
    model = make(tmp_path)
    averaged = {name.removeprefix("_orig_mod."): tensor for name, tensor in halved(model).items()}
    model.save_pretrained(tmp_path / "averaged", True, averaged)
    with loading_options(verify=True):
        assert_holds(load(tiny_llama, tmp_path / "averaged"), averaged)


def test_the_state_dict_of_a_dense_copy_is_its_own(loaded, tmp_path):
    model = loaded(tiny_llama)
    model.dequantize()
    averaged = halved(model)
    model.save_pretrained(tmp_path / "averaged", state_dict=dict(averaged))
    assert_holds(load(tiny_llama, tmp_path / "averaged"), averaged)


def test_parameters_that_deepspeed_has_spread_are_not_saved_empty(loaded, tmp_path):
    model = loaded(tiny_llama)
    gathered = dict(model.state_dict())
    for number, parameter in enumerate(model.parameters()):  # as ZeRO-3 leaves them
        parameter.ds_id = number
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"DeepSpeed has spread .*model\.embed_tokens\.weight.*get_state_dict"):
        model.save_pretrained(tmp_path / "spread")
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    with loading_options(verify=True):
        assert_holds(load(tiny_llama, tmp_path / "gathered"), gathered)


# -- names of this version of transformers -------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_vit, tiny_llama, tiny_t5, tiny_bert])
def test_a_checkpoint_may_have_the_names_of_the_modules(build, loaded, tmp_path):
    model = loaded(build)
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    assert tensors_in(tmp_path / "new").keys() <= model.state_dict().keys()
    assert layers_of(tmp_path / "new").keys() <= dict(model.named_modules()).keys()
    with loading_options(verify=True):
        again = load(build, tmp_path / "new")
    assert_holds(again, model.state_dict())
    again.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "old")
    assert layers_of(tmp_path / "old") == layers_of(tmp_path / "compressed")
    for folder in ("again", "old"):
        with loading_options(verify=True):
            assert_holds(load(build, tmp_path / folder), model.state_dict())


def test_an_offloaded_model_may_be_saved_so(loaded, tmp_path):
    expected = logits_of(loaded(tiny_vit))
    model = load(
        tiny_vit,
        tmp_path / "compressed",
        device_map={"vit": "cpu", "classifier": "disk"},
        offload_folder=tmp_path / "offloaded",
    )
    for original in (False, True):
        with pytest.warns(UserWarning, match="offloaded modules"):
            model.save_pretrained(tmp_path / str(original), save_original_format=original)
        torch.testing.assert_close(logits_of(load(tiny_vit, tmp_path / str(original))), expected, rtol=0, atol=1e-6)


# -- other tools ------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_trainer_saves_a_module_that_contains_the_model(storage, loaded, tmp_path):
    model = loaded(tiny_bert, storage=storage, column_layout=True)
    assert not all(parameter.is_contiguous() for parameter in model.parameters())
    (batch,) = batches_for(model, num_batches=1)
    examples = [{name: values[row] for name, values in batch.items()} for row in range(len(batch["labels"]))]
    arguments = TrainingArguments(tmp_path / "runs", max_steps=1, save_steps=1, report_to=[], use_cpu=True)
    Trainer(Wrapper(model), arguments, train_dataset=examples).train()
    saved = load_file(tmp_path / "runs/checkpoint-1/model.safetensors")
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("storage", STORAGES)
def test_a_model_can_be_stored_and_flattened_by_hand(storage, loaded, tmp_path):
    model = loaded(tiny_llama, storage=storage, column_layout=True)
    expected = logits_of(model)
    save_file(model.state_dict(), tmp_path / "tensors.safetensors")
    flat = nn.utils.parameters_to_vector(model.parameters())
    other = load(tiny_llama, tmp_path / "compressed").train()
    nn.utils.vector_to_parameters(torch.zeros_like(flat), other.parameters())
    other.load_state_dict(load_file(tmp_path / "tensors.safetensors"))
    torch.testing.assert_close(logits_of(other.eval()), expected, rtol=0, atol=1e-6)


def test_a_model_that_serves_keeps_its_fast_layout(loaded):
    model = loaded(tiny_llama, column_layout=True)
    layouts = [parameter.is_contiguous() for parameter in model.parameters()]
    assert not all(layouts)
    batch = batches_for(model)[0]
    model.generate(batch["input_ids"], max_new_tokens=2)
    assert [parameter.is_contiguous() for parameter in copy.deepcopy(model).eval().parameters()] == layouts
