"""The table of PEFT's test classes and the rows that each of them runs with."""

import pytest

from peft_jactus import JactusConfig
from tests.peft_contract import rows
from tests.peft_contract.upstream import Row, adopt, load

config = load("test_config")
custom_models = load("test_custom_models")
decoder = load("test_decoder_models")
encoder_decoder = load("test_encoder_decoder_models")
feature_extraction = load("test_feature_extraction_models")
low_level_api = load("test_low_level_api")
seq_classifier = load("test_seq_classifier")
token_classification_qa = load("test_token_classification_qa")

# PEFT's tests warn on purpose and by the way, hundreds of times. "error" is for our own tests.
pytestmark = pytest.mark.filterwarnings("default")

CONFIG = ("config_cls", "config_kwargs")

# -- configuration --------------------------------------------------------------------------------

HUB = "downloads a LoRA configuration, whatever the class under test"
TestPeftConfig = adopt(
    config.TestPeftConfig,
    {
        ("config_class", "mandatory_kwargs"): [Row("jactus", (JactusConfig, {}))],
        ("config_class",): [Row("jactus", (JactusConfig,))],
    },
    drop={
        "test_from_pretrained": HUB,
        "test_from_pretrained_cache_dir": HUB,
        "test_save_pretrained_with_runtime_config": HUB,
    },
)


def test_every_peft_type_has_a_config():
    config.TestPeftConfig().test_from_peft_type()  # goes through PeftType, so through ours as well


# -- small models, every feature ------------------------------------------------------------------

TestPeftCustomModel = adopt(
    custom_models.TestPeftCustomModel,
    {
        ("test_name", "model_id", *CONFIG): rows.CUSTOM_MODELS,
        ("config_cls",): rows.CONFIG_CLASS,
    },
    drop={"test_add_weighted_adapter_cat_with_rank_pattern": "always tests LoRA"},
)
TestMultipleActiveAdapters = adopt(
    custom_models.TestMultipleActiveAdapters,
    {
        (
            "test_name",
            "tuner_method",
            "config_cls",
            "config_kwargs_1",
            "config_kwargs_2",
        ): rows.TWO_ADAPTERS
    },
)
TestRequiresGrad = adopt(
    custom_models.TestRequiresGrad,
    {("config_cls",): rows.CONFIG_CLASS},
)
TestInjectAdapterFromStateDict = adopt(
    low_level_api.TestInjectAdapterFromStateDict,
    {("config",): rows.CONFIG},
)

# -- transformers' models, by task ----------------------------------------------------------------

TestDecoderModels = adopt(
    decoder.TestDecoderModels,
    {CONFIG: rows.task("CAUSAL_LM")},
    drop={"test_prompt_learning_with_gradient_checkpointing": "only for prompt learning"},
)
TestEncoderDecoderModels = adopt(encoder_decoder.TestEncoderDecoderModels, {CONFIG: rows.task("SEQ_2_SEQ_LM")})
TestPeftFeatureExtractionModel = adopt(
    feature_extraction.TestPeftFeatureExtractionModel, {CONFIG: rows.task("FEATURE_EXTRACTION")}
)
TestSequenceClassificationModels = adopt(
    seq_classifier.TestSequenceClassificationModels, {CONFIG: rows.task("SEQ_CLS")}
)
TestTokenClassificationModels = adopt(
    token_classification_qa.TestTokenClassificationModels, {CONFIG: rows.task("TOKEN_CLS")}
)
TestQuestionAnsweringModels = adopt(
    token_classification_qa.TestQuestionAnsweringModels, {CONFIG: rows.task("QUESTION_ANS")}
)

# -- the table itself -----------------------------------------------------------------------------


def test_every_expected_failure_names_a_test():
    adopted = [value for name, value in globals().items() if name.startswith("Test")]
    for name in rows.LOW_RANK_FAILURES | rows.FREED_BASE_FAILURES:
        assert any(getattr(tests, name, None) for tests in adopted), f"{name}: renamed upstream?"
