"""The tuned layer: frozen bases, a trainable core, and what PEFT expects of a tuner layer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.nn import functional

from peft_jactus._dtypes import output_dtype
from peft_jactus._placeholders import RefusesWeight
from peft_jactus.errors import BaseWeightsFreedError
from peft_jactus.numerics.adapted_product import adapted_product
from peft_jactus.numerics.core_product import core_product
from peft_jactus.tuner.adapter_format import (
    FROZEN,
    TENSOR_NAMES,
    TRAINABLE,
    AdapterShape,
    bases_in,
    frozen_dtype,
    frozen_weight_in,
    is_unfilled,
    unfilled,
    weight_of,
)
from peft_jactus.tuner.base_weights import is_conv1d, quantization_of
from peft_jactus.tuner.dense_layers import (
    AdaptedWeight,
    FreedBase,
    SetAside,
    check_merged,
    unreadable_weight,
    with_parameters,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers.pytorch_utils import Conv1D

    from peft_jactus.numerics.factorization import LowRankWeight


class JactusLayer(AdaptedWeight, BaseTunerLayer):
    """State of one adapted layer: for each adapter what approximates the weight, and adaptation ranks.

    With a core that trains, ``jactus_core``, there are two frozen bases: ``jactus_left`` ``(out - rank, rank)`` and
    ``jactus_right`` ``(in - rank, rank)`` are their coefficients, ``jactus_left_order`` and ``jactus_right_order`` say
    of which features (`interpolation.InterpolativeBasis`). Without, there are one of them and ``jactus_frozen_factor``
    (`frozen_weight.FrozenWeight`); or codes in their place, and ``jactus_left_scale``, ``jactus_right_scale`` and
    ``jactus_frozen_factor_scale`` beside them (`frozen_weight.RoundedWeight`).

    ``jactus_adapt_down`` ``(adaptation rank, in)`` and ``jactus_adapt_up`` ``(out, adaptation rank)`` train, where
    there are adaptation ranks; in the retained space their product has the shape of ``jactus_frozen_factor``.

    What does not train is held in persistent buffers, as PEFT's contract wants frozen tensors of an adapter: with the
    bases as frozen parameters 103 tests of PEFT 0.21.2's own suite fail, as they want a gradient for each of an
    adapter's parameters (72), autocast's dtype (28), and ``requires_grad`` (3). `hold_bases_as_parameters` changes
    that.
    """

    jactus_adapt_up: nn.ParameterDict
    jactus_bias: BufferDict

    adapter_layer_names = TRAINABLE
    other_param_names = (*(name for name in TENSOR_NAMES if name not in TRAINABLE), "r", "adapter_shapes")
    cast_input_dtype_enabled = True  # `peft.helpers.disable_input_dtype_casting` sets it

    def __init__(self, base_layer: nn.Module, module_name: str, dtype: torch.dtype) -> None:
        self.base_layer = base_layer
        self._dense_dtype = dtype
        self.in_features, self.out_features = cast("tuple[int, int]", _get_in_out_features(base_layer))
        self.r: dict[str, int] = {}  # of the whole weight
        self.adapter_shapes: dict[str, AdapterShape] = {}
        for name in TENSOR_NAMES:
            setattr(self, name, nn.ParameterDict({}) if name in TRAINABLE else BufferDict({}, persistent=True))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.module_name = module_name
        self._unfilled: set[str] = set()
        self._unmerged: SetAside | None = None  # the dense layer, while merged
        self._dense_is_merged = False

    def _base(self) -> nn.Linear | Conv1D:
        """Return the dense layer, or the `FreedBase` in its place, which has the same attributes."""
        return cast("nn.Linear | Conv1D", self.get_base_layer())

    @property
    def base_weights_freed(self) -> bool:
        """Whether the dense weight of this layer is gone."""
        return isinstance(self.get_base_layer(), FreedBase) or self._dense_is_merged

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the dense weight; of a quantized one, that which it has once it is dense."""
        base = self._base()
        # torch.compile traces the first question, which is the answer for most layers, and not the second.
        is_plain = type(base.weight) in (nn.Parameter, torch.Tensor) or quantization_of(base) is None
        return base.weight.dtype if is_plain else self._dense_dtype

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias."""
        base = self.get_base_layer()
        return base.has_bias if isinstance(base, FreedBase) else getattr(base, "bias", None) is not None

    def _weight(self) -> Tensor:
        weight = self._base().weight
        if self.merged or (self.disable_adapters and not self.base_weights_freed):
            return weight
        shape = (self.in_features, self.out_features)[:: 1 if self.is_conv1d else -1]
        return unreadable_weight(self.module_name, self.base_dtype, weight.device, shape)

    # -- creating an adapter ------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, r: int, *, shape: AdapterShape, values: Mapping[str, Tensor] | None
    ) -> None:
        """Add or replace an adapter.

        Args:
            adapter_name: Its name.
            r: The rank of the whole weight, at least 1.
            shape: How it is shared out.
            values: All tensors, by name (`adapter_format.tensors_of`). ``None`` allocates NaN for a checkpoint to
                fill: a tensor that it does not fill raises at the first forward pass.

        Raises:
            ValueError: If the rank is below 1.
        """
        if r < 1:
            raise ValueError(f"{self.module_name}: the rank must be at least 1; got {r}.")
        weight = self._base().weight
        self.r[adapter_name] = r
        self.adapter_shapes[adapter_name] = shape
        for name, size in self._expected_shapes(shape).items():
            dtype = shape.dtype_of(name, self.base_dtype)
            tensor = unfilled(size, dtype, weight.device) if values is None else values[name]
            tensor = tensor.to(device=weight.device, dtype=dtype).contiguous()
            # With one row, a transposed matrix is contiguous, too, but DDP wants the same strides in all processes.
            self._set_tensor(name, adapter_name, tensor.flatten().view(size))
        self._unfilled.discard(adapter_name)
        if values is None:
            self._unfilled.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def copy_adapter(self, source: str, adapter_name: str) -> None:
        """Add an adapter with the values of another: what trains is copied, what is frozen shared."""
        self.r[adapter_name], self.adapter_shapes[adapter_name] = self.r[source], self.adapter_shapes[source]
        for name, tensor in self.adapter_tensors(source).items():
            self._set_tensor(name, adapter_name, tensor.detach().clone() if name in TRAINABLE else tensor)
        self.set_adapter(self.active_adapters)

    def resize_adapter(self, adapter_name: str, r: int, shape: AdapterShape) -> None:
        """Allocate the adapter for another rank; a checkpoint is about to fill it."""
        if self.r[adapter_name] == r:
            return
        self.r[adapter_name], self.adapter_shapes[adapter_name] = r, shape
        held = self.adapter_tensors(adapter_name)
        for name, size in self._expected_shapes(shape).items():
            self._set_tensor(name, adapter_name, unfilled(size, held[name].dtype, held[name].device))
            self.adapter_tensors(adapter_name)[name].requires_grad_(held[name].requires_grad)
        self._unfilled.add(adapter_name)

    def _expected_shapes(self, shape: AdapterShape) -> dict[str, tuple[int, ...]]:
        return shape.tensors(self.out_features, self.in_features, bias=self.has_bias)

    def _set_tensor(self, name: str, adapter_name: str, tensor: Tensor) -> None:
        held = getattr(self, name)
        if isinstance(held, nn.ParameterDict):
            tensor = nn.Parameter(tensor, requires_grad=name in TRAINABLE)
        held[adapter_name] = tensor

    def hold_bases_as_parameters(self) -> None:
        """Turn the large tensors that do not train into parameters, where there are any; codes stay buffers."""
        for name in FROZEN:
            tensors = dict(getattr(self, name).items())
            # ZeRO-3 fails on a parameter without elements.
            if all(tensor.numel() and tensor.is_floating_point() for tensor in tensors.values()):
                frozen = {adapter: nn.Parameter(tensor, requires_grad=False) for adapter, tensor in tensors.items()}
                setattr(self, name, nn.ParameterDict(frozen))

    def adapter_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """Return the adapter's tensors by the names of `TENSOR_NAMES`; a layer without bias lacks one."""
        containers = {name: getattr(self, name) for name in TENSOR_NAMES}
        return {name: held[adapter_name] for name, held in containers.items() if adapter_name in held}

    def free_base_weights(self) -> None:
        """Let go of the dense weight. There is no way back, except from a merge."""
        if not self.base_weights_freed:
            self.base_layer = FreedBase(self._base(), self.in_features, self.out_features, self.base_dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        self._unfilled.discard(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the adapters and the dense layer."""
        if not enabled and self.base_weights_freed:
            raise BaseWeightsFreedError("disable the adapter")
        super().enable_adapters(enabled)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version casts to the base's dtype what trains as well, which would round a float32 core, and moves
        # meta tensors, which cannot be moved. With `low_cpu_mem_usage`, tensors come here as they are in the file.
        device = self._base().weight.device if device is None else device
        for name, tensor in self.adapter_tensors(adapter_name).items():
            dtype = self.adapter_shapes[adapter_name].dtype_of(name, self.base_dtype)
            place = tensor.device if device.type == "meta" or tensor.is_meta else device
            if (tensor.device, tensor.dtype) != (place, dtype):
                self._set_tensor(name, adapter_name, tensor.detach().to(place, dtype))
                self.adapter_tensors(adapter_name)[name].requires_grad_(tensor.requires_grad)

    # -- dense weights: merging and comparing -------------------------------------------------------------

    def get_dense_weight(self, adapter_name: str) -> Tensor:
        """Return the adapter's weight as the base layer stores it: ``(out, in)``, or ``(in, out)`` for a Conv1D."""
        is_quantized = quantization_of(self.get_base_layer()) is not None
        dtype = frozen_dtype(self.adapter_tensors(adapter_name)) if is_quantized else self.base_dtype
        weight = self.get_factors(adapter_name).dense().to(dtype)  # (out, in)
        return weight.mT if self.is_conv1d else weight

    def get_factors(self, adapter_name: str) -> LowRankWeight:
        """Return the adapter's factors, in float32 at least."""
        self.check_filled(adapter_name)
        return weight_of(self.adapter_tensors(adapter_name), self.adapter_shapes[adapter_name])

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the adapter's weight less the dense one, as the base layer stores it."""
        if self.base_weights_freed:
            raise BaseWeightsFreedError("compute the difference to the base weight")
        return self.get_dense_weight(adapter_name) - self._dense_parameters()[0]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a difference of weights says it all: the dense weight is kept, and the bias unchanged."""
        if self.base_weights_freed:
            return False
        _, bias = self._dense_parameters()
        return bias is None or torch.equal(self.jactus_bias[adapter_name], bias)

    def _dense_parameters(self) -> tuple[Tensor, nn.Parameter | None]:
        """Return the dense weight, not quantized, as a plain layer stores it, and bias, whatever is merged."""
        return (self._unmerged or SetAside(self._base())).dense_parameters()

    @property
    def is_conv1d(self) -> bool:
        """Whether the dense layer is transformers' Conv1D, which stores its weight transposed."""
        base = self.get_base_layer()
        return base.is_conv1d if isinstance(base, FreedBase) else is_conv1d(base)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the dense layer; the first replaces its weight, others add their difference.

        Args:
            safe_merge: Raise if the result is not finite, instead of merging it.
            adapter_names: Default: the active ones.

        Raises:
            BaseWeightsFreedError: For several adapters, if the dense weight is gone.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        if self.base_weights_freed:
            if len(names) > 1 or self.merged:
                raise BaseWeightsFreedError("merge several adapters")
            self._merge_freed(names[0], safe_merge=safe_merge)
            return
        with gather_params_ctx(self._base().weight):
            for name in names:
                weight, bias = self._merged_dense(name)
                check_merged(weight, name, safe_merge=safe_merge)
                self._unmerged = self._unmerged or SetAside(self._base())
                self.base_layer = with_parameters(self._base(), weight, bias)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def _merged_dense(self, name: str) -> tuple[Tensor, Tensor | None]:
        base = self._base()
        weight, bias = self.get_dense_weight(name), self.adapter_tensors(name).get("jactus_bias")
        if not self.merged_adapters:
            return weight, bias
        unmerged_weight, dense_bias = self._dense_parameters()
        weight = base.weight + (weight - unmerged_weight).to(base.weight.dtype)
        return weight, None if bias is None or dense_bias is None else base.bias + (bias - dense_bias)

    def _merge_freed(self, name: str, *, safe_merge: bool) -> None:
        weight = self.get_dense_weight(name)
        check_merged(weight, name, safe_merge=safe_merge)
        bias = self.adapter_tensors(name).get("jactus_bias")
        self.base_layer = cast("FreedBase", self.get_base_layer()).filled(weight, bias)
        self._dense_is_merged = True
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the original dense parameters back; the very same objects, so that ties stay ties."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self._base()
        if self._dense_is_merged:
            self.base_layer = FreedBase(base, self.in_features, self.out_features, base.weight.dtype)
            self._dense_is_merged = False
        elif self._unmerged is not None:
            self.base_layer, self._unmerged = self._unmerged.put_back(base), None
        self.merged_adapters.clear()

    # -- running ------------------------------------------------------------------------------------------

    def check_filled(self, adapter_name: str) -> None:
        """Raise `RuntimeError` if an adapter still waits for a checkpoint."""
        tensors = self.adapter_tensors(adapter_name) if adapter_name in self._unfilled else {}
        for name, tensor in tensors.items():
            if not tensor.is_meta and is_unfilled(tensor):
                raise RuntimeError(
                    f"{self.module_name}: `{name}` of adapter {adapter_name!r} was never filled, or holds NaN. The "
                    "checkpoint lacks it or is damaged; save it again, or compress the model again."
                )
        self._unfilled.discard(adapter_name)

    def _low_rank_forward(self, x: Tensor, adapter_name: str) -> Tensor:
        if self._unfilled and adapter_name in self._unfilled and not torch.compiler.is_compiling():
            self.check_filled(adapter_name)
        tensors = self.adapter_tensors(adapter_name)
        bias, down, up = (tensors.get(f"jactus_{name}") for name in ("bias", "adapt_down", "adapt_up"))
        if "jactus_core" not in tensors:
            assert down is not None
            assert up is not None
            shape = self.adapter_shapes[adapter_name]
            return adapted_product(x, frozen_weight_in(tensors, shape), bias, down, up, space=shape.space)
        left, right = bases_in(tensors)
        x_of_weight = self._cast_input_dtype(x, right.coefficients.dtype)
        output = core_product(x_of_weight, tensors["jactus_core"], left, right, bias)
        if down is None or up is None:
            return output
        return output + functional.linear(functional.linear(self._cast_input_dtype(x, down.dtype), down), up)


class Linear(RefusesWeight, JactusLayer):
    """A JACTUS layer in place of an `nn.Linear` or a Conv1D.

    Args:
        base_layer: The layer to replace.
        module_name: Its full name, for error messages.
        adapter_name: Name of the first adapter.
        dtype: Of the layer, once it is dense.
        r: Its rank.
        shape: How the rank is shared out.
        values: Its tensors; ``None`` for an adapter that a checkpoint fills.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        module_name: str,
        adapter_name: str,
        dtype: torch.dtype,
        *,
        r: int,
        shape: AdapterShape,
        values: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__()
        JactusLayer.__init__(self, base_layer, module_name, dtype)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, shape=shape, values=values)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)`` with the active adapters."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base_forward(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.r]
        if self.merged or not active:
            return self._base_forward(x, *args, **kwargs)
        if len(active) == 1:
            return self._low_rank_forward(x, active[0]).to(output_dtype(x))
        # PEFT's meaning of several active adapters: their differences to the base add up.
        base = self._base_forward(x, *args, **kwargs)
        output = base
        for name in active:
            output = output + (self._low_rank_forward(x, name) - base)
        return output.to(base.dtype)

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.base_layer(x, *args, **kwargs)
        return output

    def __repr__(self) -> str:
        return "jactus." + super().__repr__()
