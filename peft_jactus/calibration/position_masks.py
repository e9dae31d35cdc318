"""Which positions of a tensor are real: padding never counts."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_jactus._placeholders import tensors_in
from peft_jactus.calibration.batches import IGNORED_LABEL
from peft_jactus.calibration.origins import Origin, OriginWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from peft_jactus.calibration.batches import Batch

logger = logging.getLogger(__name__)

_TEXT = ("input_ids", "inputs_embeds")
_MASK = "attention_mask"
_DOES_NOT_FIT = "%s: its input of shape %s does not fit the attention mask of shape %s; its padding is counted."
_MAY_FIT = (
    "%s: its input of shape %s may or may not have the positions of the attention mask of shape %s; all are counted."
)


class _Mask(NamedTuple):
    """Which positions are real, ``(rows, positions)``, and the name in the batch that says so."""

    name: str
    real: Tensor


class _Unknown(NamedTuple):
    """Why the padding in a layer's input is counted."""

    misfit: bool
    shape: tuple[int, ...]
    mask_shape: tuple[int, ...]


class PositionMasks:
    """Finds the mask that says which positions of a tensor are real, for the running batch.

    A mask belongs to the inputs that it came with, and to what has their positions. Positions of pixels are none of
    the text, even where there happen to be as many. A model that shortens its input (as convolutions over sound do)
    shortens the mask, too, and hands it on: that one belongs to what has its length.

    Args:
        model: That runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._watch: OriginWatch | None = None  # none for a batch without padding
        self._masks: dict[str, _Mask | None] = {}  # of each input that has positions
        self._handed_on: dict[tuple[int, ...], list[tuple[frozenset[str], Tensor]]] = {}
        self._noted: dict[str, set[Origin | None]] = {}
        self._unknown: dict[str, _Unknown] = {}
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Watch for masks that the model makes from the batch's."""
        with contextlib.ExitStack() as stack:
            for module in self._model.modules():
                if any(True for _ in module.children()):
                    stack.callback(module.register_forward_pre_hook(self._on_call, with_kwargs=True).remove)
            yield

    @contextlib.contextmanager
    def reading(self, batch: Batch) -> Iterator[Batch]:
        """Follow a batch through the forward pass. Gives it as the model shall get it: no tensor has two names."""
        self.forget()
        self._masks = _masks_of(batch)
        if not any(mask is not None for mask in self._masks.values()):
            yield batch
            return
        batch = _without_aliases(batch)
        self._watch = OriginWatch(self._model)
        for name, value in batch.items():
            origin = Origin(frozenset({name} & self._masks.keys()), frozenset({name}))
            for tensor in tensors_in([value], None):
                self._watch.mark(tensor, origin)
        with self._watch:
            yield batch

    def note(self, name: str, tensor: Tensor) -> None:
        """Note what layer ``name`` reads, for a second forward pass, which begins with tensors that nobody knows."""
        if self._watch is not None:
            self._noted.setdefault(name, set()).add(self._watch.of(tensor))

    def find(self, name: str, tensor: Tensor) -> Callable[[Iterable[str]], Tensor | None]:
        """Return what finds the boolean mask over the positions of ``tensor`` ``(..., dim)``, or None if all count.

        To be called with the layers that read it once the forward pass is over: only then all masks are known that the
        model made.
        """
        if self._watch is None or tensor.dim() < 2:
            return lambda _: None
        origin = self._watch.of(tensor)
        noted = self._noted.get(name, set())
        if origin is None and len(noted) == 1:
            (origin,) = noted
        return functools.partial(self._resolve, tuple(tensor.shape), origin)

    def forget(self) -> None:
        """Let go of the batch."""
        self._watch = None
        for held in (self._masks, self._handed_on, self._noted, self._unknown):
            held.clear()

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        if self._watch is None:
            return
        tensors = list(tensors_in(args, kwargs))
        shapes = {tuple(tensor.shape[:2]) for tensor in tensors if tensor.dim() > 2 and tensor.is_floating_point()}
        named = {id(value) for name, value in kwargs.items() if name.endswith("mask")}
        for tensor in tensors:
            shape, origin = tuple(tensor.shape), self._watch.of(tensor)
            if (
                len(shape) != 2
                or not (shape in shapes or id(tensor) in named)
                or origin is None
                or origin.positions
                or tensor.is_floating_point()
            ):
                continue
            known = self._handed_on.setdefault(shape, [])
            if all(origin.read != read for read, _ in known) and bool(((tensor == 0) | (tensor == 1)).all()):
                known.append((origin.read, tensor.detach().bool()))

    def _resolve(self, shape: tuple[int, ...], origin: Origin | None, readers: Iterable[str]) -> Tensor | None:
        others = self._distinct(self._masks.keys() if origin is None else origin.read)
        own = others if origin is None else self._distinct(origin.positions)
        if origin is None and (len(own) > 1 or None in self._masks.values()):
            own = []
        transposed = origin is not None and origin.transposed
        for mask in own:
            handed_on = [made for read, made in self._handed_on.get(shape[:-1], ()) if mask.name in read]
            turned = [mask.real.T, mask.real] if transposed else [mask.real, mask.real.T]
            fitting = next((each for each in [*turned, *handed_on] if _fits(shape, each)), None)
            if fitting is not None:
                return fitting
        own_masks = [mask.real for mask in own]
        unsure = [mask.real for mask in others if _fits(shape, mask.real)]
        misfits = own_masks if _may_have_padding(shape, own_masks, origin) else unsure
        if misfits:
            self._unknown.update(dict.fromkeys(readers, _Unknown(bool(own), shape, tuple(misfits[0].shape))))
        return None

    def _distinct(self, sources: Iterable[str]) -> list[_Mask]:
        """Return the masks of inputs, each once."""
        masks = [self._masks.get(source) for source in sources]
        return list({mask.name: mask for mask in masks if mask is not None}.values())

    def warn(self) -> None:
        """Name the layers whose padding was counted in this batch; each once."""
        new = {name: why for name, why in self._unknown.items() if name not in self._warned}
        self._warned.update(new)
        for why in dict.fromkeys(new.values()):
            names = ", ".join(name for name, other in new.items() if other == why)
            text = _DOES_NOT_FIT if why.misfit else _MAY_FIT
            logger.warning(text, names, why.shape, why.mask_shape)


def _masks_of(batch: Batch) -> dict[str, _Mask | None]:
    """Return the mask of each input that has positions; None if all of them are real.

    The attention mask is that of the text. Other numbers of a batch with text, as pixels, have none, or one that is
    named after them (``visual_attention_mask``). In a batch without text, it belongs to what there is, as sound.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    text = next((tensors[name] for name in _TEXT if name in tensors), None)
    others = [name for name in tensors if name.endswith(f"_{_MASK}") and name != f"decoder_{_MASK}"]
    masks: dict[str, _Mask | None] = {}
    for name, value in batch.items():
        sample = next(tensors_in([value], None), None)
        if sample is None or sample.dim() < 2 or name.endswith("mask") or sample.dtype == torch.bool:
            continue
        named = next((other for other in others if other.removesuffix(f"_{_MASK}") in name), None)
        if name == "labels" or name.startswith("decoder_"):
            masks[name] = _decoder_mask(tensors)
        elif named is not None:
            masks[name] = _mask(named, tensors[named])
        elif name in _TEXT or text is None or _goes_with(sample, text):
            masks[name] = _mask(_MASK, tensors.get(_MASK), text)
        elif sample.is_floating_point():
            masks[name] = None
    return masks


def _goes_with(numbers: Tensor, text: Tensor) -> bool:
    """Whether these are ids of the text's positions, as those of token types are."""
    return not numbers.is_floating_point() and numbers.shape[:2] == text.shape[:2]


def _mask(name: str, mask: Tensor | None, text: Tensor | None = None) -> _Mask | None:
    """Return a mask, or None if all positions are real."""
    if mask is None:
        return None
    if text is not None and mask.dim() > 2 and mask.shape == text.shape:  # several choices for each example
        mask = mask.flatten(0, -2)
    return _Mask(name, mask.bool()) if mask.dim() == 2 and not bool(mask.bool().all()) else None


def _decoder_mask(tensors: Mapping[str, Tensor]) -> _Mask | None:
    """Return what says which of the decoder's own inputs are real; without a mask, those with a label are."""
    name, labels = f"decoder_{_MASK}", tensors.get("labels")
    if name in tensors or labels is None or labels.is_floating_point():
        return _mask(name, tensors.get(name))
    return _mask("labels", labels != IGNORED_LABEL)  # which it reads, shifted by one


def _fits(shape: tuple[int, ...], mask: Tensor) -> bool:
    return shape[:-1] == mask.shape or (len(shape) == 2 and shape[0] == mask.numel())


def _may_have_padding(shape: tuple[int, ...], masks: list[Tensor], origin: Origin | None) -> bool:
    """Whether vectors that fit none of these masks, which are theirs, may be padding."""
    if not masks:
        return False
    if len(shape) == 2:  # chosen from all positions: the real ones, those with labels, or what an expert gets
        of_labels = origin is not None and "labels" in origin.read - origin.positions
        return not of_labels and shape[0] not in {len(masks[0]), int(masks[0].sum())}
    return shape[0] != len(masks[0]) or math.prod(shape[1:-1]) > 1  # one of each row is none


def _without_aliases(batch: Batch) -> Batch:
    """Return the batch with a view in place of each tensor that has come under another name."""
    seen: set[int] = set()
    found: dict[str, Any] = {}
    for name, value in batch.items():
        found[name] = value.view_as(value) if isinstance(value, Tensor) and id(value) in seen else value
        seen.add(id(value))
    return found
