"""The loss of a batch as a sum, whatever mean the model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_jactus.calibration.batches import IGNORED_LABEL, check_is_batch

if TYPE_CHECKING:
    from peft_jactus.calibration.batches import Batch, LossFn


class SummedLoss:
    """The loss of a batch, summed over its examples (over its labelled tokens, for labels that are sequences)."""

    def __init__(self, loss_fn: LossFn | None, reduction: Literal["mean", "sum"]) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"`loss_reduction` must be 'mean' or 'sum'; got {reduction!r}.")
        self._loss_fn = loss_fn
        self._reduction = reduction

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the summed loss, a scalar; raise `ValueError` if the model or ``loss_fn`` gives none."""
        if self._loss_fn is None:
            if isinstance(model, PreTrainedModel):  # other models may take what they like
                check_is_batch(batch)
            loss = _loss_of(model(**batch))
        else:
            loss = self._loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            source = "The model's output has no loss" if self._loss_fn is None else "`loss_fn` returned no scalar"
            raise ValueError(
                f"{source}. The batch has {sorted(batch)}. Put labels under the name `labels` into the batches, or "
                "pass `loss_fn(model, batch)` that returns a scalar tensor."
            )
        loss = loss.reshape(())
        return loss if self._reduction == "sum" else loss * self.count(model, batch)

    @staticmethod
    def count(model: nn.Module, batch: Batch) -> int:
        """Return over how many terms the model takes its mean."""
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() > 0:
            if labels.is_floating_point():  # regression, or one row of targets for each example
                return labels.shape[0]
            if labels.dim() > 1 and _predicts_next_token(model):
                labels = labels[..., 1:]  # position t predicts token t + 1, the first one is nobody's target
            return max(1, int((labels != IGNORED_LABEL).sum()))
        sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0]
        return sizes[0] if sizes else 1


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether transformers' loss of this model is that of a causal language model, its default."""
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return False
    # The last one is that of vision-language models, whose text they generate.
    return getattr(model, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")


def _loss_of(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("loss")
    return getattr(output, "loss", None)
