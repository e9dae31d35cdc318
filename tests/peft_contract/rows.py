"""The configurations that PEFT's tests run with, and what each of them contradicts by design."""

from functools import partial
from typing import Any

from peft_jactus import JactusConfig
from tests.peft_contract.upstream import ExpectedFailure, Row

# The suite has no calibration data. Its tests disable and delete adapters and compute second ones from the same
# weights, so most rows keep them.
KEPT_BASE = {"decomposition": "svd", "keep_base_weights": True}
FREED_BASE = {"decomposition": "svd", "keep_base_weights": False}
LOW_RANK = {"rank_pattern": {".*": 8}}
IN_FEW_BITS = {"frozen_bits": 8, "adaptation_rank": 1, "adaptation_init": "random"}
# min(out, in) of upstream's layers: reproduces the weight, so that a new adapter is the identity.
FULL_RANK = {"lin0": 10, "lin1": 2, "conv1d": 1}

NOT_IDENTITY = ExpectedFailure(
    "a rank below min(out, in) only approximates the weight: a new adapter is not the identity", AssertionError
)
ROUNDED = ExpectedFailure("8 bits only approximate the weight: a new adapter is not the identity", AssertionError)
NO_BASE = ExpectedFailure("needs the base weights, which keep_base_weights=False frees", ValueError)
NO_BASE_STATE = ExpectedFailure("has no base weights to return for the targeted layers", AssertionError)
LAST_ADAPTER = ExpectedFailure(
    "without base weights the last adapter cannot be deleted, merged or not, and the error says so", AssertionError
)
SECOND_ADAPTER = ExpectedFailure("computes a second adapter, but the first has freed the base weights", ValueError)
# Its two adapters have one config object, of which the second cannot be computed.
COPY = ExpectedFailure("wants two adapters of one config to differ; the second is a copy of the first", AssertionError)

LOW_RANK_FAILURES = {
    "test_disable_adapters": NOT_IDENTITY,
    "test_disable_adapters_with_merging": NOT_IDENTITY,
}
FREED_BASE_FAILURES = {
    "test_delete_adapter_properly_cleans_up_after_itself": NO_BASE,
    "test_delete_merged_adapter_raises_without_mutation": LAST_ADAPTER,
    "test_disable_adapter": NO_BASE,
    "test_disable_adapter_is_reentrant": NO_BASE,
    "test_disable_adapters": NO_BASE,
    "test_disable_adapters_exiting_context_restores_previous_state": NO_BASE,
    "test_disable_adapters_with_merging": NO_BASE,
    "test_get_base_model_state_dict": NO_BASE_STATE,
    "test_unload_adapter": NO_BASE,
    "test_delete_adapter": SECOND_ADAPTER,
    "test_delete_inactive_adapter": SECOND_ADAPTER,
    "test_delete_merged_adapter_only_rejects_the_merged_one": SECOND_ADAPTER,
    "test_merge_layers_multi": COPY,
    "test_save_pretrained_selected_adapters": SECOND_ADAPTER,
    "test_save_pretrained_selected_adapters_pickle": SECOND_ADAPTER,
}


def _custom(
    name: str,
    ranks: dict[str, int],
    model: str = "MLP",
    *,
    fails: dict[str, ExpectedFailure] | None = None,
    **options: Any,
) -> Row:
    """Return a row of test_custom_models: (test_name, model_id, config_cls, config_kwargs)."""
    options = KEPT_BASE | {"adaptation_rank": 0, "target_modules": list(ranks), "rank_pattern": ranks} | options
    return Row(name, (name, model, JactusConfig, options), fails or {})


def _full(*layers: str) -> dict[str, int]:
    return {layer: FULL_RANK[layer] for layer in layers}


def _two_adapters(name: str, first: str, second: str) -> Row:
    """Return a row with an adapter each on two layers: (test_name, tuner_method, config_cls, 2 x config_kwargs)."""
    options = [
        KEPT_BASE | {"target_modules": [layer], "rank_pattern": _full(layer), "init_weights": False}
        for layer in (first, second)
    ]
    return Row(name, (name, "jactus", JactusConfig, *options))


def task(task_type: str) -> list[Row]:
    """Return the rows of the modules that test a task: (config_cls, config_kwargs).

    The second one is how the method is meant to be used: ranks from a budget, and no base weights.
    """
    options = {"task_type": task_type}
    freed = FREED_BASE | {"retained_ratio": 0.5, "adaptation_space": "retained"} | options
    return [
        Row("kept-base", (JactusConfig, KEPT_BASE | LOW_RANK | {"adaptation_rank": 0} | options)),
        Row("freed-base", (JactusConfig, freed), FREED_BASE_FAILURES),
        Row(
            "adapting",
            (JactusConfig, KEPT_BASE | LOW_RANK | {"adaptation_rank": 2, "adaptation_init": "random"} | options),
        ),
    ]


CUSTOM_MODELS = [
    _custom("full-rank-lin0", _full("lin0")),
    _custom("full-rank-lin1", _full("lin1")),
    _custom("full-rank-both", _full("lin0", "lin1")),
    _custom("full-rank-regex", _full("lin0"), target_modules="lin0"),
    _custom("full-rank-modules-to-save", _full("lin0"), modules_to_save=["lin1"]),
    _custom("full-rank-conv1d", _full("conv1d"), "EmbConv1D"),
    _custom("low-rank", {"lin0": 4}, fails=LOW_RANK_FAILURES),
    _custom("full-rank-adapting", _full("lin0", "lin1"), adaptation_rank=1, adaptation_init="random"),
    _custom(
        "full-rank-adapting-with-core",
        _full("lin0", "lin1"),
        adaptation_rank=1,
        adaptation_init="random",
        train_core=True,
    ),
    _custom("low-rank-adapting", {"lin0": 4}, fails=LOW_RANK_FAILURES, adaptation_rank=2, adaptation_init="random"),
    _custom(
        "full-rank-frozen-in-8-bits", _full("lin0"), fails=dict.fromkeys(LOW_RANK_FAILURES, ROUNDED), **IN_FEW_BITS
    ),
    _custom("freed-base", _full("lin0"), fails=FREED_BASE_FAILURES, **FREED_BASE),
    _custom("freed-base-conv1d", _full("conv1d"), "EmbConv1D", fails=FREED_BASE_FAILURES, **FREED_BASE),
]
TWO_ADAPTERS = [
    _two_adapters("same-layer", "lin0", "lin0"),
    _two_adapters("different-layers", "lin0", "lin1"),
]
# For the tests that call the class themselves, with `target_modules` alone.
CONFIG_CLASS = [Row("kept-base", (partial(JactusConfig, **KEPT_BASE),))]
CONFIG = [Row("kept-base", (JactusConfig(**KEPT_BASE),))]
