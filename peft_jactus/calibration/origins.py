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
    from collections.abc import Callable, Mapping, Sequence

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
_TRANSPOSITIONS = {torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes}
_PERMUTATIONS = {torch.permute, Tensor.permute}


class Origin(NamedTuple):
    """What a tensor was computed from.

    Attributes:
        positions: Names of the inputs whose positions it has. Empty if it has those of none, as learned queries do.
        read: Names of all inputs that it depends on, masks too.
        transposed: Whether its positions come before its rows, as models have them that run along the sequence.
        parts: Of positions that were concatenated, how many are of which origin.
    """

    positions: frozenset[str]
    read: frozenset[str]
    transposed: bool = False
    parts: tuple[tuple[int, Origin], ...] = ()


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
        tensors = list(tensors_in(args, kwargs))
        seen = [(tensor, origin) for tensor in tensors if (origin := self.of(tensor)) is not None]
        read = frozenset[str]().union(*(origin.read for _, origin in seen))
        having = [(tensor, origin) for tensor, origin in seen if origin.positions]
        if args and isinstance(args[0], (list, tuple)) and not _joins_features(func, args, kwargs, result):
            together = frozenset[str]().union(*(origin.positions for _, origin in having))
            parts = _parts(func, args, kwargs, [self.of(tensor) for tensor in tensors])
            return Origin(together, read, any(origin.transposed for _, origin in having), parts)
        if func in _PRODUCTS and tensors[0].dim() > 2 and not isinstance(tensors[0], nn.Parameter):
            first = self.of(tensors[0])
            return None if first is None else first._replace(read=read)
        if func is Tensor.__getitem__ and _chooses_by_mask(args[1]):
            whole = self.of(args[0])
            return None if whole is None else Origin(whole.positions, read, whole.transposed)
        if not having:
            return Origin(frozenset(), read) if len(seen) == len(tensors) else None
        # What is broadcast to the positions of another one does not have them.
        fitting = [entry for entry in having if entry[0].shape[:2] == result.shape[:2]]
        tensor, origin = (fitting or having)[0]
        if _is_one_of_each_row(tensor, result):
            return Origin(frozenset(), read)
        if func is Tensor.__getitem__ and tensor is args[0]:
            origin = _part_at(args[1], tensor, origin)
        return origin._replace(read=read, transposed=origin.transposed != _swaps_rows(func, args, kwargs))


def _is_one_of_each_row(tensor: Tensor, result: Tensor) -> bool:
    """Whether the positions are gone, as in the mean over them, or in the first one."""
    return tensor.dim() == 3 and result.dim() == 2 and len(result) == len(tensor) and result.numel() < tensor.numel()


def _parts(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], origins: Sequence[Origin | None]
) -> tuple[tuple[int, Origin], ...]:
    """Return which positions of ``(rows, positions, dim)`` come from where, if they are concatenated here."""
    if func not in _CONCATENATIONS or kwargs.get("dim", args[1] if len(args) > 1 else 0) not in (1, -2):
        return ()
    if any(tensor.dim() != 3 for tensor in args[0]):
        return ()
    lengths = [tensor.shape[1] for tensor in args[0]]
    return tuple((length, origin or CONSTANT) for length, origin in zip(lengths, origins, strict=False))


def _chooses_by_mask(index: Any) -> bool:
    return any(tensor.dtype == torch.bool for tensor in tensors_in([index], None))


def _part_at(index: Any, tensor: Tensor, origin: Origin) -> Origin:
    """Return the origin of ``tensor[index]``: that of a part, if this takes just one out of several."""
    if not isinstance(index, tuple) or len(index) < 2 or index[0] != slice(None) or not isinstance(index[1], slice):
        return origin
    if tensor.dim() != 3 or sum(length for length, _ in origin.parts) != tensor.shape[1]:
        return origin
    start, stop, _ = index[1].indices(tensor.shape[1])
    for length, part in origin.parts:
        if (start, stop) == (0, length):
            return part
        start, stop = start - length, stop - length
    return origin


def _swaps_rows(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether this exchanges the first two dimensions."""
    dims = [value for value in (*args[1:], *kwargs.values()) if not isinstance(value, Tensor)]
    if dims and isinstance(dims[0], (list, tuple)):
        dims = list(dims[0])
    if func in _TRANSPOSITIONS:
        num_dims = args[0].dim() if args else 0
        return {dim % num_dims for dim in dims} == {0, 1} if num_dims else False
    return func in _PERMUTATIONS and list(dims[:2]) == [1, 0]


def _joins_features(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> bool:
    """Whether this concatenates the vectors at each position, whose number stays."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return func in _CONCATENATIONS and result.dim() > 2 and dim in (-1, result.dim() - 1)
