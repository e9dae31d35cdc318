"""What a plan says about the size of the whole model is what an export has; a budget for it is kept, and used."""

import pytest
import torch
import transformers
from peft import get_peft_model

from peft_jactus import JactusConfig, export_compressed, plan_ranks, rank_summary
from peft_jactus.tuner.targeting import log_once
from tests.support.compressed_models import perturb_cores_, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit

TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def config(**fields):
    defaults = {"target_modules": "all-linear", "decomposition": "svd", "adaptation_rank": 0}
    return JactusConfig(**{**defaults, **fields})


def exported(model, options, folder):
    """Return the plan, the adapted model, and how many parameters and bytes its export has."""
    planned = plan_ranks(model, options, progress_bar=False)
    tuned = get_peft_model(model, options)
    perturb_cores_(tuned)
    export_compressed(tuned, folder, progress_bar=False)
    loaded = type(model).from_pretrained(folder)
    return planned, tuned, loaded.num_parameters(), sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def assert_kept_and_used(limit, planned, written):
    assert 0.93 * limit <= written <= planned.num_bytes <= limit
    assert planned.num_bytes == pytest.approx(written, rel=0.02)


# -- dtypes and names in files ----------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_a_size_is_kept_where_transformers_leaves_some_weights_in_float32(share, storage, tmp_path):
    sizes = {"vocab_size": 96, "d_model": 128, "d_ff": 256, "d_kv": 32, "num_layers": 1, "num_heads": 4}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "base")
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16, torch.float32}
    limit = int(share * 2 * model.num_parameters())
    planned, _, _, written = exported(model, config(storage=storage, max_model_size=limit), tmp_path / "compressed")
    assert_kept_and_used(limit, planned, written)


@pytest.mark.parametrize("adaptation_rank", [0, 4])
def test_a_size_is_kept_where_the_first_layer_is_compressed(adaptation_rank, tmp_path):
    # transformers takes the first parameter's dtype for the model's; what trains in an adapted layer is in float32.
    sizes = {"d_model": 64, "ffn_dim": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    windows = {"context_length": 32, "patch_length": 16, "patch_stride": 8, "prediction_length": 8}
    series = transformers.PatchTSTConfig(num_input_channels=2, **sizes, **windows)
    model = transformers.PatchTSTForPrediction(series).to(torch.bfloat16)
    options = config(adaptation_rank=adaptation_rank, max_model_size=120_000)
    planned, _, _, written = exported(model, options, tmp_path / "compressed")
    assert "model.encoder.embedder.input_embedding" in planned.ranks
    assert_kept_and_used(120_000, planned, written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2, tiny_llama, tiny_vit])
def test_a_size_is_kept_whatever_names_the_files_have(build, dtype, tmp_path):
    model = build(dtype=dtype)  # those of a vision transformer are older than those of its modules, and longer
    dense = plan_ranks(model, config(), progress_bar=False).dense_bytes
    options = config(storage="pivoted", max_model_size=int(0.97 * dense))
    planned, _, _, written = exported(model, options, tmp_path / "compressed")
    assert written <= planned.num_bytes <= int(0.97 * dense)


# -- tied weights -----------------------------------------------------------------------------------------


def tiny_llama_with_tied_embeddings():
    sizes = tiny_llama().config
    sizes.tie_word_embeddings = True
    return transformers.LlamaForCausalLM(sizes).eval()


def tiny_bert_with_lm_head():
    return transformers.BertForMaskedLM(tiny_bert().config).eval()


@TIED
@pytest.mark.parametrize("budget", [{"model_ratio": 0.9}, {"max_model_size": 0.9}, {"retained_ratio": 1.0}])
@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (tiny_llama_with_tied_embeddings, r".*_proj|lm_head"),
        (tiny_gpt2, r".*(c_attn|c_fc|c_proj)|lm_head"),
        (tiny_bert_with_lm_head, r".*(query|key|value|dense|decoder)"),
    ],
)
def test_a_tied_head_that_is_compressed_counts_beside_the_embedding(build, targets, budget, tmp_path):
    model = build()
    num_dense = model.num_parameters()
    if "max_model_size" in budget:
        dense = plan_ranks(model, config(target_modules=targets), progress_bar=False).dense_bytes
        budget = {"max_model_size": int(budget["max_model_size"] * dense)}
    options = config(target_modules=targets, **budget)
    planned, tuned, num_exported, written = exported(model, options, tmp_path / "compressed")
    assert planned.num_parameters == num_exported
    assert planned.model_ratio == pytest.approx(num_exported / num_dense)
    assert planned.summary == rank_summary(tuned)
    assert f"The whole model keeps {num_exported:,} of {num_dense:,}: " in str(rank_summary(tuned))
    card = (tmp_path / "compressed" / "README.md").read_text()
    assert f"the whole model {num_exported / num_dense:.1%}" in card
    assert written <= planned.num_bytes
    assert planned.num_bytes <= budget.get("max_model_size", planned.num_bytes)
    assert planned.model_ratio <= budget.get("model_ratio", planned.model_ratio)


@TIED
@pytest.mark.parametrize("trained_whole", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("budget", [{"model_ratio": 0.9}, {"max_model_size": 90_000}])
def test_a_tied_head_that_is_trained_whole_counts_beside_the_embedding(trained_whole, budget, tmp_path):
    model = tiny_llama_with_tied_embeddings()
    num_dense = model.num_parameters()
    options = config(task_type="CAUSAL_LM", modules_to_save=[trained_whole], **budget)
    planned, tuned, num_exported, written = exported(model, options, tmp_path / "compressed")
    assert planned.num_parameters == num_exported
    assert planned.summary == rank_summary(tuned)
    assert f"The whole model keeps {num_exported:,} of {num_dense:,}: " in str(rank_summary(tuned))
    assert written <= planned.num_bytes <= budget.get("max_model_size", planned.num_bytes)
    assert num_exported / num_dense <= budget.get("model_ratio", 2)


# -- what an adapter that is there has added --------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"model_ratio": 0.8}, {"max_model_size": "75KB"}])
def test_copies_that_another_adapter_trains_do_not_count(budget):
    options = {"modules_to_save": ["embed_tokens", "lm_head"], "keep_base_weights": True, **budget}
    model = tiny_llama()
    planned = plan_ranks(model, config(**options), progress_bar=False)
    tuned = get_peft_model(model, config(**options))
    again = plan_ranks(tuned, config(**options), progress_bar=False)
    assert (again.summary, again.num_bytes, again.dense_bytes) == (
        planned.summary,
        planned.num_bytes,
        planned.dense_bytes,
    )
    tuned.add_adapter("second", config(**options))
    assert tuned.peft_config["second"].layer_ranks == planned.ranks
    assert rank_summary(tuned, "second") == planned.summary


def test_copies_that_another_adapter_trains_are_not_named_as_a_large_rest(caplog):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "keep_base_weights": True}
    model = tiny_llama()
    num_parameters = model.num_parameters()
    log_once.cache_clear()
    with caplog.at_level("WARNING", "peft_jactus"):
        get_peft_model(model, config(**options)).add_adapter("second", config(**options))
    (message,) = [message for message in caplog.messages if "of the model's" in message]  # the same for both
    assert f"of the model's {num_parameters:,} parameters" in message
