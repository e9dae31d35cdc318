"""Which positions of a tensor are real: padding never counts."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_jactus.calibration.batches import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft_jactus.calibration.batches import Batch

logger = logging.getLogger(__name__)


class PositionMasks:
    """Finds the mask that says which positions of a tensor are real, for the running batch."""

    def __init__(self, encoder: nn.Module | None) -> None:
        self._encoder = encoder
        self._encoder_output: Tensor | None = None
        self._encoder_mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._warned = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Watch for the encoder's output, which the decoder's cross-attention reads."""
        if self._encoder is None:
            yield
            return
        handle = self._encoder.register_forward_hook(self._on_encoder)
        try:
            yield
        finally:
            handle.remove()
            self._encoder_output = None

    def _on_encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        self._encoder_output = output[0]

    def start(self, batch: Batch) -> None:
        """Take the masks of the next batch."""
        self._encoder_output = None
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


def encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the encoder of an encoder-decoder model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()  # type: ignore[operator]  # transformers models have it
    return encoder if isinstance(encoder, nn.Module) else None
