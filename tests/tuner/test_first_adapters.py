"""A first adapter that cannot be made or loaded is refused before dense weights go, and leaves the model as it was."""

import functools
import math

import pytest
import torch
from peft import get_peft_model

from peft_jactus import JactusConfig, calibrate, plan_ranks
from tests.support.compressed_models import batches_for, tiny_bert

IDS = {"input_ids": torch.arange(2, 8)[None]}
USES = {
    "calibrate": lambda model, config: calibrate(model, config, batches_for(model), progress_bar=False),
    "get_peft_model": get_peft_model,
    "plan_ranks": functools.partial(plan_ranks, progress_bar=False),
}


def config_of(**fields):
    fields = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "retained_ratio": 0.6} | fields
    return JactusConfig(decomposition="svd", **fields)


def state_of(model):
    """What a failure may not change."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


@pytest.mark.parametrize("use", sorted(USES))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, use):
    model, config = tiny_bert(), config_of()
    broken = [f"bert.encoder.layer.{number}.output.dense" for number in range(2)]
    sound = {name: model.get_submodule(name).weight.detach().clone() for name in broken}
    for name in broken:
        model.get_submodule(name).weight.data[0, 0] = value
    before = state_of(model)
    with pytest.raises(ValueError, match=f"^{', '.join(broken)}: the weight holds NaN or infinite numbers"):
        USES[use](model, config)
    assert state_of(model) == before
    for name, weight in sound.items():
        model.get_submodule(name).weight.data.copy_(weight)
    USES[use](model, config)
