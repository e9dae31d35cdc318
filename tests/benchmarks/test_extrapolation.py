"""What is counted for large Llamas, against models of the same shapes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cost import training_memory
from benchmarks.cost.extrapolation import LLAMAS, Llama

RANK = 2


def model_of(shape):
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=4,
        num_key_value_heads=4 * shape.key_value // shape.hidden,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("key_value", [32, 8])
def test_parameters_are_those_of_the_model_and_of_its_adapter(key_value):
    shape = Llama("", hidden=32, intermediate=48, key_value=key_value, blocks=3, vocabulary=50)
    model = model_of(shape)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert shape.parameters + shape.embedding_parameters == matrices
    tuned = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    assert shape.adapter_parameters(RANK) == trained
    assert shape.training_bytes(1.0, RANK) == 2 * matrices + 16 * trained
    kept = 0.5 * shape.parameters + shape.embedding_parameters - trained
    assert shape.training_bytes(0.5, RANK, inside=True) == 2 * kept + 16 * trained
    in_4_bits = (kept - shape.embedding_parameters) * (0.5 + 2 / 64) + 2 * shape.embedding_parameters
    assert shape.training_bytes(0.5, RANK, inside=True, frozen_bits=4) == in_4_bits + 16 * trained


def test_llama_2_7b_has_its_size():
    assert LLAMAS[0].parameters + LLAMAS[0].embedding_parameters == pytest.approx(6.738e9, rel=1e-3)


def test_the_table_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training_memory", "--out", str(tmp_path)])
    training_memory.main()
    assert (tmp_path / "training_memory.md").read_text() == capsys.readouterr().out
    assert "| Llama-2-7B | JACTUS 0.8 | 12.0 | 0.85 |" in (tmp_path / "training_memory.md").read_text()
