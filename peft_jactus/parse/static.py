"""The best single choice of ranks for all prompts: from a routed model to a compressed one without a router."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft_jactus.deployment.config import LayerForm
from peft_jactus.deployment.copying import structural_copy
from peft_jactus.deployment.layers import PivotedLinear
from peft_jactus.deployment.quantizer import JactusQuantizer, check_readable
from peft_jactus.deployment.ranks import rank_summary
from peft_jactus.numerics.allocation import stored_parameters
from peft_jactus.parse.experts import select_experts
from peft_jactus.parse.installation import ROUTER_FIELD, ROUTER_NAME, check_in_memory, remove_router, router_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_jactus.parse.layer import RoutedLinear
    from peft_jactus.parse.router import RankRouter

# Halvings of the interval of active ratios: fewer parameters than an expert has.
_BISECTIONS = 24


@torch.no_grad()
def static_copy(model: PreTrainedModel, retained_ratio: float | None = None) -> PreTrainedModel:
    """Return a plain compressed model with the ranks that the router chooses for the average prompt.

    This is the best static choice: it scores the ranks of all layers by their effect on the output of the whole model,
    while `JactusConfig(allocation="global")` scores them by the error of their own layer. `initialize_router_`
    computes such scores from a few batches, and `RouterTrainer` improves them. The other ranks are not stored.

    Args:
        model: A routed model, from `routed_copy` or loaded. It does not change; tensors outside of its routed layers
            are shared.
        retained_ratio: Number of parameters that are stored, as a share of the dense weights of the routed layers, in
            (0, 1]. Default: ``model.rank_router.active_ratio``. Layers are stored pivoted, so they keep more ranks
            than run at an equal ``active_ratio``.

    Returns:
        The model, without a router: what `from_pretrained` loads after ``save_pretrained``.

    Raises:
        ValueError: If ``model`` has no router, its layers have an adapter, are quantised or offloaded, or the ratio is
            not in (0, 1] or too small for one expert in each layer.
    """
    router = router_of(model)
    if router is None:
        raise ValueError("`model` has no router. Make it a routed one first: `routed_copy`, `initialize_router_`.")
    ratio = router.active_ratio if retained_ratio is None else retained_ratio
    if not 0 < ratio <= 1:
        raise ValueError(f"`retained_ratio` must be in (0, 1]; got {ratio!r}.")
    names = {name: layer for name, layer in model.named_modules() if layer in router.layers}
    check_readable(model, names, would_lose_it="static ranks")
    check_in_memory({**names, ROUTER_NAME: router})
    selected = _choose(router, ratio)
    static = structural_copy(model)
    remove_router(static)
    quantizer = static.hf_quantizer
    assert isinstance(quantizer, JactusQuantizer)
    for name, layer in names.items():
        replacement = _with_terms(layer, router.table.term_index(layer.position, selected))
        static.set_submodule(name, replacement)
        quantizer.module_forms[name] = LayerForm(replacement.storage, replacement.rank)
    quantizer.quantization_config.extensions.pop(ROUTER_FIELD, None)
    quantizer.quantization_config.retained_ratio = _share_of_targeted(model, router, ratio)
    return static


def _share_of_targeted(model: PreTrainedModel, router: RankRouter, retained_ratio: float) -> float:
    """Return the ratio with respect to all targeted layers: those that are not routed are kept whole."""
    routed = int(router.table.dense_costs.sum())
    targeted = sum(row.num_dense for row in rank_summary(model).rows)
    return retained_ratio + (1 - retained_ratio) * (targeted - routed) / targeted


def _choose(router: RankRouter, retained_ratio: float) -> Tensor:
    """Return the choice ``(experts,)`` for the average prompt that stores at most this share."""
    scores = router(router.input_mean.unsqueeze(0))
    allocation = router.router_config.allocation
    dense = int(router.table.dense_costs.sum())

    def choose(active_ratio: float) -> Tensor:
        return select_experts(scores, router.table, router.budgets(active_ratio), allocation)[0].cpu()

    def share(selected: Tensor) -> float:
        stored = 0
        for layer in router.layers:
            rank = len(router.table.term_index(layer.position, selected))
            stored += stored_parameters(rank, layer.out_features, layer.in_features, "pivoted")
        return stored / dense

    best, low, high = choose(retained_ratio), retained_ratio, 1.0  # pivoted, it takes less than as two factors
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        selected = choose(middle)
        if share(selected) <= retained_ratio:
            best, low = selected, middle
        else:
            high = middle
    return best


def _with_terms(layer: RoutedLinear, terms: Tensor) -> PivotedLinear:
    """Return the layer with some of its terms, stored pivoted."""
    down, up = layer.gather(terms)
    core = torch.eye(len(terms), dtype=up.dtype, device=up.device)
    static = PivotedLinear.from_factors(up, core, down.mT, layer.bias, dtype=layer.weight.dtype)
    return static.train(layer.training)
