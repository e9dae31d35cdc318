"""`calibrate`: run a few batches through the model and collect the statistics of its targeted layers."""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from peft import PeftModel

from peft_jactus._processes import gather_objects, process_index
from peft_jactus._progress import progress
from peft_jactus.calibration.batches import num_batches
from peft_jactus.calibration.collector import StatisticsCollector
from peft_jactus.calibration.head_warmup import HeadWarmup, warm_up_head
from peft_jactus.calibration.memory_groups import parse_memory_limit, split_into_groups
from peft_jactus.calibration.model_state import prepared_for_calibration, random_state_kept
from peft_jactus.calibration.resume import StatisticsStore, of_these_batches, warn_of_changes, warn_of_complete
from peft_jactus.calibration.statistics import CalibrationStatistics, open_statistics
from peft_jactus.calibration.statistics_files import files_of, save_index
from peft_jactus.calibration.summed_loss import SummedLoss
from peft_jactus.calibration.unusable import ADVICE, exclude_, find_unusable, report
from peft_jactus.calibration.weight_watch import WeightWatch
from peft_jactus.tuner.base_weights import passes_gradients, quantization_of
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.targeting import base_layer_of, check_finite, targeted_modules

if TYPE_CHECKING:
    import os

    from torch import nn

    from peft_jactus.calibration.batches import Batch, LossFn
    from peft_jactus.numerics.moments import StatisticsNeeds
    from peft_jactus.tuner.config import JactusConfig

logger = logging.getLogger(__name__)


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
    max_statistics_memory: int | str | None = None,
    leave_unusable_dense: bool = False,
    progress_bar: bool = True,
) -> CalibrationStatistics:
    """Collect the statistics that `peft.get_peft_model` needs to compress ``model``, and attach them to ``config``.

    In several processes (``accelerate launch``, ``torchrun``), give each process its share of the batches; all
    processes get the statistics of all batches. On several machines, ``statistics_file`` must be on shared storage.

    Afterwards the model is as it was: no hooks, no gradients, the same training mode, ``requires_grad`` and random
    state. Only a head warm-up changes weights. A backward pass costs about one forward pass, since no weight needs a
    gradient. A model that checkpoints its activations (`model.activation_checkpointing_enable()`, formerly
    ``gradient_checkpointing_enable``) also does so here.

    Args:
        model: Any module. A transformers model returns its own loss if ``batches`` have labels.
        config: Defines the targeted modules. ``config.statistics`` is set to the result.
        batches: Mappings of tensors, as ``model(**batch)`` takes them: a DataLoader, a list, a generator. Positions
            that a two-dimensional ``attention_mask`` (or ``decoder_attention_mask``) excludes are not counted. It is
            the mask of the text, or of the sound where there is no text; other inputs may have one that is named
            after them, as ``visual_attention_mask``. If the model is already fine-tuned, use rows that it was not
            trained on: gradients on training rows say less.
        max_batches: Stop after this number of batches. Default: all.
        loss_fn: ``loss_fn(model, batch)`` returns the loss, a scalar tensor, for models that don't return one.
        loss_reduction: Whether the loss is the mean or the sum over examples (over tokens with a label, if labels are
            sequences). Models of transformers return the mean. Statistics are those of the sum, so they do not depend
            on how examples are batched.
        head_warmup_steps: First train a newly initialised head alone for this number of steps (with AdamW), so that
            gradients are meaningful. The head is ``config.modules_to_save``, or the classifier that PEFT trains for
            the task type. It keeps what it learns.
        head_warmup_lr: Learning rate of the warm-up.
        train_mode: Keep dropout on. Default: evaluation mode.
        statistics_file: Save statistics here every ``save_every`` batches and at the end. If the file already exists,
            for the same layers and weights, a complete file is used as it is. An interrupted one is continued, and the
            batches it has seen are skipped (they must come in the same order). You may set or change the memory limit
            in between.
        save_every: Number of batches between two saves.
        max_statistics_memory: Bytes, or a size such as ``"8GiB"``. Keep the statistics of only as many layers as fit,
            and pass over the batches (which are kept) once for each group of layers. Each group is written to a file
            beside ``statistics_file``, by default in a temporary folder; `get_peft_model` reads one layer at a time
            from it. So the memory for statistics does not grow with the depth of the model. The memory for activations
            hardly grows if the model checkpoints them (see above). Default: no limit, one pass.
        leave_unusable_dense: Add targeted layers that calibration says nothing about to ``config.exclude_modules``,
            with a warning, instead of raising. These are layers that no token reached, as in a vision tower that is
            calibrated on text; layers whose inputs or gradients are zero everywhere; and layers whose weight the model
            uses without calling the layer.
        progress_bar: Show a bar over the batches.

    Returns:
        The statistics by full module name, also in ``config.statistics``. `get_peft_model` releases that reference.

        A `ValueError` is raised for an empty iterable, a model that returns no loss, a value that is not finite,
        targeted modules that calibration says nothing about (see ``leave_unusable_dense``; all are named at once), a
        statistics file of other layers or weights, a memory limit below one layer's. A `TypeError` names modules that
        cannot be factorized, or a batch that is no mapping.

    Example:
        >>> import torch
        >>> from peft_jactus import JactusConfig, calibrate
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> config = JactusConfig(target_modules=["0"])
        >>> loss_fn = lambda model, batch: model(batch["x"]).square().sum(1).mean()
        >>> calibrate(model, config, [{"x": torch.ones(5, 4)}], loss_fn=loss_fn, progress_bar=False)
        CalibrationStatistics(1 layers, 1 batches)
    """
    check_counts(head_warmup_steps, batches, max_batches=max_batches, save_every=save_every)
    if isinstance(model, PeftModel):  # a further adapter; module names are those of the base model
        model = model.get_base_model()
    targets = targeted_modules(model, config)
    _check_weights(model, targets)
    needs = config.statistics_needs()
    limit = parse_memory_limit(max_statistics_memory)
    groups = split_into_groups(targets, limit, needs)
    run = _Pass(
        model=model,
        targets=targets,
        compute_loss=SummedLoss(loss_fn, loss_reduction),
        max_batches=max_batches,
        train_mode=train_mode,
        save_every=save_every,
        needs=needs,
        progress_bar=progress_bar,
        leave_unusable_dense=leave_unusable_dense,
    )
    store = None if statistics_file is None else StatisticsStore.of_model(statistics_file, model, targets, needs)
    saved = None if store is None else store.read(lazily=limit is not None)
    warn_of_changes(saved, statistics_file)
    if head_warmup_steps > 0:
        warmup = HeadWarmup(head_warmup_steps, head_warmup_lr)
        with random_state_kept():
            warm_up_head(model, config, batches, run.compute_loss, warmup, progress_bar=progress_bar)
    start = None if saved is None else saved.statistics
    if saved is not None and saved.complete:
        warn_of_complete(saved, files_of(Path(str(statistics_file))))
        config.statistics = saved.statistics
        run.unusable.update(find_unusable(saved.statistics, targets, {}))
    elif limit is None or len(groups) == 1:
        config.statistics = run.collect(targets, batches, store, start)
    else:
        config.statistics = run.collect_groups(groups, batches, store, start, limit)
    config.statistics.memory_limit = limit
    return run.finish(config)


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """How to run the batches through the model."""

    model: nn.Module
    targets: dict[str, nn.Module]
    compute_loss: SummedLoss
    max_batches: int | None
    train_mode: bool
    save_every: int
    needs: StatisticsNeeds
    progress_bar: bool
    leave_unusable_dense: bool
    unusable: dict[str, str] = field(default_factory=dict)  # layers, and why

    def refuse_unusable(self) -> None:
        """Raise for layers that were found, unless they are to be left dense."""
        if self.unusable and not self.leave_unusable_dense:
            raise ValueError(f"{report(self.unusable)}\n{ADVICE}")

    def finish(self, config: JactusConfig) -> CalibrationStatistics:
        """Return the statistics. Layers that cannot be used are excluded, or raised for."""
        assert isinstance(config.statistics, CalibrationStatistics)
        self.refuse_unusable()
        if self.unusable:
            exclude_(config, self.unusable, self.targets)
            logger.warning("Left dense, added to `exclude_modules`:\n%s", report(self.unusable))
        return config.statistics

    def collect_groups(
        self,
        groups: list[dict[str, nn.Module]],
        batches: Iterable[Batch],
        store: StatisticsStore | None,
        start: CalibrationStatistics | None,
        limit: int,
    ) -> CalibrationStatistics:
        """Return the statistics of all groups, which are in files; a pass over the batches for each.

        ``start`` holds those of the first batches, of a run without groups. ``limit`` is what the groups were made
        for, in bytes.
        """
        if store is None:
            with contextlib.ExitStack() as stack:
                folder = tempfile.TemporaryDirectory(prefix="peft_jactus_")
                stack.callback(folder.cleanup)
                path = Path(gather_objects(folder.name)[0]) / "statistics.safetensors"
                own_store = StatisticsStore(path, {}, self.needs)  # read in this run only: no digests
                statistics = self.collect_groups(groups, batches, own_store, start, limit)
                weakref.finalize(statistics, stack.pop_all().close)
            return statistics
        with random_state_kept():
            batches = list(itertools.islice(batches, self.max_batches))
        total = sum(gather_objects(len(batches)))
        parts = [store.part(group, number, len(groups)) for number, group in enumerate(groups, start=1)]
        for number, (group, part) in enumerate(zip(groups, parts, strict=True), start=1):
            saved = of_these_batches(part.read(lazily=True), len(batches), total)
            if number == 1:
                warn_of_changes(saved, store.path)
            if saved is not None and saved.complete:
                warn_of_complete(saved, [part.path], of=" for a part of the layers")
            else:
                begun = start if saved is None else saved.statistics
                self.collect(group, batches, part, begun, description=f"Calibrating {number}/{len(groups)}")
        if process_index() == 0:
            save_index(store.path, [part.path for part in parts], limit)
        gather_objects(None)  # wait for it
        store.remove_own_part()
        return open_statistics(store.path)

    def collect(
        self,
        targets: dict[str, nn.Module],
        batches: Iterable[Batch],
        store: StatisticsStore | None,
        start: CalibrationStatistics | None,
        *,
        description: str = "Calibrating",
    ) -> CalibrationStatistics:
        """Return the statistics of ``targets``; save them to ``store`` if there is one.

        ``start`` holds those of the first batches; it may read them from the file that is about to be replaced.
        """
        if start is not None:
            start = CalibrationStatistics(
                {name: start[name] for name in targets},
                num_batches=start.num_batches,
                num_loss_terms=start.num_loss_terms,
            )
        in_groups = len(targets) < len(self.targets)
        collector = StatisticsCollector(self.model, targets, start, self.needs, in_groups=in_groups)
        watch = WeightWatch(self.model, self.targets)
        total = num_batches(batches, self.max_batches)
        with (
            random_state_kept(),  # so that each group sees the same dropout
            prepared_for_calibration(self.model, train_mode=self.train_mode),
            collector.attached(),
            progress(description=description, unit="batch", total=total, shown=self.progress_bar) as bar,
        ):
            bar.update(collector.num_batches)
            first = collector.num_batches
            for batch in itertools.islice(batches, first, self.max_batches):
                if collector.num_batches == first:  # all batches take the same way through the model
                    with watch.attached(), watch:
                        collector.collect(batch, self.compute_loss)
                    self._note(watch)
                else:
                    collector.collect(batch, self.compute_loss)
                bar.update()
                if store is not None and collector.num_batches % self.save_every == 0:
                    store.save_part(collector.statistics())
        statistics = collector.finished_statistics()
        if store is not None:
            store.save(statistics)
        self._note(watch)
        self.unusable.update(find_unusable(statistics, targets, watch.uses))
        return statistics

    def _note(self, watch: WeightWatch) -> None:
        """Note what the model does with weights, and raise for it early."""
        watch.find_changes()
        self.unusable.update(find_unusable({}, (), watch.uses))
        self.refuse_unusable()


def check_counts(warmup_steps: int, batches: Iterable[Batch], **counts: int | None) -> None:
    """Raise for counts of `calibrate` that are out of range, or batches that cannot be read as often as needed."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1; got {count}.")
    if warmup_steps < 0:
        raise ValueError(f"`head_warmup_steps` must be at least 0; got {warmup_steps}.")
    if warmup_steps > 0 and isinstance(batches, Iterator):
        raise ValueError(
            "`head_warmup_steps` reads the batches twice, but `batches` is an iterator that can be read once. Pass a "
            "DataLoader or a list."
        )


def _check_weights(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("`calibrate` needs gradients. Call it outside `torch.inference_mode()`.")
    for name, module in model.named_modules():  # calibration puts adapters aside, those on other layers, too
        if getattr(module, "merged", False) and (name in targets or isinstance(module, JactusLayer)):
            raise ValueError(f"{name}: an adapter is merged into its dense weight. Call `unmerge_adapter` first.")
    for name, module in targets.items():
        if getattr(module, "base_weights_freed", False):
            raise ValueError(
                f"{name}: its dense weight was freed when the model was compressed, so it cannot be calibrated. "
                "Calibrate the dense model, or compress it with `keep_base_weights=True`."
            )
    check_finite(targets)
    _check_gradients(targets)


def _check_gradients(targets: Mapping[str, nn.Module]) -> None:
    layers = {name: base_layer_of(module) for name, module in targets.items()}
    quantized = {name: layer for name, layer in layers.items() if quantization_of(layer) is not None}
    lost = [name for name, layer in quantized.items() if not passes_gradients(layer)]
    if lost:
        raise TypeError(
            f"{', '.join(lost)}: quantized so that gradients do not pass from its output to its input, for example "
            "because activations are quantized too, so it cannot be calibrated. Load the model with only its weights "
            "in 8 or 4 bits (torchao's configs named `WeightOnly`), or in bf16, fp16 or fp32."
        )
