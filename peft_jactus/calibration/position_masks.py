"""Which positions of a tensor are real: padding never counts."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_jactus.calibration.batches import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from peft_jactus.calibration.batches import Batch

logger = logging.getLogger(__name__)


# Have positions of text, or none.
_NO_FEATURES = {"inputs_embeds", "decoder_inputs_embeds", "attention_mask", "labels"}
# Of a part with inputs of its own, as the vision tower of CLIP or of LLaVA (`model.vision_tower`).
_MAX_TOWER_DEPTH = 4


class PositionMasks:
    """Finds the mask that says which positions of a tensor are real, for the running batch.

    A mask belongs to what it was handed to. A tower that is called with features of the batch (pixels, audio) and
    without the mask has positions of its own, even where there happen to be as many.

    Args:
        model: That runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._encoder = _encoder_of(model)
        self._feature_shapes: set[torch.Size] = set()
        self._unmasked_towers: set[str] = set()
        self._encoder_output: Tensor | None = None
        self._encoder_mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._warned = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Watch for the encoder's output, which the decoder's cross-attention reads, and for towers without a mask."""
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_encoder_output", None)
            if self._encoder is not None:
                stack.callback(self._encoder.register_forward_hook(self._on_encoder).remove)
            for name, module in self._model.named_modules():
                if name and name.count(".") < _MAX_TOWER_DEPTH and any(True for _ in module.children()):
                    hook = functools.partial(self._on_tower, f"{name}.")
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _on_tower(self, prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        if self._encoder_mask is None or not self._feature_shapes:
            return
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        has_features = any(tensor.is_floating_point() and tensor.shape in self._feature_shapes for tensor in tensors)
        if has_features and not any(tensor is self._encoder_mask for tensor in tensors):
            self._unmasked_towers.add(prefix)

    def _on_encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        states = output if isinstance(output, Tensor) else output[0]
        # That of a detector is a list of feature maps, which have no mask.
        self._encoder_output = states if isinstance(states, Tensor) else None

    def start(self, batch: Batch) -> None:
        """Take the masks of the next batch."""
        self._encoder_output = None
        self._unmasked_towers.clear()
        self._feature_shapes = {
            value.shape
            for name, value in batch.items()
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2 and name not in _NO_FEATURES
        }
        self._encoder_mask = _two_dimensional(batch.get("attention_mask"))
        self._decoder_mask = self._encoder_mask
        if self._encoder is not None:
            self._decoder_mask = _decoder_mask(batch)

    def _is_encoder_output(self, tensor: Tensor) -> bool:
        # By address: reentrant checkpointing hands on detached tensors.
        output = self._encoder_output
        return output is not None and tensor.data_ptr() == output.data_ptr() and tensor.shape == output.shape

    def find(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a boolean mask over the positions of ``tensor`` ``(..., dim)``, or None if all count."""
        if name.startswith(tuple(self._unmasked_towers)):
            return None
        in_decoder = "decoder" in name.split(".") and not self._is_encoder_output(tensor)
        mask = self._decoder_mask if in_decoder else self._encoder_mask
        if mask is None or tensor.dim() < 2:
            return None
        if tensor.shape[:-1] == mask.shape or (tensor.dim() == 2 and tensor.shape[0] == mask.numel()):
            return mask.bool()
        if tensor.dim() > 2 and not self._warned and not bool(mask.bool().all()):
            self._warned = True
            logger.warning(
                "%s: its input of shape %s does not fit the attention mask of shape %s; its padding is counted.",
                name,
                tuple(tensor.shape),
                tuple(mask.shape),
            )
        return None


def _decoder_mask(batch: Batch) -> Tensor | None:
    """Return what says which of the decoder's positions are real."""
    mask, labels = (_two_dimensional(batch.get(name)) for name in ("decoder_attention_mask", "labels"))
    if mask is not None:
        return mask
    if labels is not None:  # the decoder reads them, shifted by one
        return labels != IGNORED_LABEL
    # Without targets, as BART classifies, it reads the encoder's inputs, shifted by one.
    return None if "decoder_input_ids" in batch else _two_dimensional(batch.get("attention_mask"))


def _two_dimensional(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the encoder of an encoder-decoder model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()  # type: ignore[operator]  # transformers models have it
    return encoder if isinstance(encoder, nn.Module) else None
