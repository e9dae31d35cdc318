"""A first adapter that cannot be made or loaded is refused before dense weights go, and leaves the model as it was."""

import functools
import math
import warnings
import weakref

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peft_jactus import JactusConfig, calibrate, plan_ranks
from tests.support.compressed_models import batches_for, tiny_bert

WEIGHTS = "adapter_model.safetensors"
IDS = {"input_ids": torch.arange(2, 8)[None]}
USES = {
    "calibrate": lambda model, config: calibrate(model, config, batches_for(model), progress_bar=False),
    "get_peft_model": get_peft_model,
    "plan_ranks": functools.partial(plan_ranks, progress_bar=False),
}


def config_of(**fields):
    fields = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "retained_ratio": 0.6} | fields
    return JactusConfig(decomposition="svd", **fields)


def state_of(model):
    """What a failure may not change."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


@pytest.mark.parametrize("use", sorted(USES))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, use):
    model, config = tiny_bert(), config_of()
    broken = [f"bert.encoder.layer.{number}.output.dense" for number in range(2)]
    sound = {name: model.get_submodule(name).weight.detach().clone() for name in broken}
    for name in broken:
        model.get_submodule(name).weight.data[0, 0] = value
    before = state_of(model)
    with pytest.raises(ValueError, match=f"^{', '.join(broken)}: the weight holds NaN or infinite numbers"):
        USES[use](model, config)
    assert state_of(model) == before
    for name, weight in sound.items():
        model.get_submodule(name).weight.data.copy_(weight)
    USES[use](model, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_type": "CAUSAL_LM"}, "`task_type`='CAUSAL_LM' is for models that generate text, and BertForSeq"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "`task_type`='SEQ_2_SEQ_LM' is for models that generate text"),
        ({"modules_to_save": ["clasifier"], "task_type": None}, r"`modules_to_save`=\['clasifier'\] .* matches no"),
    ],
    ids=["language model", "translator", "head"],
)
def test_a_config_for_another_model_is_refused_before_layers_are_replaced(fields, message):
    model, config = tiny_bert(), config_of(**fields)
    before, settings = state_of(model), config.to_dict()
    expected = model(**IDS).logits
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert state_of(model) == before
    assert config.to_dict() == settings
    assert torch.equal(model(**IDS).logits, expected)
    get_peft_model(model, config_of())


# -- files ------------------------------------------------------------------------------------------------


def bert(**sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_labels": 2} | sizes
    config = transformers.BertConfig(vocab_size=16, num_attention_heads=2, **sizes)
    return transformers.BertForSequenceClassification(config).eval()


def without(folder, part):
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if part not in name}
    save_file(tensors, folder / WEIGHTS)


def cut_off(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-10])


FILES = {
    "deeper": (
        {"num_hidden_layers": 3},
        None,
        "^6 of the adapter's 19 layers were not found in the base model, a Bert",
    ),
    "wider": ({"hidden_size": 32}, None, r"query: the adapter has rank 32 here, but .* of shape \(16, 16\)"),
    "narrower": ({"hidden_size": 8}, None, r"query: `jactus_.*` must have shape .*made for another base model"),
    "other labels": ({"num_labels": 5}, None, r"`classifier.\w+` has shape .* Load the model with as many labels"),
    "cut off": ({}, cut_off, "cannot be read and is damaged"),
    "without a head": ({}, lambda folder: without(folder, "classifier"), "lacks 2 tensors of modules that were"),
    "without a layer": ({}, lambda folder: without(folder, "layer.1.output"), "disagree on the layers of adapter"),
    "without a tensor": ({}, lambda folder: without(folder, "layer.1.output.dense.jactus_bias"), "must hold"),
}


@pytest.mark.parametrize("case", sorted(FILES))
def test_a_file_of_another_model_is_refused_before_layers_are_replaced(case, tmp_path):
    sizes, damage, message = FILES[case]
    get_peft_model(bert(**sizes), config_of(retained_ratio=1.0)).save_pretrained(tmp_path / "other")
    if damage is not None:
        damage(tmp_path / "other")
    model = bert()
    before, expected = state_of(model), model(**IDS).logits
    with pytest.raises((ValueError, SafetensorError), match=message):
        PeftModel.from_pretrained(model, tmp_path / "other")
    assert state_of(model) == before
    assert torch.equal(model(**IDS).logits, expected)
    right = get_peft_model(bert(), config_of()).eval()
    right.save_pretrained(tmp_path / "right")
    assert torch.equal(PeftModel.from_pretrained(model, tmp_path / "right")(**IDS).logits, right(**IDS).logits)


@pytest.mark.filterwarnings("ignore:Some weights of PeftModelForSequenceClassification were not initialized")
def test_heads_of_other_shapes_can_be_left_out(tmp_path):
    get_peft_model(bert(num_labels=5), config_of()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path, ignore_mismatched_sizes=True)
    assert loaded(**IDS).logits.shape == (1, 2)


# -- failures in the middle -------------------------------------------------------------------------------

# PEFT warns of it when layers are replaced; a warning is an error here.
LATE = {"rank_pattern": {"qeury": 3}}


def test_a_late_failure_puts_back_layers_whose_weights_are_kept():
    model, config = tiny_bert(), config_of(**LATE, keep_base_weights=True, modules_to_save=["classifier"])
    before, settings, expected = state_of(model), config.to_dict(), model(**IDS).logits
    with pytest.raises(RuntimeWarning, match="rank_pattern keys did not match"):
        get_peft_model(model, config)
    assert state_of(model) == before
    assert config.to_dict() == settings
    assert torch.equal(model(**IDS).logits, expected)
    get_peft_model(model, config_of(keep_base_weights=True))


def test_after_a_late_failure_layers_without_weights_say_so():
    model, config = tiny_bert(), config_of(**LATE)
    settings, embeddings = config.to_dict(), model.get_input_embeddings()
    with pytest.raises(RuntimeWarning, match="rank_pattern keys did not match"):
        get_peft_model(model, config)
    assert config.to_dict() == settings
    assert model.get_input_embeddings() is embeddings
    assert not any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())
    message = "query: the dense weights are gone, because a call .* Load the model again"
    with pytest.raises(RuntimeError, match=message):
        model(**IDS)
    for use in USES.values():
        with pytest.raises(RuntimeError, match=message.replace("query", "query, .*")):
            use(model, config_of())


def test_no_dense_weight_is_held_to_be_put_back():
    model = tiny_bert()
    weights = weakref.WeakSet(
        module.weight for module in model.bert.encoder.modules() if isinstance(module, nn.Linear)
    )
    alive = [len(weights)]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *_args, **_options: alive.append(len(weights))
        get_peft_model(model, config_of(**LATE))
    assert alive[0] == 12
    assert alive[-1] == 0
