"""Models of another dtype than the adapter was saved in: what is loaded, merged and put back has the model's."""

import pytest
import torch
from peft import PeftModel

from peft_jactus.tuner.layer import JactusLayer
from tests.support.compressed_models import logits_of, tiny_gpt2, tiny_llama, trained


def dtypes_in(model):
    return {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}


IN_ANOTHER_DTYPE = pytest.mark.parametrize(
    ("saved", "base"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
)


@IN_ANOTHER_DTYPE
@pytest.mark.parametrize("fields", [{}, {"train_core": True}, {"frozen_bits": 8}], ids=["ranks", "both", "8 bits"])
@pytest.mark.parametrize("autocast", [True, False])
def test_on_a_base_of_another_dtype_low_cpu_mem_usage_loads_the_same(tmp_path, saved, base, fields, autocast):
    build = tiny_gpt2 if not fields else tiny_llama  # which has no biases
    trained(build(dtype=saved), **fields).save_pretrained(tmp_path)
    loaded = {
        is_low: PeftModel.from_pretrained(
            build(dtype=base), tmp_path, low_cpu_mem_usage=is_low, autocast_adapter_dtype=autocast
        ).eval()
        for is_low in (True, False)
    }
    for model in loaded.values():
        model.load_adapter(
            tmp_path, "second", low_cpu_mem_usage=model is loaded[True], autocast_adapter_dtype=autocast
        )
    low, plain = (dict(model.state_dict()) for model in loaded.values())
    assert low.keys() == plain.keys()
    assert [name for name in low if low[name].dtype != plain[name].dtype] == []
    assert [name for name in low if not torch.equal(low[name], plain[name])] == []
    assert torch.equal(logits_of(loaded[True]), logits_of(loaded[False]))


@IN_ANOTHER_DTYPE
@pytest.mark.parametrize("is_low", [True, False])
def test_a_model_of_another_dtype_merges_and_gets_its_weights_back(tmp_path, saved, base, is_low):
    trained(tiny_gpt2(dtype=saved), keep_base_weights=True).save_pretrained(tmp_path)
    dense = tiny_gpt2(dtype=base).state_dict()
    model = PeftModel.from_pretrained(tiny_gpt2(dtype=base), tmp_path, low_cpu_mem_usage=is_low).eval()
    model.merge_adapter()
    merged = model.base_model.model.transformer
    assert {layer.base_layer.weight.dtype for layer in merged.modules() if isinstance(layer, JactusLayer)} == {base}
    assert logits_of(model).dtype == base
    model.unmerge_adapter()
    unloaded = model.unload()
    assert dtypes_in(unloaded) == {base}
    now = unloaded.state_dict()
    assert [name for name in dense if not torch.equal(now[name], dense[name])] == []


def test_frozen_tensors_of_another_dtype_leave_the_kept_weights_theirs():
    """As after `prepare_model_for_kbit_training`, which casts parameters and no buffers."""
    model = trained(tiny_gpt2(dtype=torch.bfloat16), keep_base_weights=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.float() + 1e-4  # what bfloat16 does not have
    dense = {name: tensor.clone() for name, tensor in model.named_parameters() if ".base_layer." in name}
    model.merge_adapter()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    logits_of(model)
    model.unmerge_adapter()
    now = dict(model.named_parameters())
    assert [name for name in dense if not torch.equal(now[name], dense[name])] == []


def test_a_merged_model_that_is_cast_gets_its_weights_back_in_the_new_dtype():
    model = trained(tiny_gpt2(), keep_base_weights=True)
    dense = {name: tensor.clone() for name, tensor in model.named_parameters() if ".base_layer." in name}
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    now = dict(model.named_parameters())
    assert [name for name in dense if not torch.equal(now[name], dense[name].bfloat16())] == []
