"""Put a router into a model, find it there, and take it out again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from peft_jactus.deployment.extensions import CheckpointExtension
from peft_jactus.deployment.layers import FactorizedLinear, LowRankLinear
from peft_jactus.errors import DamagedCheckpointError
from peft_jactus.parse.config import RouterConfig
from peft_jactus.parse.inputs import first_block
from peft_jactus.parse.layer import RoutedLinear, RoutingState
from peft_jactus.parse.router import RankRouter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

# Name of the router in a model, and so of its tensors in a checkpoint; and of its settings in ``quantization_config``.
ROUTER_NAME = "rank_router"
ROUTER_FIELD = "router"

# By type of model: layers, by a part of their names, whose inputs have the sequence first, then the rows of the batch.
# Where there are as many of both, a layer cannot see that.
_SEQUENCE_FIRST = {"bridgetower": "vision_model.", "longformer": "", "mlcd_vision_model": "out_proj", "xlnet": ""}


def install_router(model: PreTrainedModel, names: Sequence[str], config: RouterConfig) -> RankRouter:
    """Make low-rank layers of ``model`` routed ones, in place, and give it a router that steers them.

    Args:
        model: With a `LowRankLinear` of each name; its tensors may be on the meta device.
        names: Full names, in the order of the experts.
        config: Of the router.

    Returns:
        The router, which is ``model.rank_router``: untrained, all scores zero. A `TypeError` says if the model is not
        one that can be routed.
    """
    check_routable(model, config)
    state = RoutingState()
    layers = []
    for position, name in enumerate(names):
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        layers.append(RoutedLinear(layer.down, layer.up, position, state))
        model.set_submodule(name, layers[-1])
    embeddings = model.get_input_embeddings() if config.router_input == "embeddings" else None
    width = getattr(embeddings, "embedding_dim", None) or model.config.get_text_config().hidden_size
    router = RankRouter(config, layers, width, device=layers[0].weight.device)
    model.add_module(ROUTER_NAME, router)
    router.attach(model)
    router.train(model.training)
    return router


class RouterExtension(CheckpointExtension):
    """How the loader meets a router: see `CheckpointExtension`."""

    def parse(self, values: object) -> RouterConfig:
        """Return the settings that a ``config.json`` holds; a `ValueError` says what is wrong with them."""
        return RouterConfig.parse(values)

    def install(self, model: PreTrainedModel, layers: Sequence[str], config: RouterConfig) -> RankRouter:
        """Give ``model`` a router of its two-factor layers; a `DamagedCheckpointError` says if it has none."""
        names = [name for name in layers if isinstance(model.get_submodule(name), LowRankLinear)]
        if not names:
            raise DamagedCheckpointError("config.json describes a router, but no layer that it could route.")
        return install_router(model, names, config)

    def config_of(self, module: nn.Module) -> RouterConfig:
        """Return the settings of a router."""
        assert isinstance(module, RankRouter)
        return module.router_config

    def title_of(self, module: nn.Module) -> str:
        """Return what the module is and its size, for errors."""
        assert isinstance(module, RankRouter)
        return f"router of {len(module.table)} experts"

    def remove(self, model: nn.Module) -> None:
        """Take the router out of ``model``; the layers run all their ranks from then on."""
        remove_router(model)

    def describe(self, config: RouterConfig) -> str:
        """Return a line about the settings, for people."""
        reads = "embeddings" if config.router_input == "embeddings" else "the first block"
        return (
            f"{config.router_kind} on {reads}, experts of {config.expert_size} ranks; runs "
            f"{config.active_ratio:.0%} of the dense parameters ({config.allocation})"
        )


def check_routable(model: PreTrainedModel, config: RouterConfig) -> None:
    """Raise `TypeError` if a model is not one that can be routed, or lacks what the router reads."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # transformers raises it for a model without token embeddings, as CLIP and Wav2Vec2
        embeddings = None
    if model.config.is_encoder_decoder or embeddings is None:
        raise TypeError(
            f"{type(model).__name__} cannot be routed. Only encoder models and decoder-only models that have input "
            "embeddings can. Use it without a router."
        )
    transposed = _sequence_first_layers(model)
    if transposed:
        raise TypeError(
            f"{type(model).__name__} cannot be routed: inputs of {transposed[:5]} have the sequence first, not the "
            "rows of the batch. Use it without a router; or, if these are not all layers, compress it with them in "
            "`exclude_modules`."
        )
    if config.router_input == "first_block":
        first_block(model)


def _sequence_first_layers(model: PreTrainedModel) -> list[str]:
    found = {
        layer
        for inner in model.modules()
        if isinstance(inner, PreTrainedModel) and inner.config.model_type in _SEQUENCE_FIRST
        for name, layer in inner.named_modules()
        if isinstance(layer, FactorizedLinear) and _SEQUENCE_FIRST[inner.config.model_type] in name
    }
    return [name for name, layer in model.named_modules() if layer in found]


def check_in_memory(modules: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError` if tensors of these modules, by name, are offloaded: then they have no values here."""
    offloaded = [
        name
        for name, module in modules.items()
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    ]
    if offloaded:
        raise ValueError(f"{offloaded[:5]} are offloaded. Load the model without `device_map`.")


def remove_router(model: nn.Module) -> None:
    """Take the router and its hooks from a model, if it has one; layers that are left run all their ranks."""
    router = router_of(model)
    if router is not None:
        router.detach_from(model)
        delattr(model, ROUTER_NAME)


def router_of(model: nn.Module) -> RankRouter | None:
    """Return the router of a model, if it has one."""
    router = getattr(model, ROUTER_NAME, None)
    return router if isinstance(router, RankRouter) else None
