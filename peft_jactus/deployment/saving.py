"""What `save_pretrained` of a compressed model was asked for, which transformers does not tell its quantizer."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SavingOptions:
    """Arguments of `save_pretrained`, under their names there."""

    state_dict: Mapping[str, Tensor] | None = None
    save_original_format: bool = True


_DEFAULT = SavingOptions()
SAVING = ContextVar("peft_jactus_saving_options", default=_DEFAULT)


class SavePretrained:
    """The `save_pretrained` of one model: says in `SAVING` what it is asked for.

    Args:
        model: The model, in which this is an attribute.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Save; arguments as for the model's class."""
        save = type(self.model).save_pretrained
        given = inspect.signature(save).bind(self.model, *args, **kwargs).arguments
        options = {field.name: given[field.name] for field in fields(SavingOptions) if field.name in given}
        token = SAVING.set(SavingOptions(**options))
        try:
            save(self.model, *args, **kwargs)
        finally:
            SAVING.reset(token)


def state_dict_to_save(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model.

    Raises:
        ValueError: If DeepSpeed has spread them over several processes.
    """
    spread = [name for name, tensor in model.named_parameters() if hasattr(tensor, "ds_id") and not tensor.numel()]
    if spread:
        raise ValueError(
            f"DeepSpeed has spread {len(spread)} parameters over its processes: {spread[:5]}. Gather them: "
            "`model.save_pretrained(folder, state_dict=accelerator.get_state_dict(engine))`."
        )
    return model.state_dict()
