"""A tiny random model of a type and a batch that it takes."""

import contextlib
import itertools
import re
import tempfile
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.model_types.batches import special_batch
from benchmarks.model_types.classes import classes_of, config_class_of, config_for
from benchmarks.model_types.inputs import Inputs, counts_of_places, find, with_placeholders
from benchmarks.model_types.shrinking import RECIPES, shrunk

MOST_PARAMETERS = 60e6
_NAMES = re.compile(r"([\w.]+\.[\w.]+)(?:, [\w.]+){2,}")
PERCEIVED = {"pixel_values", "input_features", "input_values"}


class CannotBuildError(Exception):
    """No tiny model of a type could be made that takes an input of ours; says why."""


class ComponentError(CannotBuildError):
    """The type is a part of other models."""


@dataclass(frozen=True)
class Built:
    """How to make one model again and again.

    Attributes:
        auto: Its Auto class.
        model_class: Its class.
        recipe: Of its config.
        batch: Keyword arguments that its ``forward`` takes.
        has_own_loss: Whether it returns a loss for them.
    """

    auto: type
    model_class: type
    recipe: str
    batch: dict
    has_own_loss: bool
    config_class: type

    def model(self):
        """Return the model, the same at each call."""
        return random_model(self.model_class, _config(self.config_class, self.auto, self.model_class, self.recipe))


def build(model_type):
    """Return the first class, in the first recipe, that takes an input.

    Raises:
        CannotBuildError: If none does.
    """
    pairs = classes_of(model_type)
    if not pairs:
        raise ComponentError("no Auto class has it: it is a part of other models")
    reasons = []
    for recipe, (auto, model_class) in itertools.product(RECIPES, pairs[:4]):
        built = _try_to_build(config_class_of(model_type), auto, model_class, recipe)
        if isinstance(built, Built):
            return built
        reasons.append(built)
    raise CannotBuildError(reasons[0])


def _try_to_build(config_class, auto, model_class, recipe):
    """Return what was built, or in words why nothing was."""
    try:
        return _built(config_class, auto, model_class, recipe)
    except Exception as error:  # noqa: BLE001  # a wrong guess can raise anything in models' code
        return f"{model_class.__name__}, {recipe}: {type(error).__name__}: {first_line(error)}"


def first_line(error):
    """Return what an error says, without the rest of a long list of layers, and without names of temporary folders."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Class validation error") and len(lines) > 1:  # of transformers' configs
        lines = lines[1:]
    line = re.sub(_NAMES, lambda names: f"{names[1]} and {names[0].count(',')} more", lines[0] if lines else "")
    line = re.sub(rf"{re.escape(tempfile.gettempdir())}/tmp\w{{8}}\b", "FOLDER", line)  # another one each time
    return line if len(line) <= 300 else f"{line[:300]}..."


def _config(config_class, auto, model_class, recipe):
    return config_for(model_class, auto, shrunk(config_class, recipe))


def _built(config_class, auto, model_class, recipe):
    config = _config(config_class, auto, model_class, recipe)
    if recipe == "shallow":
        _check_size(model_class, config)
    model = random_model(model_class, config)
    batch, output = _accepted(model, auto.__name__)
    tensors = tensors_in(output)
    # Masked scores are minus infinity.
    if any((tensor.isnan() | tensor.isposinf()).any() for tensor in tensors if tensor.is_floating_point()):
        raise CannotBuildError("its outputs are not finite")
    loss = output.get("loss") if hasattr(output, "get") else None
    has_own_loss = isinstance(loss, torch.Tensor) and loss.numel() == 1
    return Built(auto, model_class, recipe, batch, has_own_loss, config_class)


def _check_size(model_class, config):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise CannotBuildError(f"{count / 1e6:.0f} million parameters, even with two layers")


def random_model(model_class, config):
    """Return a model in evaluation mode none of whose parameters is what its class fills in for a missing one."""
    if not issubclass(model_class, PreTrainedModel):
        raise CannotBuildError(f"{model_class.__name__} is no PreTrainedModel")
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.add_(torch.randn_like(module.running_mean), alpha=0.02)
    return model


def _accepted(model, auto_name):
    """Return the first batch that the model takes, and what it answers."""
    inputs = Inputs(model, auto_name)
    first = None
    for batch in inputs.batches(special_batch(inputs)):
        found = _with_places(model, inputs, batch, inputs.counts_in_config())
        if found is not None:
            return found
        try:
            return batch, answer(model, batch)
        except Exception as error:  # noqa: BLE001  # as in `_try_to_build`
            first = first or error
            counts = counts_of_places(error, find(model.config, "hidden_size", default=64))
            found = _with_places(model, inputs, batch, counts)
            if found is not None:
                return found
    raise first or CannotBuildError(f"nothing is known of its inputs {list(inputs.parameters)[:6]}")


def _with_places(model, inputs, batch, counts):
    token = inputs.placeholder_id()
    if token is None or "input_ids" not in batch or not PERCEIVED & set(batch):
        return None
    for count in counts:
        placed = with_placeholders(batch, token, count, inputs.parameters)
        with contextlib.suppress(Exception):  # a wrong number of places
            return placed, answer(model, placed)
    return None


def answer(model, batch):
    """Return what a model gives for a batch; the same each time, also if it draws random numbers."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**{name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()})


def tensors_in(output):
    """Return all tensors in an output, at any depth of dictionaries and sequences."""
    if torch.is_tensor(output):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    if isinstance(output, (list, tuple)) or (hasattr(output, "__iter__") and not hasattr(output, "layers")):
        return [tensor for entry in output for tensor in tensors_in(entry)]
    return []
