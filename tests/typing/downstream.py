"""A script as a user writes it. Nothing runs it; `tests/test_packaging.py` has mypy check it as a user would."""

from collections.abc import Iterable

from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_jactus import (
    CalibrationStatistics,
    JactusConfig,
    RankSummary,
    calibrate,
    export_compressed,
    loading_options,
    plot_ranks,
    rank_summary,
)
from peft_jactus.parse import RouterConfig, add_router


def compress(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], folder: str) -> CalibrationStatistics:
    config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=0.8)
    statistics: CalibrationStatistics = calibrate(model, config, batches, max_batches=16)
    compressed = get_peft_model(model, config)
    summary: RankSummary = rank_summary(compressed)
    plot_ranks(summary).savefig("ranks.png")
    export_compressed(compressed, folder)
    return statistics


def route(folder: str, statistics: CalibrationStatistics) -> PreTrainedModel:
    with loading_options(verify=True):
        small = AutoModelForCausalLM.from_pretrained(folder)
    return add_router(small, RouterConfig(active_ratio=0.6), statistics=statistics)
