"""sentence-transformers' models: trained with an adapter, and exported with all that is around the transformer.

Tried with sentence-transformers 6.2.0, transformers 5.24.0 and PEFT 0.21.2.
"""

import copy

import pytest
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import peft_jactus
from peft_jactus import JactusConfig, calibrate, compressed_copy, export_compressed, loading_options
from peft_jactus.deployment.layers import FactorizedLinear
from peft_jactus_cli import app
from tests.support.compressed_models import perturb_cores_, tiny_bert
from tests.support.tiny_tokenizer import tiny_tokenizer

st = pytest.importorskip("sentence_transformers", reason="not installed: pip install sentence-transformers")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

TEXTS = ["w5 w9 w20", "w7", "w30 w31 w32 w33"]
PAIRS = [{"anchor": f"w{5 + row} w{9 + row}", "positive": f"w{20 + row} w{40 + row} w3"} for row in range(8)]
PROMPTS = {"query": "w90 w91 "}


@pytest.fixture
def model(tmp_path):
    """Return a model whose pooling is not the default, with a layer of its own, normalised, with a prompt."""
    tiny_bert().bert.save_pretrained(tmp_path / "bert")
    tiny_tokenizer(model_max_length=16).save_pretrained(tmp_path / "bert")
    transformer = modules.Transformer(str(tmp_path / "bert"))
    torch.manual_seed(0)
    parts = [transformer, modules.Pooling(32, "max"), modules.Dense(32, 12), modules.Normalize()]
    return st.SentenceTransformer(modules=parts, prompts=PROMPTS, default_prompt_name="query", device="cpu").eval()


def batches(model):
    for first in range(0, len(PAIRS), 4):
        rows = PAIRS[first : first + 4]
        texts = [row["anchor"] for row in rows] + [row["positive"] for row in rows]
        yield {**model.tokenizer(texts, padding=True, return_tensors="pt"), "labels": torch.arange(4)}


def calibrated(model, part=None):
    def loss_fn(_, batch):
        features = {name: tensor for name, tensor in batch.items() if name != "labels"}
        anchors, positives = model(features)["sentence_embedding"].chunk(2)
        return cross_entropy(20 * anchors @ positives.T, batch["labels"])

    config = JactusConfig(
        target_modules=r".*(query|key|value|dense)", exclude_modules=r".*pooler\..*|2\..*", retained_ratio=0.6
    )
    calibrate(part or model[0].model, config, list(batches(model)), loss_fn=loss_fn, progress_bar=False)
    return config


def tuned(model):
    """Put an adapter on the transformer, as if trained."""
    model[0].model = get_peft_model(model[0].model, calibrated(model))
    perturb_cores_(model[0].model)
    return model


def num_factorized(model):
    return sum(isinstance(module, FactorizedLinear) for module in model.modules())


def check_is_whole(folder, model):
    """Check that a folder holds ``model``, with its other modules; return what it holds."""
    loaded = type(model)(str(folder), device="cpu")
    assert [type(module) for module in loaded] == [type(module) for module in model]
    for setting in ("prompts", "default_prompt_name", "max_seq_length"):
        assert getattr(loaded, setting) == getattr(model, setting)
    torch.testing.assert_close(loaded.encode(TEXTS), model.encode(TEXTS), rtol=1e-4, atol=1e-6)
    return loaded


def test_trained_by_its_trainer_exported_and_loaded(model, tmp_path):
    before = model.encode(TEXTS)
    model[0].model = get_peft_model(model[0].model, calibrated(model))
    args = st.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    loss = losses.MultipleNegativesRankingLoss(model)
    st.SentenceTransformerTrainer(model, args=args, train_dataset=Dataset.from_list(PAIRS), loss=loss).train()
    model.eval()
    export_compressed(model, tmp_path / "compressed", progress_bar=False)
    assert num_factorized(check_is_whole(tmp_path / "compressed", model)) > 0
    assert abs(model.encode(TEXTS) - before).max() > 1e-3
    # The adapter, from which training goes on.
    model.save_pretrained(str(tmp_path / "adapter"))
    check_is_whole(tmp_path / "adapter", model)


def test_the_model_stays_as_it_is(model, tmp_path):
    tuned(model)
    adapter, before = model[0].model, model.encode(TEXTS)
    export_compressed(model, tmp_path / "compressed", progress_bar=False)
    assert model[0].model is adapter
    assert (model.encode(TEXTS) == before).all()


def test_the_folder_is_sharded_says_how_to_load_it_and_is_saved_again(model, tmp_path):
    tuned(model)
    export_compressed(model, tmp_path / "compressed", max_shard_size="20KB", progress_bar=False)
    assert (tmp_path / "compressed" / "model.safetensors.index.json").is_file()
    card = (tmp_path / "compressed" / "README.md").read_text()
    assert "import peft_jactus" in card
    assert 'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("' in card
    assert "library_name: sentence-transformers" in card
    loaded = check_is_whole(tmp_path / "compressed", model)
    loaded.save_pretrained(str(tmp_path / "again"))
    assert num_factorized(check_is_whole(tmp_path / "again", model)) == num_factorized(loaded)
    with loading_options(verify=True):
        check_is_whole(tmp_path / "again", model)


def test_an_adapter_on_the_whole_model(model, tmp_path):
    adapted = get_peft_model(model, calibrated(model, model))
    perturb_cores_(adapted)
    export_compressed(adapted, tmp_path / "compressed", progress_bar=False)
    loaded = check_is_whole(tmp_path / "compressed", model)
    rows = peft_jactus.rank_summary(loaded[0].model).rows
    assert rows
    assert all(row.energy_kept is not None for row in rows)


def test_an_adapter_under_the_old_name_of_the_transformer(model, tmp_path):
    model[0].auto_model = get_peft_model(model[0].model, calibrated(model))
    perturb_cores_(model[0].model)
    export_compressed(model, tmp_path / "compressed", progress_bar=False)
    assert num_factorized(check_is_whole(tmp_path / "compressed", model)) > 0


def test_a_cross_encoder(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_tokenizer(model_max_length=16).save_pretrained(tmp_path / "bert")
    model = st.CrossEncoder(str(tmp_path / "bert"), device="cpu")
    part = model[0].model
    config = JactusConfig(task_type="SEQ_CLS", target_modules="all-linear", retained_ratio=0.6)
    tokens = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    calibrate(part, config, [{**tokens, "labels": torch.arange(3)}], progress_bar=False)
    model[0].model = get_peft_model(part, config)
    perturb_cores_(model[0].model)
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[0])]
    export_compressed(model.eval(), tmp_path / "compressed", progress_bar=False)
    loaded = st.CrossEncoder(str(tmp_path / "compressed"), device="cpu")
    assert num_factorized(loaded) > 0
    torch.testing.assert_close(loaded.predict(pairs), model.predict(pairs), rtol=1e-4, atol=1e-6)


def test_plain_layers_for_other_tools_keep_the_modules(model, tmp_path):
    tuned(model)
    export_compressed(model, tmp_path / "compressed", progress_bar=False)
    command = ["export", str(tmp_path / "compressed"), str(tmp_path / "dense"), "--dense"]
    finished = CliRunner().invoke(app, command)
    assert finished.exit_code == 0, finished.output
    loaded = check_is_whole(tmp_path / "dense", model)
    assert num_factorized(loaded) == 0
    assert not (tmp_path / "dense" / "README.md").exists()


def test_the_command_refuses_an_adapter_whose_modules_it_would_lose(model, tmp_path):
    tuned(model).save_pretrained(str(tmp_path / "adapter"))
    for option in ([], ["--dense"]):
        finished = CliRunner().invoke(app, ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), *option])
        assert finished.exit_code == 1
        assert "is a model of sentence-transformers" in finished.output
    assert not (tmp_path / "out").exists()


def test_several_transformers_in_one_model_are_named(model, tmp_path):
    tuned(model)
    other = copy.deepcopy(model[0])
    model.append(other)
    with pytest.raises(ValueError, match=r"these have: \['0.model', '4.model'\]"):
        export_compressed(model, tmp_path / "compressed", progress_bar=False)
    assert not (tmp_path / "compressed").exists()


def test_a_copy_is_of_the_transformer(model):
    tuned(model)
    with pytest.raises(TypeError, match=r"`model.get_submodule\('0.model'\)`"):
        compressed_copy(model)
    assert isinstance(compressed_copy(model.get_submodule("0.model")), transformers.BertModel)
