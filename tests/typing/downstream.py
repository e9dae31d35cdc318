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
    plan_ranks,
    plot_plan,
    plot_ranks,
    rank_summary,
)
from peft_jactus.parse import RouterConfig, routed_copy


def compress(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], folder: str) -> CalibrationStatistics:
    config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=0.8)
    statistics: CalibrationStatistics = calibrate(model, config, batches, max_batches=16)
    plan = plan_ranks(model, config, statistics)
    ratios: list[float] = [plan.model_ratio, plan.at(0.6).model_ratio]
    assert plan.loss_rise is not None
    assert plan.loss_rise < min(ratios)
    plot_plan(plan).savefig("plan.png")
    compressed = get_peft_model(model, config)
    summary: RankSummary = rank_summary(compressed)
    plot_ranks(summary).savefig("ranks.png")
    export_compressed(compressed, folder)
    return statistics


def route(folder: str, statistics: CalibrationStatistics) -> PreTrainedModel:
    with loading_options(verify=True):
        small = AutoModelForCausalLM.from_pretrained(folder)
    return routed_copy(small, RouterConfig(active_ratio=0.6), statistics=statistics)
