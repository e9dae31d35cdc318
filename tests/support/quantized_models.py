"""Tiny models that are loaded in 8 or 4 bits, and their twins: plain models with the dequantized weights."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

VOCABULARY = 96
# bitsandbytes' fast kernels for CPUs want multiples of 64.
_WIDTH = 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": _WIDTH,
    "intermediate_size": 2 * _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}


def _bert():
    config = transformers.BertConfig(
        **_SIZES,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def _llama():
    config = transformers.LlamaConfig(
        **_SIZES,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=_WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


FAMILIES = {"bert": _bert, "gpt2": _gpt2, "llama": _llama}
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}


def _bitsandbytes(**options):
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(llm_int8_skip_modules=["classifier", "lm_head"], **options)


def _torchao(name, **options):
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(
        getattr(quantization, name)(**options), modules_to_not_convert=["classifier", "lm_head"]
    )


LOADINGS: dict[str, Callable[[], object]] = {
    "bitsandbytes-4": lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes-4-nested": lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "bitsandbytes-4-stored": lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16),
    "bitsandbytes-8": lambda: _bitsandbytes(load_in_8bit=True),
    "torchao-8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao-4": lambda: _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao-float8": lambda: _torchao("Float8WeightOnlyConfig"),
    "torchao-activations": lambda: _torchao("Int8DynamicActivationInt8WeightConfig"),
}


def save_tiny(family: str, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FAMILIES[family]().save_pretrained(folder)
    return folder


def load(folder, family, loading=None, **options):
    options = {"dtype": torch.float32} | options
    if loading is not None:
        options["quantization_config"] = LOADINGS[loading]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries' first imports
        return getattr(transformers, _class_of(family)).from_pretrained(folder, **options).eval()


def _class_of(family):
    return "AutoModelForSequenceClassification" if family == "bert" else "AutoModelForCausalLM"


def load_twin(folder, family, loading, **options):
    return twin_of(load(folder, family, loading, **options), folder, family, **options)


def twin_of(quantized, folder, family, **options):
    """The model without quantization that has the dequantized weights, as their own library says they are."""
    twin = load(folder, family, **options)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, nn.Linear) and type(module.weight) not in (nn.Parameter, torch.Tensor):
                weight = _dequantized(module)
                own = twin.get_submodule(name).weight
                own.copy_(weight if own.shape == weight.shape and family != "gpt2" else weight.mT)
    return twin


def _dequantized(module):
    if hasattr(module.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    if hasattr(module.weight, "SCB"):
        return module.weight.data * module.weight.SCB[:, None] / 127
    return module.weight.dequantize()


def save_gguf(folder: Path) -> Path:
    """A tiny Llama in blocks of 8 bits, ``model.gguf``."""
    gguf = pytest.importorskip("gguf")
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(16)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(2 * _WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(_WIDTH // 2)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(ord("!") + number) for number in range(VOCABULARY - 1)), "!!"])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = torch.Generator().manual_seed(0)

    def add_matrix(name, out_features, in_features):
        weight = 0.2 * torch.randn(out_features, in_features, generator=generator)
        blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    add_matrix("token_embd.weight", VOCABULARY, _WIDTH)
    add_matrix("output.weight", VOCABULARY, _WIDTH)
    writer.add_tensor("output_norm.weight", torch.ones(_WIDTH).numpy())
    for block in (f"blk.{number}" for number in range(2)):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add_matrix(f"{block}.{name}.weight", _WIDTH, _WIDTH)
        add_matrix(f"{block}.ffn_gate.weight", 2 * _WIDTH, _WIDTH)
        add_matrix(f"{block}.ffn_up.weight", 2 * _WIDTH, _WIDTH)
        add_matrix(f"{block}.ffn_down.weight", _WIDTH, 2 * _WIDTH)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{name}.weight", torch.ones(_WIDTH).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def batches(family, num_batches=4):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (num_batches, 4, 8), generator=generator)
    labels = torch.randint(3, (num_batches, 4), generator=generator) if family == "bert" else ids
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


@torch.no_grad()
def logits_of(model, family):
    return model(input_ids=batches(family)[0]["input_ids"]).logits
