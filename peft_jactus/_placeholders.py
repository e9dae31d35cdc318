"""What a model gets that reads the weight of a layer which has none, and what counts as reading it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# What tells of a tensor without reading or changing its numbers. Models ask for them: T5 for the dtype of `wo.weight`.
_METADATA = {
    "device",
    "dim",
    "dtype",
    "element_size",
    "get_device",
    "grad",
    "grad_fn",
    "is_complex",
    "is_contiguous",
    "is_cpu",
    "is_cuda",
    "is_floating_point",
    "is_leaf",
    "is_meta",
    "is_mps",
    "is_quantized",
    "is_sparse",
    "is_xla",
    "is_xpu",
    "itemsize",
    "layout",
    "name",
    "nbytes",
    "ndim",
    "numel",
    "requires_grad",
    "shape",
    "size",
    "stride",
    "type",
    "_version",
    "__hash__",
}


# What tools do to a buffer that they move or save.
_MOVES = {"clone", "contiguous", "cpu", "cuda", "data_ptr", "detach", "to", "untyped_storage"}


def reads_numbers(function: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a call that torch reports (``__torch_function__``) reads or changes numbers of its tensors."""
    name = getattr(function, "__name__", "")
    if name == "__get__":  # of a property: `tensor.dtype`
        name = getattr(getattr(function, "__self__", None), "__name__", "")
    return name not in _METADATA or (name == "type" and len(args) > 1)


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of a call, and in lists or mappings among them, at any depth."""
    for arg in (*args, *(kwargs or {}).values()):
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors_in(arg, None)
        elif isinstance(arg, Mapping):
            yield from tensors_in((), arg)


class WeightPlaceholder(Tensor):
    """Has the dtype, device and shape of a weight, and no numbers: reading or changing them raises `RuntimeError`."""

    _complaint: str
    _is_hf_initialized: bool
    _buffer: Tensor | None

    @classmethod
    def of(cls, held: Tensor, shape: Sequence[int], complaint: str, *, buffer: bool = False) -> WeightPlaceholder:
        """Return one.

        Args:
            held: Has the dtype and device.
            shape: That it shows; it takes no memory.
            complaint: Whose weight it is, why it can't be used, and what to do, in full sentences.
            buffer: Whether ``held`` is a buffer that a checkpoint has: tools may move and copy it.
        """
        placeholder = held.detach().new_empty(1).expand(*shape).as_subclass(cls)
        placeholder._complaint = complaint
        placeholder._buffer = held if buffer else None
        placeholder._is_hf_initialized = True  # transformers then leaves it alone when it fills what a file lacks
        return placeholder

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let through what reads no number."""
        if reads_numbers(func, args):
            mine = next(tensor for tensor in tensors_in(args, kwargs) if isinstance(tensor, cls))
            if mine._buffer is None or func.__name__ not in _MOVES or mine is not args[0]:
                raise RuntimeError(mine._complaint)
            return func(mine._buffer, *args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch has no annotation

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as torch's, unannotated
        """Show the shape."""
        del tensor_contents  # torch's argument
        return f"{type(self).__name__}({tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


class RefusesWeight(nn.Module):
    """A layer that computes without a ``weight`` of its own: one that is put in place would not be used."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, but no ``weight``; assigning an `nn.Parameter` also comes here."""
        if name == "weight":
            self._refuse_weight()
        super().register_parameter(name, param)

    if TYPE_CHECKING:

        def _refuse_weight(self) -> NoReturn:
            """Raise `RuntimeError`, which names the layer."""
