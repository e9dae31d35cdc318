"""From a compressed model to a routed one: sorted rank-one terms, and an untrained router."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch

from peft_jactus._progress import progress
from peft_jactus.deployment.config import LayerForm
from peft_jactus.deployment.copying import structural_copy
from peft_jactus.deployment.layers import FactorizedLinear, LowRankLinear
from peft_jactus.deployment.names import checkpoint_names
from peft_jactus.deployment.quantizer import JactusQuantizer, check_readable
from peft_jactus.numerics.approximation import Decomposition, DecompositionOptions, project_weight
from peft_jactus.parse.experts import ExpertTable, LayerShape
from peft_jactus.parse.installation import ROUTER_FIELD, check_in_memory, check_routable, install_router, router_of
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.tuner.layer import JactusLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peft_jactus.calibration.statistics import CalibrationStatistics
    from peft_jactus.numerics.moments import LayerStatistics
    from peft_jactus.parse.config import RouterConfig


@torch.no_grad()
def routed_copy(
    model: PreTrainedModel,
    config: RouterConfig,
    *,
    statistics: CalibrationStatistics | None = None,
    decomposition: Decomposition | None = None,
    progress_bar: bool = True,
) -> PreTrainedModel:
    """Return a model whose factorised layers consist of rank experts, with an untrained router to choose them.

    The weight of each factorised layer, in any storage form, is written as a sum of rank-one terms, the most important
    ones first. With all experts running, it is the same weight. Train the router next: `RouterTrainer`.

    Args:
        model: A compressed model that `export_compressed` wrote and `from_pretrained` loaded. It does not change;
            tensors outside of its factorised layers are shared.
        config: Budget, size of the experts, and so on.
        statistics: Statistics of the layers from `calibrate`, under the names of the model. With them, terms are
            sorted by their effect on the loss; without, by singular value.
        decomposition: The metric by which terms are sorted, as in `JactusConfig`. ``"jactus"`` is the same as
            ``"kfac"`` here, since the union was chosen when the model was compressed. Default: ``"kfac"`` with
            ``statistics``, ``"svd"`` without.
        progress_bar: Show a bar over the layers.

    Returns:
        The routed model; its router is ``model.rank_router``.

    Raises:
        ValueError: If ``model`` has no factorised layers, already has a router or an adapter, or is offloaded; if the
            budget is less than one expert in each layer; or if ``decomposition`` is unknown, or it needs
            ``statistics`` that are missing for a layer. A `TypeError` is raised for an encoder-decoder model.
    """
    layers = _factorized_layers(model)
    check_routable(model, config)
    decomposition = decomposition or ("svd" if statistics is None else "kfac")
    if decomposition not in get_args(Decomposition):
        raise ValueError(f"`decomposition` must be one of {get_args(Decomposition)}; got {decomposition!r}.")
    options = _options_of("kfac" if decomposition == "jactus" else decomposition)
    missing = [name for name in layers if statistics is None or name not in statistics]
    if options.needs_statistics and missing:
        raise ValueError(
            f"`decomposition`={decomposition!r} needs `statistics` of every factorised layer; there are none for "
            f"{missing[:5]}. Pass what `calibrate` returned for this model."
        )
    names = checkpoint_names(model, layers)
    ordered = sorted(layers, key=names.__getitem__)  # as a loader finds them again
    table = ExpertTable([LayerShape.of(layers[name]) for name in ordered], config.expert_size)
    table.budgets(config.active_ratio, config.allocation)  # raises if the ratio is too small
    routed = structural_copy(model)
    quantizer = routed.hf_quantizer
    assert isinstance(quantizer, JactusQuantizer)
    for name in progress(ordered, description="Ordering ranks", unit="layer", shown=progress_bar):
        layer_statistics = statistics[name] if options.needs_statistics and statistics is not None else None
        routed.set_submodule(name, _in_order(layers[name], layer_statistics, options))
        form = quantizer.module_forms[name]
        quantizer.module_forms[name] = LayerForm(LowRankLinear.storage, form.rank, form.energy_kept)
    install_router(routed, ordered, config)
    quantizer.quantization_config.extensions[ROUTER_FIELD] = config
    return routed


def _options_of(decomposition: Decomposition) -> DecompositionOptions:
    return JactusConfig(decomposition=decomposition).factorization_options().decomposition


def _factorized_layers(model: PreTrainedModel) -> dict[str, FactorizedLinear]:
    if router_of(model) is not None:
        raise ValueError(
            "`model` has a router already. Set `model.rank_router.active_ratio`, or start from a static model."
        )
    if any(isinstance(module, JactusLayer) for module in model.modules()):
        raise ValueError(
            "`model` has a JACTUS adapter, not deployed layers. Give what `export_compressed` wrote, loaded by "
            "`from_pretrained`; or `peft_jactus.compressed_copy(model)`."
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}
    if not layers:
        raise ValueError(
            "`model` has no factorised layers. Compress it first: `calibrate`, `get_peft_model`, `export_compressed`."
        )
    check_in_memory(layers)
    check_readable(model, layers, would_lose_it="routed layers")
    return layers


def _in_order(
    layer: FactorizedLinear, statistics: LayerStatistics | None, options: DecompositionOptions
) -> LowRankLinear:
    """Return the layer as rank-one terms in the order of the metric."""
    left, right = project_weight(layer.dense_weight(), statistics, options).terms(layer.rank)
    dtype, device = layer.weight.dtype, layer.weight.device
    ordered = LowRankLinear.from_product(left, right.mT, layer.bias, dtype=dtype, device=device)
    return ordered.train(layer.training)
