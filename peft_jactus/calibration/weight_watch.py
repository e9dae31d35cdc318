"""Finds weights that a model uses without calling their layer: factors would not be seen there.

Fused kernels do so (Mamba), attention that multiplies with a projection's weight itself, layers whose weight is
normalised or clipped in place at each call.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from torch.overrides import TorchFunctionMode

from peft_jactus._placeholders import reads_numbers, tensors_in
from peft_jactus.tuner.layer import JactusLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers.pytorch_utils import Conv1D


class WeightWatch(TorchFunctionMode):
    """While it is active, notes which of the layers' weights are read or changed outside of their layer's forward.

    Weights that are somebody else's, too (embeddings that are tied to an output layer), and those that accelerate has
    offloaded are not looked at.

    Args:
        model: That has the layers.
        layers: By name, with a ``weight``.

    Attributes:
        uses: By name of the layer, the first such use.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        weights = {name: _weight_of(layer) for name, layer in layers.items()}
        self._weights = {
            name: weight for name, weight in weights.items() if not weight.is_meta and owners[id(weight)] == 1
        }
        self._layers = {name: layers[name] for name in self._weights}
        self._names: dict[int, list[str]] = {}
        for name, weight in self._weights.items():
            self._names.setdefault(id(weight), []).append(name)
        self._versions = {name: _version(weight) for name, weight in self._weights.items()}
        self._running: Counter[str] = Counter()
        self.uses: dict[str, str] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Know which layers are running."""
        with contextlib.ExitStack() as handles:
            for name, layer in self._layers.items():
                enter = layer.register_forward_pre_hook(functools.partial(self._enter, name))
                leave = layer.register_forward_hook(functools.partial(self._leave, name), always_call=True)
                handles.callback(enter.remove)
                handles.callback(leave.remove)
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note a use, and let it happen."""
        del types
        if reads_numbers(func, args):
            for tensor in tensors_in(args, kwargs):
                for name in self._names.get(id(tensor), ()):
                    if not self._running[name]:
                        self.uses.setdefault(name, f"reads it (`{_name_of(func)}`)")
        return func(*args, **(kwargs or {}))

    def find_changes(self) -> None:
        """Add to `uses` the weights that are not what they were at the start."""
        for name, layer in self._layers.items():
            weight = _weight_of(layer)
            if weight is not self._weights[name]:
                self.uses[name] = "puts another tensor in its place"
            elif _version(weight) != self._versions[name]:
                self.uses[name] = "changes it in place"

    def _enter(self, name: str, *_args: Any) -> None:
        self._running[name] += 1

    def _leave(self, name: str, *_args: Any) -> None:
        self._running[name] -= 1


def _weight_of(layer: nn.Module) -> Tensor:
    base = layer.get_base_layer() if isinstance(layer, JactusLayer) else layer
    return cast("nn.Linear | Conv1D", base).weight


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", str(function))
    return str(getattr(getattr(function, "__self__", None), "__name__", name)) if name.startswith("__") else name
