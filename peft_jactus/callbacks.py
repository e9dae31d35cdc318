"""Train at full size first, compress in mid-run, and go on with the small model: one call, one schedule."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from peft_jactus.calibration import calibrate
from peft_jactus.calibration.head_warmup import head_parameters
from peft_jactus.calibration.passes import check_counts
from peft_jactus.calibration.resume import StatisticsStore
from peft_jactus.calibration.statistics_files import remains_at
from peft_jactus.deployment.atomic_folder import appearing_whole, check_target
from peft_jactus.deployment.copying import structural_copy
from peft_jactus.tuner import JactusConfig, JactusModel
from peft_jactus.tuner.budget import budget_ratio
from peft_jactus.tuner.model_size import ModelSize
from peft_jactus.tuner.targeting import targeted_modules

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import Tensor, nn
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from peft_jactus.calibration.batches import Batch

logger = logging.getLogger(__name__)


class CompressionCallback(TrainerCallback):
    """Compresses the model of a `transformers.Trainer` in mid-run.

    The first part of the steps trains the model at full size: with another PEFT adapter, or all weights. Before the
    next step, the adapter is merged, and the model is calibrated and compressed. The last steps train the compressed
    model. Batches, schedule and log go on as if nothing had happened. So do the optimizer's averages of what trains in
    both parts, such as a new head. From then on ``trainer.model`` is the compressed `peft.PeftModel`. If the trainer
    was given a `peft.PeftModel`, that object becomes it.

    The merged model is saved before it is compressed, because adapters do not hold what other layers have learned.
    Checkpoints of the compressed part refer to it. To resume from one of them, load the merged model, put the adapter
    of the checkpoint on it with ``PeftModel.from_pretrained(model, checkpoint, is_trainable=True)``, and give that to
    a trainer with the same callback.

    It takes as much memory as training at full size does. The trainer must make its optimizer itself. In several
    processes, each holds the whole model (`DistributedDataParallel`), and gives `calibrate` its share of the batches.

    Args:
        trainer: The trainer that gets this callback (``trainer.add_callback``).
        config: How to compress. `calibrate` sets its statistics.
        batches: For `calibrate`; they are read in mid-run, so an iterator that can be read once is not enough.
        after: Share of the steps that train at full size, in (0, 1).
        learning_rate: Peak of the schedule for all that trains in the compressed part. Default: that of the trainer.
        merged_model_dir: Where to save the merged model. It must not be there yet, or be empty, unless the run resumes
            where the model is compressed. Default: ``merged`` in the trainer's ``output_dir``, which replaces that of
            an earlier run.
        **calibration_options: Further arguments of `calibrate`, such as ``max_batches``.

    A `ValueError` or `TypeError` is raised before the first step for arguments out of range, a trainer or a model that
    this does not work with, and for layers that cannot be compressed.

    Example::

        trainer = Trainer(model=get_peft_model(model, HiraConfig(target_modules="all-linear")), args=args, ...)
        config = JactusConfig(target_modules="all-linear", retained_ratio=0.8)
        trainer.add_callback(CompressionCallback(trainer, config, train_loader, max_batches=16))
        trainer.train()
        export_compressed(trainer.model, "compressed")
    """

    def __init__(
        self,
        trainer: Trainer,
        config: JactusConfig,
        batches: Iterable[Batch],
        *,
        after: float = 0.8,
        learning_rate: float | None = None,
        merged_model_dir: str | os.PathLike[str] | None = None,
        **calibration_options: Any,
    ) -> None:
        if not 0 < after < 1:
            raise ValueError(f"`after` must be a share of the steps between 0 and 1; got {after}.")
        if learning_rate is not None and not 0 < learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be positive and finite; got {learning_rate}.")
        if isinstance(batches, Iterator):
            raise TypeError(
                "`batches` is an iterator that can be read once; a run that is resumed reads it again. Pass a "
                "DataLoader or a list."
            )
        given = inspect.signature(calibrate).bind(trainer.model, config, batches, **calibration_options)
        given.apply_defaults()
        options = given.arguments
        counts = {name: options[name] for name in ("max_batches", "save_every")}
        check_counts(options["head_warmup_steps"], batches, **counts)
        _check_trainer(trainer)
        self.trainer: Any = trainer  # whose model, optimizer and schedule are there in a run
        self.config = config
        self.batches = batches
        self.after = after
        self.learning_rate = learning_rate
        self.may_replace = merged_model_dir is None
        self.merged_model_dir = Path(merged_model_dir or Path(str(trainer.args.output_dir)) / "merged")
        self.calibration_options = calibration_options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check all that can be checked before the first step."""
        del control, kwargs
        if state.max_steps < 2:
            raise ValueError(f"The run has {state.max_steps} step; it needs one on each side of the compression.")
        is_compressed = _is_compressed(self.trainer.model)
        if state.global_step > self._first_step(state):  # a checkpoint of just that step is still at full size
            if not is_compressed:
                raise ValueError(
                    f"The run resumes at step {state.global_step}, where the model is compressed already, but the "
                    f"trainer's model is not. Load {self.merged_model_dir}, put the checkpoint on it with "
                    "`PeftModel.from_pretrained(model, checkpoint, is_trainable=True)`, and give the trainer that."
                )
            return
        if is_compressed:
            raise ValueError("`trainer.model` is compressed already; train it without this callback.")
        is_whole = isinstance(self.trainer.model_wrapped, DistributedDataParallel)
        if not is_whole and self.trainer.model_wrapped is not self.trainer.model:
            raise ValueError(
                "The model is sharded or compiled (FSDP, DeepSpeed, `torch_compile`, several devices in one process), "
                "and cannot be compressed in mid-run. Train the two parts one after the other, each with its own "
                "trainer."
            )
        depends_on_step_only = isinstance(self.trainer.lr_scheduler, torch.optim.lr_scheduler.LambdaLR)
        if not depends_on_step_only:
            raise ValueError(
                f"`lr_scheduler_type={args.lr_scheduler_type}` depends on more than the step, so that it cannot go on "
                "with another model. Use a schedule such as 'linear' or 'cosine'."
            )
        check_target(
            self.merged_model_dir,
            overwrite=self.may_replace,
            argument="`merged_model_dir`",
            overwriting="empty it",
            read={
                "the model that is trained": getattr(_base_of(self.trainer.model), "name_or_path", None),
                "`statistics_file`": self.calibration_options.get("statistics_file"),
            },
        )
        self._check_statistics_file(state)
        self._try_calibration()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compress the model if it is time."""
        del args, control, kwargs
        if state.global_step >= self._first_step(state) and not _is_compressed(self.trainer.model):
            self._compress(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take accelerate's mixed precision off the model inside, which it was put on before it was inside."""
        del args, control, kwargs
        if not _is_compressed(self.trainer.model):
            logger.warning(
                "The run ended after %d steps. The model is at full size: it was to be compressed after %d.",
                state.global_step,
                self._first_step(state),
            )
            return
        model = _base_of(self.trainer.model)
        # `Accelerator.unwrap_model` would take off transformers' own decorators as well.
        if (forward := vars(model).pop("_original_forward", None)) is not None:
            model.forward = forward

    def _first_step(self, state: TrainerState) -> int:
        """Return the number of steps before the model is compressed: at least one on each side."""
        return min(max(math.ceil(self.after * state.max_steps), 1), state.max_steps - 1)

    def _check_statistics_file(self, state: TrainerState) -> None:
        """Raise for a file of other weights. A run that resumes may have written it, while it compressed."""
        file = self.calibration_options.get("statistics_file")
        if file is None:
            return
        StatisticsStore(Path(file), {}, self.config.statistics_needs())  # raises for a directory
        if state.global_step == 0 and (left := remains_at(Path(file))):
            raise ValueError(
                f"`statistics_file` {left[0]} is there already, and of other weights than the first part will end "
                "with. Delete it, or give another file."
            )

    def _try_calibration(self) -> None:
        """Calibrate a copy, which shares all tensors, with one batch: what can fail fails before the first step."""
        model: Any = structural_copy(self.trainer.model)
        model = model.unload() if isinstance(model, PeftModel) else model
        options = self.calibration_options | {
            "max_batches": 1,
            "head_warmup_steps": 0,
            "statistics_file": None,
            "leave_unusable_dense": True,  # one batch need not reach all layers
            "progress_bar": False,
        }
        config = copy.deepcopy(self.config)
        if self.calibration_options.get("head_warmup_steps", 0) > 0:
            head_parameters(model, config)  # raises if there is none
        size = ModelSize.of(model, targeted_modules(model, config), config)
        budget_ratio(config, size)  # raises if it cannot be reached
        calibrate(model, config, self.batches, **options)

    def _compress(self, state: TrainerState) -> None:
        trainer = self.trainer
        averages = _averages_by_name(trainer)
        is_adapted = isinstance(trainer.model, PeftModel)
        model = trainer.model.merge_and_unload() if is_adapted else trainer.model
        try:
            self._save(model)
            targets = targeted_modules(model, self.config)
            averages = {name: found for name, found in averages.items() if name.rpartition(".")[0] not in targets}
            trainer.optimizer.state.clear()  # the rest is not needed any more: twice the size of what has trained
            calibrate(model, self.config, self.batches, **self.calibration_options)
            compressed = get_peft_model(model, self.config).train()
        except BaseException:
            if is_adapted:  # its adapter is merged: what is saved now must be the merged model
                _become_(trainer.model, model)
            raise
        # The loop goes on with the object that it has: the adapted model, or the one inside, whose layers are new; or
        # DistributedDataParallel around it.
        if is_adapted:
            _become_(trainer.model, compressed)
        else:
            trainer.model = compressed
        wrapped = self._renew_optimizer(averages)
        if isinstance(trainer.model_wrapped, DistributedDataParallel):
            _become_(trainer.model_wrapped, wrapped)
        else:
            trainer.model_wrapped = wrapped
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(trainer.callback_handler, name, getattr(trainer, name))
        # A checkpoint of before holds another kind of adapter, which could not be loaded at the end.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        logger.info("Step %d: compressed; the merged model is in %s.", state.global_step, self.merged_model_dir)

    def _save(self, model: Any) -> None:
        """Save the merged model, and note in it where."""
        if self.trainer.args.should_save:
            with appearing_whole(self.merged_model_dir) as folder:
                model.save_pretrained(folder)
                if self.trainer.processing_class is not None:
                    self.trainer.processing_class.save_pretrained(folder)
        model.name_or_path = str(self.merged_model_dir)  # where PEFT looks for what it writes to an adapter's config

    def _renew_optimizer(self, averages: dict[str, tuple[torch.Size, dict[str, Any]]]) -> nn.Module:
        """Give the trainer an optimizer and a schedule for the new model, which go on where the old ones are.

        Returns:
            The model, in what accelerate wraps it in for several processes.
        """
        trainer, args = self.trainer, self.trainer.args
        progress = trainer.lr_scheduler.state_dict()
        peak = args.learning_rate
        trainer.optimizer = trainer.lr_scheduler = None
        try:
            args.learning_rate = self.learning_rate or peak
            optimizer = trainer.create_optimizer()
        finally:
            args.learning_rate = peak
        for name, parameter in _trained(trainer.model).items():
            shape, entries = averages.get(name, (None, {}))
            if shape == parameter.shape:
                optimizer.state[parameter] = entries
        trainer.accelerator.free_memory()
        wrapped: nn.Module
        wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, optimizer)
        scheduler: Any = trainer.create_scheduler(num_training_steps=trainer.state.max_steps)
        rates = [
            base * factor(progress["last_epoch"])
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        own = {"base_lrs": scheduler.base_lrs, "lr_lambdas": [None] * len(rates), "_last_lr": rates}
        scheduler.load_state_dict(progress | own)
        for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return wrapped


def _check_trainer(trainer: Trainer) -> None:
    """Raise unless the model can be compressed in mid-run, and the optimizer made anew."""
    model: Any = trainer.model
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            "The trainer was given its `optimizers`, or has trained before, so that they cannot be made anew for the "
            "compressed model. Set them in `TrainingArguments`, or override `Trainer.create_optimizer`."
        )
    if trainer.args.auto_find_batch_size:
        raise ValueError("`auto_find_batch_size=True` may start the run again after the compression. Unset it.")
    if isinstance(model, PeftModel) and not isinstance(model.base_model, BaseTuner):
        raise TypeError(f"{type(model.base_model).__name__} cannot be merged (prompts); use LoRA or another adapter.")
    if not hasattr(_base_of(model), "save_pretrained"):
        raise TypeError(
            f"{type(_base_of(model)).__name__} has no `save_pretrained`, and adapters would refer to a merged model "
            "that is in no file. Use a model of transformers."
        )


def _become_(module: nn.Module, other: nn.Module) -> None:
    """Make a module another one, for all who hold it."""
    module.__class__ = type(other)
    vars(module).clear()
    vars(module).update(vars(other))


def _is_compressed(model: nn.Module | None) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.base_model, JactusModel)


def _base_of(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _trained(model: Any) -> dict[str, Tensor]:
    """Return what trains, by its name in a model without adapters."""
    return {
        _name_without_adapters(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _name_without_adapters(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def _averages_by_name(trainer: Any) -> dict[str, tuple[torch.Size, dict[str, Any]]]:
    """Return shape and optimizer state of all that trains, by its name in a model without adapters."""
    state = trainer.optimizer.state
    return {
        name: (parameter.shape, state[parameter])
        for name, parameter in _trained(trainer.model).items()
        if parameter in state
    }
