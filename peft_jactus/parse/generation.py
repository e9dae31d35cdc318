"""``generate`` of a routed model: it says where the prompt ends, where a call has generated tokens, too."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch

from peft_jactus.parse.layer import Generation

if TYPE_CHECKING:
    from transformers import GenerationMixin

    from peft_jactus.parse.layer import RoutingState

# Whatever of them is set, by name or in a `GenerationConfig`, another model or rule makes drafts.
_ASSISTED = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")


class RoutedGenerate:
    """In place of a model's ``generate``: with assistance, or without a cache, it gives what it gives otherwise.

    Assisted generation checks several drafted tokens in one call, the first ones in the call that reads the prompt.
    Without a cache, each call reads all that was generated. These tokens must not be taken for a part of the prompt.
    While the model only makes drafts for another one, which go back and forth over the end of the prompt, its first
    choice stays.

    Args:
        model: The model. It holds this object, so this one does not hold it.
        state: Of the model.
    """

    def __init__(self, model: GenerationMixin, state: RoutingState) -> None:
        self.__setstate__({"model": model, "state": state})

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model(), "state": self._state}  # so that a copy is of the copied model

    def __setstate__(self, state: dict[str, Any]) -> None:
        model: GenerationMixin = state["model"]
        self._model = weakref.ref(model)
        self._state: RoutingState = state["state"]
        functools.update_wrapper(self, type(model).generate)
        del vars(self)["__wrapped__"]  # whose signature has `self`
        signature = inspect.signature(type(model).generate)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; as the model's own ``generate``."""
        model = self._model()
        assert model is not None
        outer = self._state.generation
        self._state.generation = _generation(model, args, kwargs)
        try:
            return type(model).generate(model, *args, **kwargs)
        finally:
            self._state.generation = outer


def _generation(model: GenerationMixin, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation | None:
    """Return what routing must know of a call of ``generate`` with these arguments, if anything."""
    arguments = inspect.signature(type(model).generate).bind_partial(model, *args, **kwargs).arguments
    arguments |= arguments.pop("kwargs", {})
    config = arguments.get("generation_config")
    if getattr(config, "is_assistant", False):
        return Generation(None, assists=True)
    sources = (arguments, vars(config) if config is not None else {}, vars(model.generation_config))
    use_cache = next((value for source in sources if (value := source.get("use_cache")) is not None), None)
    if use_cache is not False and not any(source.get(name) for source in sources for name in _ASSISTED):
        return None
    return Generation(_prompt_length(arguments), assists=False)


def _prompt_length(arguments: dict[str, Any]) -> int:
    """Return the number of positions of the prompt, those in a filled cache included."""
    given = (arguments.get(name) for name in ("inputs_embeds", "inputs", "input_ids"))
    inputs = next((value for value in given if value is not None), None)
    mask = arguments.get("attention_mask")
    lengths = [value.shape[1] for value in (inputs, mask) if isinstance(value, torch.Tensor)]
    return max(lengths, default=1)  # without a prompt, one token stands for its beginning
