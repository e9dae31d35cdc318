"""Sums of inputs and gradients, through hooks.

Both statistics of a layer are taken in one place, the gradient hook of its output. It fires once for each position
that the backward pass reaches, also when gradient checkpointing runs the forward pass twice. Until then autograd keeps
the input, as what a node of the graph saves: so checkpointing drops it, and computes it again.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from peft_jactus.calibration.batches import to_model_device
from peft_jactus.calibration.position_masks import PositionMasks
from peft_jactus.calibration.reduction import summed_over_processes
from peft_jactus.calibration.statistics import CalibrationStatistics
from peft_jactus.numerics.moments import LayerStatistics, SecondMoment
from peft_jactus.numerics.sketches import GradientSketch
from peft_jactus.tuner.targeting import device_and_dtype, features_of, weight_loaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from peft_jactus.calibration.batches import Batch
    from peft_jactus.calibration.summed_loss import SummedLoss
    from peft_jactus.numerics.moments import StatisticsNeeds


class _Saving(torch.autograd.Function):
    """A node of the graph for the sake of what it saves."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.new_empty(0)


def _saved(tensor: Tensor) -> Tensor:
    """Return the output of a node that has saved ``tensor``. It leads nowhere; the node lives as long as it does."""
    anchor = torch.empty(0, requires_grad=True)
    output: Tensor = _Saving.apply(anchor, tensor.detach())  # type: ignore[no-untyped-call]  # torch: no annotation
    return output


@dataclass
class _Reading:
    """One tensor of the running batch and the targeted modules that were called with it.

    ``saved`` has the output of a node for each call, for checkpointing wants both passes through a block to save the
    same. It is empty once the tensor has been added.
    """

    find_mask: Callable[[Iterable[str]], Tensor | None]
    version: int
    positions_first: bool
    saved: dict[str, Tensor] = field(default_factory=dict)
    gram: Tensor | None = None
    vectors: Tensor | None = None
    waiting: set[str] = field(default_factory=set)

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """Which positions count, or None if all do; known once the forward pass is over."""
        return self.find_mask(tuple(self.saved))

    def keep(self, vectors: Tensor) -> None:
        """Keep the counted vectors of the tensor until the gradients of all its readers have come."""
        self.vectors, self.waiting = vectors, set(self.saved)

    def vectors_for(self, name: str) -> Tensor:
        """Return the counted vectors for the gradient of module ``name``; let go of them with the last reader."""
        vectors = self.vectors
        assert vectors is not None
        self.waiting.discard(name)
        if not self.waiting:
            self.vectors = None
        return vectors

    def unpack(self, name: str) -> Tensor:
        """Return the tensor as it was when module ``name`` read it, or raise `RuntimeError`; once only."""
        changed = (
            f"{name}: its input was changed in place after the forward pass; calibration cannot see it any more. Make "
            "the model's operation out of place, or add the name to `exclude_modules`."
        )
        try:
            (tensor,) = self.saved[name].grad_fn.saved_tensors  # type: ignore[union-attr]  # it is a node's output
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):  # autograd's words
                raise RuntimeError(changed) from error
            raise
        if tensor._version > self.version:  # checkpointing does not look
            raise RuntimeError(changed)
        found: Tensor = tensor
        return found


class StatisticsCollector:
    """Sums over positions for every targeted module, through hooks that live as long as `attached`.

    Input sums are kept for each set of modules that read the same tensor (query, key and value; gate and up), so
    that such layers share one covariance; what a module has seen is the sum over the sets it is in.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Module],
        start: CalibrationStatistics | None,
        needs: StatisticsNeeds,
        *,
        in_groups: bool,
    ) -> None:
        self._model = model
        self._in_groups = in_groups  # then the loss may depend on targets of other ones
        self._targets = targets
        self._start = start
        self._inputs: dict[tuple[str, ...], SecondMoment] = {}
        self._gradients: dict[str, SecondMoment] = {}
        self._needs = needs
        self._row_fisher: dict[str, Tensor] = {}
        self._sketches: dict[str, GradientSketch] = {}
        self._readings: Any = WeakTensorKeyDictionary()  # of the tensors that are still in use
        self._masks = PositionMasks(model, always_follow=needs.row_fisher)
        self._num_loss_terms = 0
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

    def collect(self, batch: Batch, compute_loss: SummedLoss) -> None:
        """Add the statistics of one batch."""
        batch = to_model_device(batch, self._model)
        with torch.enable_grad(), self._masks.reading(batch) as read:
            loss = compute_loss(self._model, read)
        self._add_gradients_of(loss)
        self._masks.warn()
        self._end_batch()
        self._num_loss_terms += compute_loss.count(self._model, batch)
        self.num_batches += 1

    def _add_gradients_of(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss of calibration batch {self.num_batches} is {loss.item()}. Check the data (labels that are "
                f"all -100 have no loss), and whether the model's dtype ({loss.dtype}) overflows."
            )
        if loss.requires_grad:
            torch.autograd.backward(loss)
        elif not self._in_groups:
            raise ValueError(
                "The loss does not depend on any targeted module. Check `target_modules`, and that `loss_fn` "
                "neither detaches nor runs under torch.no_grad()."
            )

    def statistics(self) -> CalibrationStatistics:
        """Return the sums so far, of all targets; modules that always read the same tensors share theirs."""
        layers = {
            name: LayerStatistics(
                self._input_of(name), self._gradients[name], self._row_fisher.get(name), self._sketches.get(name)
            )
            if name in self._gradients
            else _unreached(module, self._needs)
            for name, module in self._targets.items()
        }
        num_new = self.num_batches - (0 if self._start is None else self._start.num_batches)
        statistics = CalibrationStatistics(layers, num_batches=num_new, num_loss_terms=self._num_loss_terms)
        return statistics if self._start is None else self._start.merge(statistics)

    def finished_statistics(self) -> CalibrationStatistics:
        """Return the sums of all processes.

        Raises:
            ValueError: If there was no batch, or sums are not finite; it names the modules.
        """
        statistics = summed_over_processes(self.statistics())
        if statistics.num_batches == 0:
            raise ValueError("`batches` is empty; calibration needs at least one batch.")
        not_finite = [
            name
            for name in self._targets
            if not (statistics[name].input.is_finite() and statistics[name].gradient.is_finite())
        ]
        if not_finite:
            raise ValueError(
                f"{', '.join(not_finite)}: its inputs or gradients are not finite. Check the calibration data, or "
                "load the model in bf16 or fp32."
            )
        return statistics

    def _end_batch(self) -> None:
        self._readings.clear()
        self._masks.forget()

    def _on_forward(
        self, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor | None:
        del module
        tensor = args[0] if args else next(iter(kwargs.values()))
        if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing
            self._masks.note(name, tensor)
            return None
        starts_graph = not output.requires_grad  # all that comes before is frozen
        if starts_graph:
            output.requires_grad_(True)
        reading = self._reading(name, tensor)
        reading.saved[name] = _saved(tensor)
        hooked = output if starts_graph else _keeps_hooks(output)
        (output if hooked is None else hooked).register_hook(  # type: ignore[no-untyped-call]  # torch: no annotation
            functools.partial(self._on_gradient, name, reading, output.shape)
        )
        # A leaf must not be changed in place, as by nn.ReLU(inplace=True).
        return output.clone() if starts_graph or hooked is None else None

    def _reading(self, name: str, tensor: Tensor) -> _Reading:
        """Return the reading that a call of module ``name`` with ``tensor`` belongs to."""
        reading: _Reading | None = self._readings.get(tensor)
        if reading is None or not reading.saved or name in reading.saved or reading.version != tensor._version:
            positions_first = self._masks.has_positions_first(name, tensor)
            reading = _Reading(self._masks.find(name, tensor), tensor._version, positions_first)
            self._readings[tensor] = reading
        return reading

    def _on_gradient(self, name: str, reading: _Reading, shape: torch.Size, gradient: Tensor) -> None:
        gradient = gradient.reshape(shape)
        if reading.saved:
            self._add_input(name, reading)
        if self._needs.row_fisher:
            assert reading.gram is not None
            sums = _squared_gradient_of_rows(reading.gram, _by_example(gradient, reading))
            self._row_fisher[name] = self._row_fisher[name] + sums if name in self._row_fisher else sums
        gradient = _kept_positions(gradient, reading.mask)
        if name not in self._gradients:
            self._gradients[name] = _empty_moment_for(gradient)
        self._gradients[name].update_(gradient)
        if self._needs.num_directions:
            vectors = reading.vectors_for(name)
            if name not in self._sketches:
                self._sketches[name] = self._empty_sketch(vectors.shape[1], gradient)
            self._sketches[name].update_(vectors, gradient)

    def _empty_sketch(self, in_features: int, gradient: Tensor) -> GradientSketch:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return GradientSketch.zeros(
            gradient.shape[1], in_features, self._needs.num_directions, dtype=dtype, device=gradient.device
        )

    def _add_input(self, name: str, reading: _Reading) -> None:
        """Add the tensor of ``reading``, of whose readers the gradient of ``name`` came first, and let go of it."""
        tensor = reading.unpack(name)
        vectors = _kept_positions(tensor, reading.mask)
        readers = tuple(reading.saved)
        if readers not in self._inputs:
            self._inputs[readers] = _empty_moment_for(vectors)
        self._inputs[readers].update_(vectors)
        if self._needs.row_fisher:
            inputs = _by_example(tensor, reading, reading.mask)
            reading.gram = inputs @ inputs.mT
        if self._needs.num_directions:
            reading.keep(vectors)
        reading.saved.clear()

    def _input_of(self, name: str) -> SecondMoment:
        parts = [moment for readers, moment in self._inputs.items() if name in readers]
        if len(parts) == 1:
            return parts[0]
        total = parts[0].clone()
        for part in parts[1:]:
            total.merge_(part)
        return total


def _keeps_hooks(output: Tensor) -> Tensor | None:
    """Return the tensor whose hooks get the gradient of a layer's output also if that is changed in place later.

    A change of a view, as `nn.Linear` gives it for three dimensions, leaves its own node out of the graph, and the
    hooks with it, but not the node of its base. With a base of other numbers, or in another order, it is ``None``.
    """
    base = output._base
    if base is None or not base.requires_grad:  # autograd lets nobody change a view that a custom function returned
        return output
    node = output.grad_fn
    assert node is not None
    is_all = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return base if is_all and node.next_functions == ((base.grad_fn, base.output_nr),) else None


def _kept_positions(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the vectors ``(num_kept, dim)`` of ``(..., dim)``."""
    vectors = tensor.detach().reshape(-1, tensor.shape[-1])
    return vectors if mask is None else vectors[mask.reshape(-1).to(vectors.device)]


def _by_example(tensor: Tensor, reading: _Reading, mask: Tensor | None = None) -> Tensor:
    """Return the vectors ``(examples, positions, dim)`` of a layer's inputs or outputs; masked ones are zero."""
    vectors = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    if mask is not None:
        vectors = vectors * mask.to(vectors.device).reshape(*vectors.shape[:-1], 1)
    if reading.positions_first:
        vectors = vectors.transpose(0, 1)
    return vectors.reshape(vectors.shape[0], -1, vectors.shape[-1])


def _squared_gradient_of_rows(gram: Tensor, gradient: Tensor) -> Tensor:
    """Return ``(out,)``: the weight's gradient of each example is ``G = sum_t g_t x_t^T``; its squares, summed.

    ``sum_j G_ij^2 = sum_st g_si (x_s . x_t) g_ti`` needs no ``G``, which is as large as the weight.
    """
    gradient = gradient.to(gram)
    return (gradient * (gram @ gradient)).sum((0, 1))


def _unreached(module: nn.Module, needs: StatisticsNeeds) -> LayerStatistics:
    """Return the statistics of a module that saw no token: another part of the data may use it."""
    with weight_loaded(module):
        device, dtype = device_and_dtype(module)
    dtype = torch.promote_types(dtype, torch.float32)
    out_features, in_features = features_of(module)
    gradient, inputs = (SecondMoment.zeros(dim, dtype=dtype, device=device) for dim in (out_features, in_features))
    row_fisher = torch.zeros_like(gradient.absolute_sum) if needs.row_fisher else None
    sketch = None
    if needs.num_directions:
        sketch = GradientSketch.zeros(out_features, in_features, needs.num_directions, dtype=dtype, device=device)
    return LayerStatistics(inputs, gradient, row_fisher, sketch)


def _empty_moment_for(vectors: Tensor) -> SecondMoment:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return SecondMoment.zeros(vectors.shape[-1], dtype=dtype, device=vectors.device)
