"""Which positions of a tensor are real: padding never counts."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_jactus._placeholders import tensors_in
from peft_jactus.calibration.batches import IGNORED_LABEL
from peft_jactus.calibration.origins import Origin, OriginWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from peft_jactus.calibration.batches import Batch

logger = logging.getLogger(__name__)

_TEXT = ("input_ids", "inputs_embeds")
_MASK = "attention_mask"
_PADDING_MASK = "padding_mask"  # of sound, beside text or not
# Masks of an input that is not text, besides those whose name ends as the text's.
_OTHER_MASKS = ("pixel_mask", "input_features_mask", "input_values_mask")
_DOES_NOT_FIT = "%s: its input of shape %s does not fit the attention mask of shape %s; its padding is counted."
_MAY_FIT = (
    "%s: its input of shape %s may or may not have the positions of the attention mask of shape %s; all are counted."
)


class _Mask(NamedTuple):
    """Which positions are real, ``(rows, positions)`` or ``(..., height, width)``, and its name in the batch."""

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
    the text, even where there happen to be as many. A model that shortens its input (as convolutions over sound do,
    and patches of pixels) shortens the mask, too, and hands it on: that one belongs to what has its length.

    Args:
        model: That runs.
        always_follow: Follow batches without padding, too, for `has_positions_first`.
    """

    def __init__(self, model: nn.Module, *, always_follow: bool = False) -> None:
        self._model = model
        self._always_follow = always_follow
        self._watch: OriginWatch | None = None  # none for a batch that is not followed
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
        self._masks = {}
        for prefix, group in _groups_of(batch):
            for name, mask in _masks_of(group).items():
                self._masks[prefix + name] = None if mask is None else mask._replace(name=prefix + mask.name)
        if not self._always_follow and not any(mask is not None for mask in self._masks.values()):
            yield batch
            return
        batch = _without_aliases(batch)
        self._watch = OriginWatch(self._model)
        for prefix, group in _groups_of(batch):
            for name, value in group.items():
                source = prefix + name
                origin = Origin(frozenset({source} & self._masks.keys()), frozenset({source}))
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
        return functools.partial(self._resolve, tuple(tensor.shape), self._origin_of(name, tensor))

    def has_positions_first(self, name: str, tensor: Tensor) -> bool:
        """Whether layer ``name`` reads ``(positions, rows, dim)``, as far as that is known, not ``(rows, ...)``."""
        origin = self._origin_of(name, tensor)
        return origin is not None and origin.transposed

    def _origin_of(self, name: str, tensor: Tensor) -> Origin | None:
        if self._watch is None:
            return None
        origin = self._watch.of(tensor)
        noted = self._noted.get(name, set())
        if origin is None and len(noted) == 1:
            (origin,) = noted
        return origin

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
            origin = self._watch.of(tensor)
            fits = tuple(tensor.shape) in shapes or (tensor.dim() in (2, 3) and id(tensor) in named)
            if fits and not tensor.is_floating_point() and origin is not None and not origin.positions:
                self._note_mask(tensor.detach(), origin.read)

    def _note_mask(self, tensor: Tensor, read: frozenset[str]) -> None:
        """Note a mask ``(rows, positions)`` or ``(rows, height, width)`` that the model made, if it is one."""
        made = tensor.flatten(1)
        known = self._handed_on.setdefault(tuple(made.shape), [])
        if any(read == other for other, _ in known) or not bool(((made == 0) | (made == 1)).all()):
            return
        made = made.bool()
        sources = [mask.real for mask in self._distinct(self._masks) if mask.name in read]
        known.append((read, ~made if any(_is_opposite(made, real) for real in sources) else made))

    def _resolve(self, shape: tuple[int, ...], origin: Origin | None, readers: Iterable[str]) -> Tensor | None:
        others = self._distinct(self._masks.keys() if origin is None else origin.read)
        own = others if origin is None else self._distinct(origin.positions)
        if origin is None and (len(own) > 1 or None in self._masks.values()):
            own = []
        transposed = origin is not None and origin.transposed
        for mask in own:
            handed_on = [made for read, made in self._handed_on.get(shape[:-1], ()) if mask.name in read]
            turned = [mask.real.mT, mask.real] if transposed else [mask.real, mask.real.mT]
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


def _groups_of(value: Any, prefix: str = "") -> Iterator[tuple[str, Batch]]:
    """Yield a batch and the mappings inside it, each with what is put before its names; outer ones come first."""
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        yield prefix, value
    inside = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for name, each in inside:
        yield from _groups_of(each, f"{prefix}{name}.")


def _masks_of(batch: Batch) -> dict[str, _Mask | None]:
    """Return the mask of each input that has positions; None if all of them are real.

    The attention mask is that of the text. Other numbers of a batch with text, as pixels, have none, or one that is
    named after them (``visual_attention_mask``, ``pixel_mask``). In a batch without text, it belongs to what there is,
    as sound.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    text = next((tensors[name] for name in _TEXT if name in tensors), None)
    others = [name for name in tensors if _MASK in name and name not in (_MASK, f"decoder_{_MASK}")]
    others += [name for name in _OTHER_MASKS if name in tensors]
    others.sort(key=len, reverse=True)
    masks: dict[str, _Mask | None] = {}
    for name, value in batch.items():
        if any(True for _ in _groups_of(value)):
            continue
        sample = next(tensors_in([value], None), None)
        is_mask = name.endswith("mask") or name in others
        if sample is None or sample.dim() < 2 or is_mask or sample.dtype == torch.bool:
            continue
        of_text = name in _TEXT or (text is not None and _goes_with(sample, text))
        named = next((other for other in others if f"_{_owner_of(other)}_" in f"_{name}_"), None)
        if name == "labels" or name.startswith("decoder_"):
            masks[name] = _decoder_mask(tensors)
        elif named is not None:
            masks[name] = _mask(named, tensors[named])
        elif of_text or (text is None and _MASK in tensors):
            masks[name] = _mask(_MASK, tensors.get(_MASK), text)
        elif text is None or sample.is_floating_point():
            masks[name] = _mask(_PADDING_MASK, tensors.get(_PADDING_MASK))
    return masks


def _owner_of(mask: str) -> str:
    """Return what is in the name of the inputs of a mask: ``pixel_mask``, ``chosen_attention_mask`` or the reverse."""
    return mask.removeprefix(f"{_MASK}_").removesuffix("_mask").removesuffix("_attention")


def _goes_with(numbers: Tensor, text: Tensor) -> bool:
    """Whether these are ids of the text's positions, as those of token types are."""
    return not numbers.is_floating_point() and numbers.shape[:2] == text.shape[:2]


def _mask(name: str, mask: Tensor | None, text: Tensor | None = None) -> _Mask | None:
    """Return a mask, or None if all positions are real."""
    if mask is None:
        return None
    if text is not None and mask.dim() > 2 and mask.shape == text.shape:  # several choices for each example
        mask = mask.flatten(0, -2)
    return _Mask(name, mask.bool()) if mask.dim() > 1 and not bool(mask.bool().all()) else None


def _decoder_mask(tensors: Mapping[str, Tensor]) -> _Mask | None:
    """Return what says which of the decoder's own inputs are real; without a mask, those with a label are."""
    name, labels = f"decoder_{_MASK}", tensors.get("labels")
    if name in tensors or labels is None or labels.is_floating_point():
        return _mask(name, tensors.get(name))
    return _mask("labels", labels != IGNORED_LABEL)  # which it reads, shifted by one


def _is_opposite(made: Tensor, real: Tensor) -> bool:
    """Whether a mask that was made of ``real``, maybe a shorter or a longer one, is true for padding."""
    if real.dim() > 2 or len(made) != len(real):
        return False
    real = real.to(made.device)  # a model may be spread over devices
    expected = [functional.interpolate(real[None].float(), size=made.shape[1:])[0].bool()]
    if made.shape[1] > real.shape[1]:  # as attention in windows pads it
        expected.append(functional.pad(real, (0, made.shape[1] - real.shape[1])))
    shares = [float((made == each).double().mean()) for each in expected]
    return max(shares, key=lambda share: abs(share - 0.5)) < 0.5


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
