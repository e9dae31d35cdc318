"""The tuner: what PEFT calls when it injects, loads, merges and deletes JACTUS adapters."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_jactus._processes import gather_objects, num_processes, process_index
from peft_jactus._progress import progress
from peft_jactus.errors import BaseWeightsFreedError
from peft_jactus.numerics.allocation import uniform_rank
from peft_jactus.numerics.factorization import factorize
from peft_jactus.tuner.adapter_format import TENSOR_NAMES, TRAINABLE, frozen_dtype, num_in_buffers, tensors_of
from peft_jactus.tuner.atomic_tuner import AtomicTuner
from peft_jactus.tuner.base_weights import dense_dtype, let_go_of_weight_
from peft_jactus.tuner.budget import budget_ratio, ranks_within_budget
from peft_jactus.tuner.checkpoint_checks import check_complete, fit_layers_to_checkpoint
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.tuner.config_checks import check_can_be_made, check_not_calibrated, targets_all_linear
from peft_jactus.tuner.frozen_copies import FrozenCopy, frozen_copies, with_frozen_copies
from peft_jactus.tuner.label_names import note_label_names_
from peft_jactus.tuner.layer import JactusLayer, Linear
from peft_jactus.tuner.model_size import ModelSize, warn_of_large_rest
from peft_jactus.tuner.planning import KEEP_BYTES, measure_gains, usable_statistics
from peft_jactus.tuner.quantized_bases import forget_quantization_, is_quantized
from peft_jactus.tuner.replication import MadeLayer, digest, made_for_all, share_out_layers
from peft_jactus.tuner.target_checks import find_refusal, raise_refusals, used_elsewhere
from peft_jactus.tuner.targeting import (
    DEFAULT_TARGET_MODULES,
    add_further_heads_,
    dense_weight_and_bias,
    features_of,
    match_ranks,
    resolve_all_linear_,
    saved_layers,
    saved_rank,
    targeted_modules,
    weight_loaded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from peft import PeftConfig
    from torch import Tensor

    from peft_jactus.numerics.approximation import ProjectedWeight
    from peft_jactus.tuner.target_checks import Refusal

# Below this many layers a bar would flash by.
_MIN_LAYERS_FOR_BAR = 8


@dataclass
class _Prepared:
    """What is known of all layers before the first one is replaced.

    Attributes:
        projections: Left by the choice of ranks, for the factors.
        owners: Which process makes the tensors of which layer; empty if there is one process.
        made: What this process made for all.
    """

    projections: dict[str, ProjectedWeight]
    owners: dict[str, int]
    made: dict[str, MadeLayer] = field(default_factory=dict)


class JactusModel(AtomicTuner):
    """Replaces targeted linear layers by low-rank ones with trainable adaptation ranks, a trainable core, or both.

    Args:
        model: The model to tune.
        config: By adapter name.
        adapter_name: The first adapter.

    Attributes:
        prefix: First part of the name of every tensor of an adapter.
    """

    prefix: str = "jactus_"
    tuner_layer_cls = JactusLayer
    target_module_mapping = DEFAULT_TARGET_MODULES  # type: ignore[assignment]  # PEFT's own has this type

    _factorizing_bar: Any = None
    _prepared: _Prepared | None = None  # while layers are replaced
    _twin: str | None = None  # meanwhile, the adapter whose values a further one gets
    _elsewhere: Mapping[str, Refusal] = MappingProxyType({})  # meanwhile; see `used_elsewhere`
    _frozen_copies: Mapping[str, FrozenCopy] = MappingProxyType({})

    # -- injecting ----------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Replace the targeted layers; let go of the statistics once it is done."""
        self._elsewhere = used_elsewhere(model)
        config = self.peft_config[adapter_name]
        assert isinstance(config, JactusConfig)
        self._twin = self._twin_of(adapter_name, config)
        if self._twin is not None:  # what is loaded into it may have other ranks
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        asked = config.target_modules
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            if targets_all_linear(asked) or self._twin is not None:  # names of this model are in the user's config
                config.target_modules = asked
            self._prepared = self._twin = None
            self._elsewhere = {}
            if self._factorizing_bar is not None:
                self._factorizing_bar.close()
                self._factorizing_bar = None
        config.statistics = None
        if not is_quantized(model):
            forget_quantization_(model)

    def _twin_of(self, adapter_name: str, config: JactusConfig) -> str | None:
        """Return the adapter of this very config, if a further one of it cannot be computed: it starts as a copy.

        So trl makes the reference model of an adapter that it trains (``add_adapter("ref", peft_config["default"])``).
        """
        others = (name for name, other in self.peft_config.items() if other is config and name != adapter_name)
        computable = not self._base_weights_freed() and not config.from_checkpoint and not config.needs_statistics
        return None if computable or config.statistics is not None else next(others, None)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        assert isinstance(config, JactusConfig)
        check_can_be_made(config)
        if self._twin is not None:
            return
        freed = [layer.module_name for layer in self._layers() if layer.base_weights_freed]
        if freed and not config.from_checkpoint:
            raise BaseWeightsFreedError("compute a further adapter")
        if any(layer.merged for layer in self._layers()) and not config.from_checkpoint:
            raise ValueError(
                "An adapter is merged into the dense weights, so no other adapter can be computed from them. Call "
                "`unmerge_adapter` first."
            )
        if left_out := sorted(set(freed) - set(config.layer_ranks)):
            raise BaseWeightsFreedError(f"load an adapter that leaves {left_out} as they were")

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Decide the ranks of all layers, before the first one is replaced."""
        assert isinstance(peft_config, JactusConfig)
        if self._twin is not None:
            peft_config.target_modules = set(peft_config.layer_ranks)
            return
        if peft_config.from_checkpoint:
            check_not_calibrated(peft_config)
            saved_layers(model, peft_config, self._elsewhere)
            return
        add_further_heads_(peft_config, model)
        resolve_all_linear_(peft_config, model)
        targets = targeted_modules(model, peft_config)
        options = peft_config.factorization_options()
        statistics = peft_config.statistics = usable_statistics(peft_config, targets, peft_config.statistics)
        limit = getattr(statistics, "memory_limit", None)
        size = ModelSize.of(model, targets, peft_config)
        budget_ratio(peft_config, size)  # raises, before the work, if it cannot be reached
        warn_of_large_rest(model, targets)
        show_bar = len(targets) >= _MIN_LAYERS_FOR_BAR
        owners = share_out_layers(targets) if num_processes() > 1 else None
        measured = measure_gains(
            targets,
            statistics,
            options,
            keep_bytes=KEEP_BYTES if limit is None else min(limit, KEEP_BYTES),
            owners=owners,
            progress_bar=show_bar,
        )
        fixed_ranks = match_ranks(targets, peft_config.rank_pattern)
        ranks = ranks_within_budget(peft_config, size, measured.gains, fixed_ranks).ranks
        peft_config.layer_ranks = dict(ranks)
        peft_config.layer_energy = measured.energy_kept(ranks)
        self._prepared = _Prepared(measured.projections, owners or {})
        mine = [name for name, owner in self._prepared.owners.items() if owner == process_index()]
        num_steps = len(ranks) + len(mine)
        self._factorizing_bar = progress(description="Factorizing", unit="layer", total=num_steps, shown=show_bar)
        for name in mine:  # before the first one is waited for
            self._prepared.made[name] = self._make(peft_config, name, targets[name], ranks[name])
            self._factorizing_bar.update()

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        del parameter_name  # PEFT's, for experts held in one parameter
        assert isinstance(peft_config, JactusConfig)
        if (refusal := find_refusal(current_key, target, parent, self._elsewhere)) is not None:
            raise_refusals({current_key: refusal})
        if self._twin is not None:
            assert isinstance(target, JactusLayer)
            target.copy_adapter(self._twin, adapter_name)
            return
        with weight_loaded(target):
            rank = self._rank_of(peft_config, current_key, target)
            values = None
            if not peft_config.from_checkpoint:
                made = self._made(peft_config, current_key, target, rank)
                rank, values = made.rank, made.tensors
                peft_config.layer_ranks[current_key] = rank
                if self._factorizing_bar is not None:
                    self._factorizing_bar.update()
            shape = peft_config.adapter_shape(rank, *features_of(target))
            layer: JactusLayer
            if isinstance(target, JactusLayer):
                layer = target
                layer.update_layer(adapter_name, rank, shape=shape, values=values)
            else:
                dtype = self._dtype_of(target)
                layer = linear = Linear(target, current_key, adapter_name, dtype, r=rank, shape=shape, values=values)
                if adapter_name not in self.active_adapters:
                    linear.requires_grad_(False)
                self._replace_module(parent, target_name, linear, target)
            if self._nobody_needs_base_weight(current_key):
                # Only now: _replace_module reads the device of the dense weight.
                layer.free_base_weights()
        if layer.base_weights_freed and target is not layer:
            # PEFT holds the dense layers until the last one is replaced.
            let_go_of_weight_(target)

    def _nobody_needs_base_weight(self, name: str) -> bool:
        """Whether no adapter asked to keep the dense weights, or leaves this layer alone."""
        return all(name in config.layer_ranks and not config.keep_base_weights for config in self._configs())

    def _configs(self) -> list[JactusConfig]:
        return [config for config in self.peft_config.values() if isinstance(config, JactusConfig)]

    @staticmethod
    def _rank_of(config: JactusConfig, name: str, target: nn.Module) -> int:
        if config.from_checkpoint:
            return saved_rank(config, name, target)
        if name in config.layer_ranks:
            return config.layer_ranks[name]
        # PEFT can pick modules by the keys of a state dict, which `target_modules` then need not match.
        return uniform_rank(config.retained_ratio, *features_of(target), config.storage)

    def _dtype_of(self, target: nn.Module) -> torch.dtype:
        return target.base_dtype if isinstance(target, JactusLayer) else dense_dtype(target, self.model)

    def _made(self, config: JactusConfig, name: str, target: nn.Module, rank: int) -> MadeLayer:
        """Return what is made of a layer, from the process that made it."""
        owner = None if self._prepared is None else self._prepared.owners.get(name)
        if self._prepared is None or owner is None:
            return self._make(config, name, target, rank)
        return made_for_all(self._prepared.made.pop(name, None), owner, config, target, self._dtype_of(target))

    @torch.no_grad()
    def _make(self, config: JactusConfig, name: str, target: nn.Module, rank: int) -> MadeLayer:
        with weight_loaded(target):
            weight, bias = dense_weight_and_bias(target)
        statistics = None if config.statistics is None else config.statistics.get(name)
        projected = None if self._prepared is None else self._prepared.projections.pop(name, None)
        factors = factorize(weight, bias, statistics, rank, config.factorization_options(), projected=projected)
        if config.init_weights is False:
            core = factors.core
            noise = torch.randn(core.shape, dtype=core.dtype).to(core.device)
            scale = core.square().mean().sqrt().clamp(min=0.05)  # visible also on a weight of zeros
            factors = dataclasses.replace(factors, core=core + scale * noise)
        shape = config.adapter_shape(factors.rank, *features_of(target))
        return MadeLayer(factors.rank, tensors_of(factors, shape, self._dtype_of(target), statistics))

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            return list(super()._get_module_names_tied_with_embedding())
        except NotImplementedError:  # of `get_input_embeddings`: a detector has none, and nothing is tied to them
            return []

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Only what trains needs float32; the rest keeps the dtype of the model.
        for layer in self._layers():
            if adapter_name not in layer.r:
                continue
            model_dtype = frozen_dtype(layer.adapter_tensors(adapter_name))
            dtype = torch.promote_types(model_dtype, torch.float32) if autocast_adapter_dtype else model_dtype
            for name in TRAINABLE:
                held = getattr(layer, name)
                if adapter_name in held and held[adapter_name].dtype != dtype:
                    tensor = held[adapter_name]
                    held[adapter_name] = nn.Parameter(tensor.detach().to(dtype), requires_grad=tensor.requires_grad)

    # -- training in several processes -----------------------------------------------------------------------

    def make_shardable(self) -> None:
        """Let FSDP2 and DeepSpeed ZeRO-3 also shard the frozen bases; call this before you prepare the training.

        They shard parameters, but keep buffers whole in every process. The bases are buffers, because PEFT expects all
        parameters of an adapter to train. This function makes them parameters that do not train. Outputs, checkpoints,
        and trained and counted parameters stay the same. With `frozen_bits`, the bases stay whole. Under ZeRO-3, the
        first process keeps a copy of the bases in CPU memory, to save adapters.
        """
        for layer in self.modules():
            if isinstance(layer, JactusLayer):
                layer.hold_bases_as_parameters()
        self._frozen_copies = frozen_copies(self)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel, which asks for this name, need not send before each forward pass.

        The frozen tensors, if all processes hold the same ones; else none, and it sends those of the first process.
        """
        frozen = {
            name: buffer for name, buffer in self.named_buffers() if not set(TENSOR_NAMES).isdisjoint(name.split("."))
        }
        if len({tuple(digests) for digests in gather_objects([digest(buffer) for buffer in frozen.values()])}) > 1:
            return []
        return [prefix + name for name in frozen for prefix in ("", "base_model.")]  # with a PeftModel around this

    # -- loading ------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a checkpoint against the model, whole, before PEFT fills in what fits and ignores the rest."""
        assert isinstance(config, JactusConfig)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        fit_layers_to_checkpoint(model, config, adapter_name, state_dict)
        return state_dict

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return the tensors to save; none may be missing. Note what the file of a head does not say."""
        assert isinstance(config, JactusConfig)
        note_label_names_(config, model)
        if state_dict and isinstance(tuner := getattr(model, "base_model", None), cls):
            state_dict = with_frozen_copies(tuner, state_dict, tuner._frozen_copies)
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if state_dict:  # in processes that do not save it can be empty
            check_complete(model, config, adapter_name, state_dict | found, verb="saved")
        return found

    # -- what needs the dense weights ---------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; the last one only if the dense weights are there to fall back on."""
        if len(self.peft_config) == 1 and adapter_name in self.peft_config and self._base_weights_freed():
            raise BaseWeightsFreedError("delete the last adapter")
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """Return the dense model as it was before."""
        if self._base_weights_freed():
            raise BaseWeightsFreedError("unload without merging; use `merge_and_unload`")
        return super().unload()

    def disable_adapter_layers(self) -> None:
        """Run the dense model."""
        if self._base_weights_freed():
            raise BaseWeightsFreedError("disable the adapter")
        super().disable_adapter_layers()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # Without this method PEFT drops `adapter_names` and runs the active adapter for every example.
        del args
        if kwargs.get("adapter_names") is not None:
            raise ValueError("`adapter_names` (several adapters in one batch) is not supported by JACTUS.")
        yield

    # -- looking ------------------------------------------------------------------------------------------

    def _layers(self) -> Iterator[JactusLayer]:
        return (module for module in self.model.modules() if isinstance(module, JactusLayer))

    def _base_weights_freed(self) -> bool:
        return any(layer.base_weights_freed for layer in self._layers())

    def num_in_buffers(self) -> int:
        """Return how many numbers all adapters hold in buffers; PEFT counts parameters only."""
        total = 0
        for layer in self._layers():
            adapters = [(layer.adapter_tensors(name), shape) for name, shape in layer.adapter_shapes.items()]
            total += num_in_buffers(adapters, layer.out_features, layer.in_features)
        return total
