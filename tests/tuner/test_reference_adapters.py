"""A further adapter of the config of one that is there, as trl makes its reference model: a copy that shares bases."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

from peft_jactus import JactusConfig, calibrate
from peft_jactus.tuner.adapter_format import TRAINABLE
from peft_jactus.tuner.layer import JactusLayer
from tests.support.compressed_models import VOCABULARY, batches_for, tiny_llama, trained

IDS = {"input_ids": torch.randint(2, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))}


def config_of(kind):
    options = {"cores": {"adaptation_rank": 0}, "both": {"train_core": True}, "adaptation": {}}[kind]
    return JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=0.6, **options)


def tuned(kind="adaptation", **options):
    model, config = tiny_llama(), config_of(kind)
    for name, value in options.items():
        setattr(config, name, value)
    if config.decomposition != "svd":
        calibrate(model, config, batches_for(model), progress_bar=False)
    return learned(get_peft_model(model, config).eval(), "default")


def learned(model, adapter_name, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model):
            for name in TRAINABLE:
                held = getattr(layer, name)
                if adapter_name in held:
                    held[adapter_name].add_(0.05 * torch.randn(held[adapter_name].shape, generator=generator))
    return model


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, JactusLayer)]


def logits(model):
    with torch.no_grad():
        return model(**IDS).logits


def add_reference(model):
    """As in trl's DPOTrainer, GRPOTrainer and KTOTrainer."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, param in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(param.data)


@pytest.mark.parametrize("kind", ["adaptation", "cores", "both"])
@pytest.mark.parametrize("keep_base_weights", [False, True])
def test_a_reference_adapter_computes_what_the_trained_one_did(kind, keep_base_weights):
    model = tuned(kind, keep_base_weights=keep_base_weights)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = logits(model)
    add_reference(model)
    assert model.active_adapters == ["default"]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert torch.equal(logits(model), start)
    learned(model, "default", seed=2)
    assert not torch.allclose(logits(model), start)
    model.set_adapter("ref")
    assert torch.equal(logits(model), start)


def test_bases_are_shared_and_what_trains_is_not():
    model = tuned()
    add_reference(model)
    for layer in layers_of(model):
        mine, theirs = (layer.adapter_tensors(name) for name in ("default", "ref"))
        for name, tensor in mine.items():
            assert (tensor.data_ptr() == theirs[name].data_ptr()) == (name not in TRAINABLE), name


def test_a_loaded_adapter_gets_a_reference_too(tmp_path):
    model = tuned()
    start = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval()
    add_reference(loaded)
    learned(loaded, "default", seed=2)
    loaded.set_adapter("ref")
    assert torch.equal(logits(loaded), start)


def test_both_are_saved_and_deleted(tmp_path):
    model = tuned()
    start = logits(model)
    add_reference(model)
    learned(model, "default", seed=2)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    for folder, expected in ((tmp_path, trained), (tmp_path / "ref", start)):
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), folder).eval()), expected)
    model.delete_adapter("ref")
    assert torch.equal(logits(model), trained)
    assert model.peft_config["default"].target_modules == "all-linear"


def test_where_the_dense_weights_are_there_a_data_free_adapter_is_computed_anew():
    model = tuned(decomposition="svd", keep_base_weights=True)
    fresh = logits(tuned_without_training())
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), fresh)


def tuned_without_training():
    config = config_of("adaptation")
    config.decomposition, config.keep_base_weights = "svd", True
    return get_peft_model(tiny_llama(), config).eval()


def test_an_equal_config_that_is_another_object_is_still_refused():
    model = tuned()
    with pytest.raises(ValueError, match="Cannot compute a further adapter"):
        model.add_adapter("second", config_of("adaptation"))


def held_by(model, adapter_name="default"):
    return [
        {name: tensor.detach().clone() for name, tensor in layer.adapter_tensors(adapter_name).items()}
        for layer in layers_of(model)
    ]


def shared_names(model):
    """Which tensors are in the same place for both adapters, in any layer."""
    return {
        name
        for layer in layers_of(model)
        for name, tensor in layer.adapter_tensors("default").items()
        if tensor.data_ptr() == layer.adapter_tensors("ref")[name].data_ptr()
    }


def other_adapter(folder, **options):
    """Save an adapter that was made for other weights; return its logits on those of `tuned`, and the folder."""
    options = {"retained_ratio": 0.6, "allocation": "uniform"} | options
    model = trained(tiny_llama(seed=5), **options)
    model.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(tiny_llama(), folder).eval()), folder


@pytest.mark.parametrize("kind", ["adaptation", "cores", "both"])
def test_what_a_reference_adapter_shares_is_counted_once(kind):
    model = tuned(kind)
    model.add_adapter("ref", model.peft_config["default"])
    held = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    numbers = {tensor.data_ptr(): tensor.numel() for tensor in held if tensor.numel()}
    assert model.get_nb_trainable_parameters()[1] == sum(numbers.values())


@pytest.mark.parametrize("loaded_into", ["ref", "default"])
@pytest.mark.parametrize("shardable", [False, True])
@pytest.mark.parametrize("way", ["load_adapter", "low_cpu_mem_usage", "state dict", "assigned state dict"])
def test_an_adapter_that_is_loaded_into_one_of_them_leaves_the_other_alone(tmp_path, way, shardable, loaded_into):
    expected, folder = other_adapter(tmp_path)
    model = tuned(allocation="uniform")
    add_reference(model)
    if shardable:
        model.base_model.make_shardable()
    start, kept = logits(model), {"ref": "default", "default": "ref"}[loaded_into]
    before = held_by(model, kept)
    if "state dict" in way:
        values = load_file(folder / "adapter_model.safetensors")
        set_peft_model_state_dict(model, values, loaded_into, low_cpu_mem_usage=way == "assigned state dict")
    else:
        model.load_adapter(folder, adapter_name=loaded_into, low_cpu_mem_usage=way == "low_cpu_mem_usage")
    for mine, was in zip(held_by(model, kept), before, strict=True):
        assert {name for name, tensor in mine.items() if not torch.equal(tensor, was[name])} == set()
    for name, outputs in ((kept, start), (loaded_into, expected)):
        model.set_adapter(name)
        assert torch.equal(logits(model), outputs)
    trains = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains <= set(TRAINABLE)


def test_an_adapter_of_other_ranks_that_is_loaded_into_one_leaves_the_ranks_of_the_other(tmp_path):
    expected, folder = other_adapter(tmp_path / "other", retained_ratio=0.4)
    model = tuned()
    add_reference(model)
    start, ranks = logits(model), dict(model.peft_config["default"].layer_ranks)
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), "ref")
    assert model.peft_config["default"].layer_ranks == ranks
    assert model.peft_config["ref"].layer_ranks != ranks
    model.save_pretrained(tmp_path)
    for saved, outputs in ((tmp_path, start), (tmp_path / "ref", expected)):
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), saved).eval()), outputs)


def test_to_load_what_is_there_already_keeps_them_shared(tmp_path):
    model = tuned()
    model.save_pretrained(tmp_path)
    add_reference(model)
    shared = shared_names(model)
    assert shared
    for name in ("default", "ref"):  # as the Trainer resumes
        model.load_adapter(tmp_path, adapter_name=name)
    assert shared_names(model) == shared


def test_an_adapter_that_is_refused_changes_nothing(tmp_path):
    model = tuned()
    add_reference(model)
    start, shared = logits(model), shared_names(model)
    model.save_pretrained(tmp_path)
    values = load_file(tmp_path / "adapter_model.safetensors")
    values.popitem()
    with pytest.raises(ValueError, match="the checkpoint must hold"):
        set_peft_model_state_dict(model, values, "ref")
    assert shared_names(model) == shared
    assert torch.equal(logits(model), start)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_without_a_peft_model_a_reference_adapter_is_loaded_into_by_itself(tmp_path):
    expected, folder = other_adapter(tmp_path)
    model = tuned(allocation="uniform")
    model.save_pretrained(tmp_path / "mine")
    native, start = tiny_llama(), logits(model)
    native.load_adapter(str(tmp_path / "mine"))
    inject_adapter_in_model(native.peft_config["default"], native, "ref")
    assert native.peft_config["default"].layer_ranks is not native.peft_config["ref"].layer_ranks
    set_peft_model_state_dict(native, load_file(folder / "adapter_model.safetensors"), "ref")
    for name, outputs in (("default", start), ("ref", expected)):
        for layer in layers_of(native):
            layer.set_adapter(name)
        assert torch.equal(logits(native), outputs)
