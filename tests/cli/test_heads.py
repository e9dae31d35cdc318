"""Adapters whose trained head has other classes than that of the base checkpoint."""

import json
import warnings

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from typer.testing import CliRunner

from peft_jactus import JactusConfig, export_compressed
from peft_jactus_cli import app
from tests.deployment.test_export import relative_error
from tests.support.compressed_models import VOCABULARY, perturb_cores_

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
}
XLNET = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
VIT = {**{key: SIZES[key] for key in list(SIZES)[1:5]}, "image_size": 8, "patch_size": 4}
BY_NAME = {"modules_to_save": ["classifier"], "exclude_modules": ["classifier"]}
# The class, sizes, and fields of the adapter's config: heads of one and of several layers, of different names.
MODELS = {
    "BertForSequenceClassification": (SIZES, {"task_type": "SEQ_CLS"}),
    "BertForTokenClassification": (SIZES, {"task_type": "TOKEN_CLS"}),
    "RobertaForSequenceClassification": (SIZES, {"task_type": "SEQ_CLS"}),
    "LlamaForSequenceClassification": (SIZES, {"task_type": "SEQ_CLS"}),
    "BartForSequenceClassification": (BART, {"task_type": "SEQ_CLS"}),
    "XLNetForSequenceClassification": (XLNET, {"task_type": "SEQ_CLS"}),
    "ViTForImageClassification": (VIT, BY_NAME),
}
BERT = "BertForSequenceClassification"
BASE_NAMES = {0: "no", 1: "yes"}
NAMES = dict(enumerate(("anger", "fear", "joy", "love", "sadness", "surprise")))


def labels(names):
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def save_base(folder, class_name=BERT, *, names=BASE_NAMES):
    cls = getattr(transformers, class_name)
    config = cls.config_class(**MODELS[class_name][0], **labels(names))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls(config).save_pretrained(folder)
    return cls


def save_adapter(folder, base, cls, *, num_labels=6, **options):
    """Train an adapter with a head of its own; return the model."""
    model = cls.from_pretrained(base, num_labels=num_labels, ignore_mismatched_sizes=True, **options)
    fields = MODELS[cls.__name__][1]
    config = JactusConfig(target_modules="all-linear", decomposition="svd", retained_ratio=0.6, **fields)
    adapted = get_peft_model(model, config).eval()
    perturb_cores_(adapted)
    adapted.save_pretrained(folder)
    return adapted


def export(adapter, out, *options):
    result = CliRunner().invoke(app, ["export", str(adapter), str(out), *options])
    return result.exit_code, result.output.replace("\n", " ")


@torch.no_grad()
def logits_of(model):
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.randn(2, 3, 8, 8, generator=generator)).logits
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    ids[:, -1] = 2  # where BART reads the class
    return model(input_ids=ids).logits


def forget_names(adapter):
    """Leave the adapter as versions before the names were written."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["id2label"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("class_name", MODELS)
def test_export_has_the_classes_that_were_trained(class_name, tmp_path):
    cls = save_base(tmp_path / "base", class_name)
    model = save_adapter(tmp_path / "adapter", tmp_path / "base", cls, **labels(NAMES))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        code, output = export(tmp_path / "adapter", tmp_path / "out")
    assert code == 0, output
    result = cls.from_pretrained(tmp_path / "out")
    assert result.config.id2label == NAMES
    assert result.config.label2id == {name: number for number, name in NAMES.items()}
    assert relative_error(logits_of(result), logits_of(model)) <= 1e-5


def test_as_many_classes_with_other_names_keep_theirs(tmp_path):
    cls = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", cls, num_labels=2, **labels({0: "spam", 1: "ham"}))
    assert export(tmp_path / "adapter", tmp_path / "out")[0] == 0
    assert cls.from_pretrained(tmp_path / "out").config.id2label == {0: "spam", 1: "ham"}


def test_export_says_that_names_are_not_known(tmp_path):
    cls = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", cls, **labels(NAMES))
    forget_names(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="6 classes and .*base has 2. Nothing says what they are called"):
        code, output = export(tmp_path / "adapter", tmp_path / "out")
    assert code == 0, output
    assert cls.from_pretrained(tmp_path / "out").config.id2label == {n: f"LABEL_{n}" for n in range(6)}


def test_an_adapter_without_names_keeps_those_of_as_many_classes(tmp_path):
    cls = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", cls, num_labels=2)
    forget_names(tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "out")[0] == 0
    assert cls.from_pretrained(tmp_path / "out").config.id2label == BASE_NAMES


def load_by_auto_class(folder):
    return AutoPeftModelForSequenceClassification.from_pretrained(
        folder / "adapter", num_labels=6, ignore_mismatched_sizes=True
    )


def load_onto_base(folder):
    cls = transformers.AutoModelForSequenceClassification
    base = cls.from_pretrained(folder / "base", num_labels=6, ignore_mismatched_sizes=True)
    return PeftModel.from_pretrained(base, folder / "adapter")


@pytest.mark.parametrize("load", [load_by_auto_class, load_onto_base])
def test_a_loaded_adapter_is_exported_and_saved_with_its_names(load, tmp_path):
    cls = save_base(tmp_path / "base")
    model = save_adapter(tmp_path / "adapter", tmp_path / "base", cls, **labels(NAMES))
    loaded = load(tmp_path).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))
    export_compressed(loaded, tmp_path / "out", progress_bar=False)
    assert cls.from_pretrained(tmp_path / "out").config.id2label == NAMES
    loaded.save_pretrained(tmp_path / "again")
    (tmp_path / "adapter").rename(tmp_path / "first")
    (tmp_path / "again").rename(tmp_path / "adapter")
    export_compressed(load(tmp_path), tmp_path / "out", overwrite=True, progress_bar=False)
    assert cls.from_pretrained(tmp_path / "out").config.id2label == NAMES


def test_names_that_a_model_was_given_afterwards_win(tmp_path):
    cls = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", cls, **labels(NAMES))
    loaded = load_onto_base(tmp_path)
    german = dict(enumerate(("Wut", "Angst", "Freude", "Liebe", "Trauer", "Staunen")))
    loaded.config.id2label = german
    export_compressed(loaded, tmp_path / "out", progress_bar=False)
    assert cls.from_pretrained(tmp_path / "out").config.id2label == german


def test_export_refuses_a_head_that_no_number_of_classes_explains(tmp_path):
    cls = save_base(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCABULARY + 4)
    config = JactusConfig(
        target_modules="all-linear",
        decomposition="svd",
        retained_ratio=0.6,
        task_type="SEQ_CLS",
        modules_to_save=["word_embeddings"],
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    code, output = export(tmp_path / "adapter", tmp_path / "out")
    assert code == 1
    assert "bert.embeddings.word_embeddings.weight of shape [100, 32]; in" in output
    assert "it is [96, 32], and another number of labels does not help" in output
    assert not (tmp_path / "out").exists()


def test_export_refuses_another_base_model_whose_body_it_would_leave_random(tmp_path):
    cls = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", cls, **labels(NAMES))
    config = transformers.BertConfig.from_pretrained(tmp_path / "base", max_position_embeddings=16)
    cls(config).save_pretrained(tmp_path / "base")
    config.max_position_embeddings = 32
    config.save_pretrained(tmp_path / "base")
    code, output = export(tmp_path / "adapter", tmp_path / "out")
    assert code == 1
    assert "has other shapes than a BertForSequenceClassification with 6 labels" in output
    assert "position_embeddings.weight" in output


def test_inspect_and_bench_take_an_adapter_and_a_checkpoint_of_other_classes(tmp_path):
    cls = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", cls, **labels(NAMES))
    assert export(tmp_path / "adapter", tmp_path / "out", "--dtype", "bfloat16")[0] == 0
    sizes = ["--sequence-length", "4", "--repeats", "1", "--device", "cpu"]
    for command in (
        ["inspect", "adapter"],
        ["inspect", "out", "--verify"],
        ["bench", "out", *sizes],
        ["bench", "out", "--dense", str(tmp_path / "base"), *sizes],
    ):
        arguments = [command[0], str(tmp_path / command[1]), *command[2:]]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (arguments, result.output)
