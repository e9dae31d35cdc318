"""Where statistics are kept: copies share them, one calibration makes several models, nothing is lost silently."""

import copy
import dataclasses
import pickle

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from peft_jactus import CalibrationStatistics, JactusConfig, calibrate, plan_ranks, rank_summary
from tests.support.compressed_models import (
    batches_for,
    calibrated,
    jactus_config,
    logits_of,
    tiny_bert,
    tiny_llama,
)

RATIOS = (0.8, 0.6, 0.4)


def deep_llama(num_layers):
    config = copy.deepcopy(tiny_llama().config)
    config.num_hidden_layers = num_layers
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_one_calibration_gives_a_model_for_each_ratio():
    model = tiny_llama()
    config = calibrated(model)
    swept = [
        get_peft_model(copy.deepcopy(model), dataclasses.replace(config, retained_ratio=ratio)) for ratio in RATIOS
    ]
    for ratio, tuned in zip(RATIOS, swept, strict=True):
        alone = get_peft_model(tiny_llama(), calibrated(tiny_llama(), retained_ratio=ratio))
        assert tuned.peft_config["default"].layer_ranks == alone.peft_config["default"].layer_ranks
        assert torch.equal(logits_of(tuned), logits_of(alone))
        assert rank_summary(tuned).retained_ratio <= ratio


def test_a_sweep_holds_one_set_of_statistics():
    model = tiny_llama()
    config = calibrated(model)
    statistics = config.statistics
    for ratio in RATIOS:
        changed = dataclasses.replace(config, retained_ratio=ratio)
        assert changed.statistics is statistics
        tuned = get_peft_model(copy.deepcopy(model), changed)
        assert changed.statistics is None
        assert tuned.peft_config["default"].statistics is None
    assert config.statistics is statistics


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_copies_of_a_config_share_its_statistics(copied):
    config = calibrated(tiny_bert())
    assert copied(config).statistics is config.statistics
    assert copied(config.statistics) is config.statistics if copied is not dataclasses.replace else True
    assert copied(config) == config


def test_a_config_whose_statistics_are_gone_says_what_to_do():
    config = calibrated(tiny_bert())
    statistics = config.statistics
    get_peft_model(tiny_bert(), config)
    with pytest.raises(
        ValueError, match=r"released its statistics.*`config.statistics` to what `calibrate` returned.*replace"
    ):
        get_peft_model(tiny_bert(), dataclasses.replace(config, retained_ratio=0.4))
    config.statistics = statistics
    get_peft_model(tiny_bert(), config)


def test_a_config_without_calibration_says_what_to_do():
    with pytest.raises(ValueError, match=r"no calibration statistics. Call `peft_jactus.calibrate"):
        plan_ranks(tiny_bert(), jactus_config(tiny_bert()))


@pytest.mark.parametrize("decomposition", ["jactus", "svd"])
def test_a_config_that_is_used_again_takes_all_layers_of_a_deeper_model(decomposition):
    config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", decomposition=decomposition)
    for num_layers in (2, 4):
        model = deep_llama(num_layers)
        if decomposition != "svd":
            statistics = calibrate(model, config, batches_for(model), progress_bar=False)
            assert len(statistics) == 7 * num_layers
        tuned = get_peft_model(model, config)
        assert len(tuned.peft_config["default"].layer_ranks) == 7 * num_layers
        assert len(rank_summary(tuned).rows) == 7 * num_layers


def test_the_config_says_what_the_user_wrote_and_the_saved_one_which_layers_that_was(tmp_path):
    config = calibrated(tiny_llama())
    tuned = get_peft_model(tiny_llama(), config)
    assert config.target_modules == "all-linear"
    tuned.save_pretrained(tmp_path)
    saved = JactusConfig.from_pretrained(tmp_path)
    assert set(saved.target_modules) == set(config.layer_ranks)
    assert torch.equal(logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits_of(tuned))


def test_statistics_in_memory_stay_behind_when_they_are_pickled_and_say_so():
    config = calibrated(tiny_bert())
    arrived = pickle.loads(pickle.dumps(config))
    assert (arrived, list(arrived.statistics)) == (config, list(config.statistics))
    with pytest.raises(RuntimeError, match=r"stayed in the process that made them.*Save them there"):
        get_peft_model(tiny_bert(), arrived)
    assert len(pickle.dumps(config)) < 20_000


def test_statistics_on_disk_are_opened_again_when_they_are_pickled(tmp_path):
    path = tmp_path / "statistics.safetensors"
    model, config = tiny_bert(), jactus_config(tiny_bert())
    calibrate(
        model, config, batches_for(model), statistics_file=path, max_statistics_memory="40KB", progress_bar=False
    )
    arrived = pickle.loads(pickle.dumps(config))
    assert isinstance(arrived.statistics, CalibrationStatistics)
    assert arrived.statistics.memory_limit == config.statistics.memory_limit == 40_000
    expected = logits_of(get_peft_model(tiny_bert(), config))
    assert torch.equal(logits_of(get_peft_model(tiny_bert(), arrived)), expected)


def test_a_worker_of_a_data_loader_may_hold_a_config():
    dataset = WithConfig(calibrated(tiny_bert()))
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, multiprocessing_context="spawn")
    assert [float(item) for item in loader] == [0.6]


class WithConfig(torch.utils.data.Dataset):
    def __init__(self, config):
        self.config = config

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.config.retained_ratio


def test_calibration_counts_the_terms_of_the_loss(tmp_path):
    config = calibrated(tiny_bert())
    assert config.statistics.num_loss_terms == 16  # four batches of four examples
    config = calibrated(tiny_llama())
    assert config.statistics.num_loss_terms == 4 * 4 * 9  # twelve tokens, of which three have no label
    config.statistics.save(tmp_path / "statistics")
    assert CalibrationStatistics.load(tmp_path / "statistics").num_loss_terms == 144
    assert config.statistics.merge(config.statistics).num_loss_terms == 288
