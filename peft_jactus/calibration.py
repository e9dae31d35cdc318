"""`calibrate`: run a few batches through the model and collect the statistics of its targeted layers.

Both statistics of a layer are taken in one place, the gradient hook of its output. It fires once for each position
that the backward pass reaches, also when gradient checkpointing runs the forward pass twice.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from peft_jactus.statistics import (
    CalibrationStatistics,
    LayerStatistics,
    SecondMoment,
    read_metadata,
)
from peft_jactus.targeting import dense_weight, targeted_modules

if TYPE_CHECKING:
    import os

    from peft_jactus.config import JactusConfig

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
LossFn = Callable[[nn.Module, Batch], Tensor]
_IGNORED_LABEL = -100
_COMPLETE = "complete"


def calibrate(
    model: nn.Module,
    config: JactusConfig,
    batches: Iterable[Batch],
    *,
    max_batches: int | None = None,
    loss_fn: LossFn | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    head_warmup_steps: int = 0,
    head_warmup_lr: float = 1e-3,
    train_mode: bool = False,
    statistics_file: str | os.PathLike[str] | None = None,
    save_every: int = 16,
    progress_bar: bool = True,
) -> CalibrationStatistics:
    """Collect the statistics that `peft.get_peft_model` needs to compress ``model``, and attach them to ``config``.

    The model comes back as it was: no hook, no gradient, the same training mode, ``requires_grad`` and random
    state; only a head warm-up, if asked for, changes weights. A backward pass costs about one
    forward pass, since no weight needs a gradient.

    Args:
        model: Any module; a transformers model returns its own loss when ``batches`` hold labels.
        config: Says which modules to look at. ``config.statistics`` is set to the result.
        batches: Mappings of tensors, as ``model(**batch)`` takes them: a DataLoader, a list, a generator. Positions
            that a two-dimensional ``attention_mask`` (or ``decoder_attention_mask``) excludes are not counted.
        max_batches: Stop after so many. Default: all.
        loss_fn: ``loss_fn(model, batch)`` returns the loss, a scalar tensor, for models that don't return one.
        loss_reduction: Whether the loss is the mean over examples (over tokens that have a label, if labels are
            sequences), as transformers' models return it, or their sum. Statistics are those of the sum, so that
            they do not depend on how examples are batched.
        head_warmup_steps: Train a freshly initialised head for so many steps first (AdamW on the head alone), so that
            gradients mean something. The head is ``config.modules_to_save``, or the classifier that PEFT trains for
            the task type. It keeps what it learns.
        head_warmup_lr: Learning rate of the warm-up.
        train_mode: Keep dropout on. Default: evaluation mode.
        statistics_file: Save statistics here every ``save_every`` batches and at the end. If the file is there
            already, for the same layers: a complete one is used as it is, an interrupted one is continued,
            skipping the batches it has seen (which must come in the same order).
        save_every: Batches between two saves.
        progress_bar: Show a bar over the batches.

    Returns:
        The statistics by full module name; also in ``config.statistics``. `get_peft_model` releases that reference.

    Raises:
        ValueError: For an empty iterable, a model that returns no loss, a value that is not finite, a targeted
            module with no gradient, a statistics file of other layers. A `TypeError` names a module that cannot be
            factorized, or a batch that is no mapping; a `RuntimeError` a targeted module that no token reached.

    Example:
        >>> import torch
        >>> from peft_jactus import JactusConfig, calibrate
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> config = JactusConfig(target_modules=["0"])
        >>> loss_fn = lambda model, batch: model(batch["x"]).square().sum(1).mean()
        >>> calibrate(model, config, [{"x": torch.ones(5, 4)}], loss_fn=loss_fn, progress_bar=False)
        CalibrationStatistics(1 layers, 1 batches)
    """
    _check_counts(max_batches=max_batches, save_every=save_every)
    if head_warmup_steps > 0 and isinstance(batches, Iterator):
        raise ValueError(
            "`head_warmup_steps` reads the batches twice, but `batches` is an iterator that can be read once. Pass a "
            "DataLoader or a list."
        )
    if isinstance(model, PeftModel):  # a further adapter; module names are those of the base model
        model = model.get_base_model()
    targets = targeted_modules(model, config)
    saved = _read_statistics_file(statistics_file, targets)
    compute_loss = _SummedLoss(loss_fn, loss_reduction)
    with _random_state_kept():
        if head_warmup_steps > 0:
            warmup = _HeadWarmup(head_warmup_steps, head_warmup_lr)
            _warm_up_head(model, config, batches, compute_loss, warmup, progress_bar=progress_bar)
        if saved is not None and saved.complete:
            logger.info("Using the statistics of %s.", statistics_file)
            config.statistics = saved.statistics
            return saved.statistics
        collector = _Collector(model, targets, None if saved is None else saved.statistics)
        total = _num_batches(batches, max_batches)
        with (
            _prepared_for_calibration(model, train_mode=train_mode),
            collector.attached(),
            tqdm(total=total, desc="Calibrating", unit="batch", disable=not progress_bar) as bar,
        ):
            bar.update(collector.num_batches)
            for batch in itertools.islice(batches, collector.num_batches, max_batches):
                collector.collect(batch, compute_loss)
                bar.update()
                if statistics_file is not None and collector.num_batches % save_every == 0:
                    collector.statistics().save(statistics_file, metadata={_COMPLETE: "false"})
    config.statistics = statistics = collector.checked_statistics()
    if statistics_file is not None:
        statistics.save(statistics_file, metadata={_COMPLETE: "true"})
    return statistics


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1; got {count}.")


# -- the collector ----------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """One tensor of the running batch and the targeted modules that were called with it."""

    tensor: Tensor
    mask: Tensor | None
    version: int
    readers: list[str]
    added: bool = False


class _Collector:
    """Sums over positions for every targeted module, through hooks that live as long as `attached`.

    Input sums are kept for each set of modules that read the same tensor (query, key and value; gate and up), so
    that such layers share one covariance; what a module has seen is the sum over the sets it is in.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Module],
        start: CalibrationStatistics | None,
    ) -> None:
        self._model = model
        self._targets = targets
        self._start = start
        self._inputs: dict[tuple[str, ...], SecondMoment] = {}
        self._gradients: dict[str, SecondMoment] = {}
        self._readings: dict[int, _Reading] = {}
        self._masks = _PositionMasks(_encoder(model))
        self.num_batches = 0 if start is None else start.num_batches

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Register the hooks, and remove them whatever happens."""
        with contextlib.ExitStack() as handles:
            handles.callback(self._end_batch)
            for name, module in self._targets.items():
                hook = functools.partial(self._on_forward, name)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                handles.callback(handle.remove)
            handles.enter_context(self._masks.attached())
            yield

    def collect(self, batch: Batch, compute_loss: _SummedLoss) -> None:
        """Add the statistics of one batch."""
        batch = _to_model_device(batch, self._model)
        self._masks.start(batch)
        with torch.enable_grad():
            loss = compute_loss(self._model, batch)
        if not loss.requires_grad:
            raise ValueError(
                "The loss does not depend on any targeted module. Check `target_modules`, and that `loss_fn` "
                "neither detaches nor runs under torch.no_grad()."
            )
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss of calibration batch {self.num_batches} is {float(loss)}. Check the data, and whether the "
                f"model's dtype ({loss.dtype}) overflows."
            )
        torch.autograd.backward(loss)
        self._end_batch()
        self.num_batches += 1

    def statistics(self) -> CalibrationStatistics:
        """Return the sums so far; modules that always read the same tensors share theirs."""
        layers = {
            name: LayerStatistics(self._input_of(name), self._gradients[name])
            for name in self._targets
            if name in self._gradients
        }
        num_new = self.num_batches - (0 if self._start is None else self._start.num_batches)
        statistics = CalibrationStatistics(layers, num_batches=num_new)
        if self._start is None or not layers:
            return statistics if self._start is None else self._start
        return self._start.merge(statistics)

    def checked_statistics(self) -> CalibrationStatistics:
        """Return the sums, or raise for a module whose statistics cannot be used; name it."""
        if self.num_batches == 0:
            raise ValueError("`batches` is empty; calibration needs at least one batch.")
        statistics = self.statistics()
        for name in self._targets:
            layer = statistics.get(name)
            if layer is None or layer.num_tokens == 0:
                raise RuntimeError(
                    f"{name}: no calibration token reached it, or none of its output reached the loss. Add the name "
                    "to `exclude_modules`, or calibrate on batches that use it."
                )
            if not (layer.input.is_finite() and layer.gradient.is_finite()):
                raise ValueError(
                    f"{name}: its inputs or gradients are not finite. Check the calibration data, or load the model "
                    "in bf16 or fp32."
                )
            if not layer.gradient.quartic_sum > 0:
                raise ValueError(
                    f"{name}: its gradient is zero everywhere. If the head starts at zero, pass `head_warmup_steps`; "
                    "otherwise add the name to `exclude_modules`."
                )
        return statistics

    def _end_batch(self) -> None:
        self._readings.clear()

    def _on_forward(
        self, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor | None:
        del module
        if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing
            return None
        starts_graph = not output.requires_grad  # all that comes before is frozen
        if starts_graph:
            output.requires_grad_(True)
        reading = self._reading(name, args[0] if args else next(iter(kwargs.values())))
        output.register_hook(  # type: ignore[no-untyped-call]  # torch has no annotation here
            functools.partial(self._on_gradient, name, reading)
        )
        # A leaf must not be changed in place, as by nn.ReLU(inplace=True).
        return output.clone() if starts_graph else None

    def _reading(self, name: str, tensor: Tensor) -> _Reading:
        reading = self._readings.get(id(tensor))
        if reading is None or name in reading.readers:
            mask = self._masks.find(name, tensor)
            reading = _Reading(tensor, mask, tensor._version, [])
            self._readings[id(tensor)] = reading
        reading.readers.append(name)
        return reading

    def _on_gradient(self, name: str, reading: _Reading, gradient: Tensor) -> None:
        gradient = _kept_positions(gradient, reading.mask)
        if name not in self._gradients:
            self._gradients[name] = _empty_moment_for(gradient)
        self._gradients[name].update_(gradient)
        if reading.added:
            return
        if reading.tensor._version != reading.version:
            raise RuntimeError(
                f"{name}: its input was changed in place after the forward pass; calibration cannot see it any "
                "more. Make the model's operation out of place, or add the name to `exclude_modules`."
            )
        vectors = _kept_positions(reading.tensor, reading.mask)
        readers = tuple(reading.readers)
        if readers not in self._inputs:
            self._inputs[readers] = _empty_moment_for(vectors)
        self._inputs[readers].update_(vectors)
        reading.added = True
        # A tensor that is read again from here on starts a reading of its own.
        if self._readings.get(id(reading.tensor)) is reading:
            del self._readings[id(reading.tensor)]
        reading.tensor = vectors.new_empty(0)

    def _input_of(self, name: str) -> SecondMoment:
        parts = [moment for readers, moment in self._inputs.items() if name in readers]
        if len(parts) == 1:
            return parts[0]
        total = parts[0].clone()
        for part in parts[1:]:
            total.merge_(part)
        return total


def _kept_positions(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the vectors ``(num_kept, dim)`` of ``(..., dim)``."""
    vectors = tensor.detach().reshape(-1, tensor.shape[-1])
    return vectors if mask is None else vectors[mask.reshape(-1).to(vectors.device)]


def _empty_moment_for(vectors: Tensor) -> SecondMoment:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return SecondMoment.zeros(vectors.shape[-1], dtype=dtype, device=vectors.device)


class _PositionMasks:
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
            labels = _two_dimensional(batch.get("labels"))
            self._decoder_mask = _two_dimensional(batch.get("decoder_attention_mask"))
            if self._decoder_mask is None and labels is not None:
                self._decoder_mask = labels != _IGNORED_LABEL

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


def _two_dimensional(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _encoder(model: nn.Module) -> nn.Module | None:
    """Return the encoder of an encoder-decoder model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()  # type: ignore[operator]  # transformers models have it
    return encoder if isinstance(encoder, nn.Module) else None


# -- the loss ---------------------------------------------------------------------------------------------


class _SummedLoss:
    """The loss of a batch, summed over its examples (over its labelled tokens, for labels that are sequences)."""

    def __init__(self, loss_fn: LossFn | None, reduction: Literal["mean", "sum"]) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"`loss_reduction` must be 'mean' or 'sum'; got {reduction!r}.")
        self._loss_fn = loss_fn
        self._reduction = reduction

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = model(**batch) if self._loss_fn is None else self._loss_fn(model, batch)
        if self._loss_fn is None:
            loss = _loss_of(loss)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            source = "The model's output has no loss" if self._loss_fn is None else "`loss_fn` returned no scalar"
            raise ValueError(
                f"{source}. Put `labels` into the batches, or pass `loss_fn(model, batch)` that returns a scalar "
                "tensor."
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
            return max(1, int((labels != _IGNORED_LABEL).sum()))
        sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0]
        return sizes[0] if sizes else 1


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether transformers' loss of this model is that of a causal language model, its default."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return False
    return getattr(model, "loss_type", None) in (None, "ForCausalLM")


def _loss_of(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("loss")
    return getattr(output, "loss", None)


# -- leaving the model as it was --------------------------------------------------------------------------


@contextlib.contextmanager
def _prepared_for_calibration(model: nn.Module, *, train_mode: bool) -> Iterator[None]:
    """Freeze ``model`` and set its mode; restore both at the end."""
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, modes, trainable)
        model.train(train_mode)
        for parameter in trainable:
            parameter.requires_grad_(False)
        if train_mode and any(getattr(module, "gradient_checkpointing", False) for module in modes):
            # Reentrant checkpointing only runs a block again if an input of it requires a gradient.
            embeddings = model.get_input_embeddings()  # type: ignore[operator]  # a transformers model
            handle = embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
            stack.callback(handle.remove)
        yield


def _restore(modes: dict[nn.Module, bool], trainable: dict[nn.Parameter, bool]) -> None:
    for module, training in modes.items():
        module.training = training
    for parameter, requires_grad in trainable.items():
        parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Give the random generators of torch, numpy and Python back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  # the legacy one is global
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


# -- the head ---------------------------------------------------------------------------------------------

# What PEFT trains beside the adapter for these tasks (peft.PeftModelForSequenceClassification and its sisters).
_HEAD_NAMES = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _warm_up_head(
    model: nn.Module,
    config: JactusConfig,
    batches: Iterable[Batch],
    compute_loss: _SummedLoss,
    settings: _HeadWarmup,
    *,
    progress_bar: bool,
) -> None:
    head_names = config.modules_to_save or _HEAD_NAMES.get(str(config.task_type).rpartition(".")[2], ())
    heads = [module for name, module in model.named_modules() if name.rpartition(".")[2] in head_names]
    parameters = [parameter for head in heads for parameter in head.parameters()]
    if not parameters:
        raise ValueError(
            "`head_warmup_steps` needs a head to train, and none was found. Name it in `modules_to_save`, or set "
            "`task_type`."
        )
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    cycled = itertools.chain.from_iterable(itertools.repeat(batches))
    with _prepared_for_calibration(model, train_mode=False):
        for parameter in parameters:
            parameter.requires_grad_(True)
        steps = itertools.islice(cycled, settings.num_steps)
        for batch in tqdm(steps, "Warming up the head", settings.num_steps, disable=not progress_bar, unit="step"):
            inputs = _to_model_device(batch, model)
            torch.autograd.backward(compute_loss(model, inputs) / compute_loss.count(model, inputs))
            optimizer.step()
            optimizer.zero_grad()
        optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class _HeadWarmup:
    num_steps: int
    learning_rate: float


# -- batches and files ------------------------------------------------------------------------------------


def _to_model_device(batch: Batch, model: nn.Module) -> Batch:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"`batches` must yield mappings of keyword arguments for the model; got a {type(batch).__name__}."
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    moved: Batch = send_to_device(dict(batch), device)
    return moved


def _num_batches(batches: Iterable[Batch], max_batches: int | None) -> int | None:
    length = len(batches) if isinstance(batches, Sized) else None
    known = [number for number in (length, max_batches) if number is not None]
    return min(known) if known else None


@dataclass(frozen=True)
class _SavedStatistics:
    statistics: CalibrationStatistics
    complete: bool


def _read_statistics_file(
    path: str | os.PathLike[str] | None, targets: Mapping[str, nn.Module]
) -> _SavedStatistics | None:
    if path is None or not Path(path).exists():
        return None
    statistics = CalibrationStatistics.load(path)
    check_statistics(statistics, targets, source=f"`statistics_file` {path}")
    return _SavedStatistics(statistics, complete=read_metadata(path).get(_COMPLETE) == "true")


def check_statistics(statistics: CalibrationStatistics, targets: Mapping[str, nn.Module], *, source: str) -> None:
    """Raise `ValueError` if ``statistics`` do not cover ``targets`` with the right shapes; name the module."""
    for name, module in targets.items():
        layer = statistics.get(name)
        if layer is None:
            raise ValueError(
                f"{source} has no statistics of {name}. Calibrate with the config and model that you compress."
            )
        expected = tuple(dense_weight(module).shape)
        found = (layer.gradient.dim, layer.input.dim)
        if expected != found:
            raise ValueError(f"{source} has statistics of {name} for a weight of shape {found}; it has {expected}.")
