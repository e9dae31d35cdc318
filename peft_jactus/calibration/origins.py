"""Which inputs of a batch the positions of a tensor come from, whatever a model does with them in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from peft_jactus._placeholders import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

# The rows of the product are those of the first factor: attention has the positions of its queries.
_PRODUCTS = {
    torch.matmul,
    torch.bmm,
    Tensor.matmul,
    Tensor.bmm,
    Tensor.__matmul__,
    functional.scaled_dot_product_attention,
    functional.multi_head_attention_forward,
}
_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}


class Origin(NamedTuple):
    """What a tensor was computed from.

    Attributes:
        positions: Names of the inputs whose positions it has. Empty if it has those of none, as learned queries do.
        read: Names of all inputs that it depends on, masks too.
    """

    positions: frozenset[str]
    read: frozenset[str]


CONSTANT = Origin(frozenset(), frozenset())


class OriginWatch(TorchFunctionMode):
    """While it is active, follows inputs through all that torch does with them.

    A result has the positions of the first tensor that goes into it and has any, so a sum with what another input
    attends to keeps its own. Concatenated tensors have the positions of all of them.

    Args:
        model: Its parameters and buffers depend on no input.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._origins: Any = WeakTensorKeyDictionary()
        for buffer in model.buffers():
            self._origins[buffer] = CONSTANT

    def mark(self, tensor: Tensor, origin: Origin) -> None:
        """Say where a tensor comes from."""
        self._origins[tensor] = origin

    def of(self, tensor: Tensor) -> Origin | None:
        """Return where a tensor comes from; None if nobody saw that."""
        found: Origin | None = self._origins.get(tensor)
        return CONSTANT if found is None and isinstance(tensor, nn.Parameter) else found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and note where its results come from."""
        del types
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        results = list(tensors_in([args[0] if func is Tensor.__setitem__ else output], None))
        if results:
            origin = self._of_result(func, args, kwargs, results[0])
            if origin is not None:
                for result in results:
                    self._origins[result] = origin
        return output

    def _of_result(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
    ) -> Origin | None:
        tensors = list(_tensors_at_any_depth((*args, *kwargs.values())))
        seen = [(tensor, origin) for tensor in tensors if (origin := self.of(tensor)) is not None]
        read = frozenset[str]().union(*(origin.read for _, origin in seen))
        having = [(tensor, origin.positions) for tensor, origin in seen if origin.positions]
        if args and isinstance(args[0], (list, tuple)) and not _joins_features(func, args, kwargs, result):
            return Origin(frozenset[str]().union(*(positions for _, positions in having)), read)
        if func in _PRODUCTS and tensors[0].dim() > 2 and not isinstance(tensors[0], nn.Parameter):
            first = self.of(tensors[0])
            return None if first is None else Origin(first.positions, read)
        if not having:
            return Origin(frozenset(), read) if len(seen) == len(tensors) else None
        # What is broadcast to the positions of another one does not have them.
        fitting = [positions for tensor, positions in having if tensor.shape[:2] == result.shape[:2]]
        return Origin(fitting[0] if fitting else having[0][1], read)


def _joins_features(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> bool:
    """Whether this concatenates the vectors at each position, whose number stays."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return func in _CONCATENATIONS and result.dim() > 2 and dim in (-1, result.dim() - 1)


def _tensors_at_any_depth(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_at_any_depth(value)
