"""From the name of a pretrained model to that model, calibrated: what `compress` and `plan` begin with."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from peft_jactus.calibration import calibrate
from peft_jactus.calibration.memory_groups import parse_memory_limit
from peft_jactus.cli.data import DataOptions, Task, make_batches, open_rows
from peft_jactus.cli.hub import find_processor, gguf_place, is_gguf, load_model_config, model_class
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.tuner.config_checks import targets_all_linear
from peft_jactus.tuner.target_checks import describe_unmatched, unmatched_names
from peft_jactus.tuner.targeting import HEAD_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from peft_jactus.numerics.allocation import Storage

_CLASS_BY_TASK: dict[str, Any] = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
_TASK_BY_ENDING: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForImageClassification": "image-classification",
}
_ALL_LINEAR = "all-linear"
# What a list of names consists of; a regular expression has other characters.
_NAMES = re.compile(r"[\w.\-\s,]*")
# Options of a calibration: their names in `DataOptions` or `Calibration`, and their defaults.
_CALIBRATION_OPTIONS: dict[str, tuple[str, object]] = {
    "--dataset": ("dataset", None),
    "--data-dir": ("data_dir", None),
    "--dataset-config": ("dataset_config", None),
    "--split": ("split", "train"),
    "--text-column": ("text_columns", ("text",)),
    "--image-column": ("image_column", "image"),
    "--label-column": ("label_column", "label"),
    "--batch-size": ("batch_size", 8),
    "--max-length": ("max_length", None),
    "--max-batches": ("max_batches", 16),
    "--max-statistics-memory": ("max_statistics_memory", None),
    "--gradient-checkpointing": ("gradient_checkpointing", False),
}
# Stay dense, whatever the task.
_HEADS = rf"({'|'.join(sorted(set(itertools.chain.from_iterable(HEAD_NAMES.values()))))})(\..*)?"


@dataclass(frozen=True)
class Calibrated:
    """A model that can be planned for, or compressed.

    Attributes:
        model: On its device.
        config: With statistics, unless the decomposition needs no data.
        processor: Tokenizer, image processor or processor of the model; ``None`` if it has none.
    """

    model: PreTrainedModel
    config: JactusConfig
    processor: Any | None


@dataclass(frozen=True)
class Calibration:
    """Which model, how it is to be compressed, and what to calibrate it on.

    Attributes:
        model: Directory, Hub name or GGUF file.
        config: How to compress.
        data: What to calibrate on; ``None`` for a data-free decomposition.
        task: What the model does. Default: what its architecture says.
        max_batches: To calibrate on.
        max_statistics_memory: As `calibrate` takes it.
        gradient_checkpointing: Recompute activations in the backward pass of the calibration instead of keeping them.
        device: Where to compute.
    """

    model: str
    config: JactusConfig
    data: DataOptions | None
    task: Task | None
    max_batches: int
    max_statistics_memory: str | None
    gradient_checkpointing: bool
    device: torch.device

    def run(self) -> Calibrated:
        """Check, load and calibrate; what costs nothing is checked first.

        Returns:
            The model and its config.

        Raises:
            ValueError: If anything of this cannot be done.
        """
        parse_memory_limit(self.max_statistics_memory)
        model_config = load_model_config(self.model)
        if getattr(model_config, "quantization_config", None):
            raise ValueError(f"{self.model} is already quantised or compressed; give the model that it was made from.")
        processor = find_processor(self.model)
        batches = None if self.data is None else self._batches(self.data, model_config, processor)
        model = load_pretrained(self.model, model_config, self.task).to(self.device)  # type: ignore[arg-type]  # mypy: `to` is wrapped
        config = self._config_for(model)
        if self.gradient_checkpointing:
            # Its name since transformers 5.23.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if batches is not None:
            on_device = ({name: tensor.to(self.device) for name, tensor in batch.items()} for batch in batches)
            calibrate(
                model,
                config,
                on_device,
                max_batches=self.max_batches,
                max_statistics_memory=self.max_statistics_memory,
            )
        return Calibrated(model, config, processor)

    def _batches(self, data: DataOptions, model_config: PreTrainedConfig, processor: Any) -> Iterable[dict[str, Any]]:
        task = self.task or find_task(model_config)
        data.check(task)
        if processor is None:
            raise ValueError(f"{self.model} has no tokenizer or processor, which calibration needs.")
        return make_batches(open_rows(data, task), task, data, model_config, processor)

    def _config_for(self, model: PreTrainedModel) -> JactusConfig:
        """Return the config; under 'all-linear', it leaves out the head of this model if it has one.

        Raises:
            ValueError: If a name, or a regular expression, matches no module.
        """
        targets = self.config.target_modules
        if targets != _ALL_LINEAR:
            if isinstance(targets, str):
                _check_matches(targets, model)
            elif unmatched := unmatched_names(model, targets or ()):
                raise ValueError(
                    f"--target-modules: {type(model).__name__} has no modules with these names: "
                    f"{describe_unmatched(unmatched)}. Correct them, or leave them out."
                )
            return self.config
        has_head = any(re.fullmatch(_HEADS, name) for name, _ in model.named_modules())
        return replace(self.config, exclude_modules=_HEADS) if has_head else self.config


def find_task(config: PreTrainedConfig) -> Task:
    """Return what a model does, by its architecture.

    Raises:
        ValueError: If it does something else than this command knows.
    """
    for architecture in config.architectures or []:
        for ending, task in _TASK_BY_ENDING.items():
            if architecture.endswith(ending):
                return task
    raise ValueError(
        f"{config.name_or_path} is a {config.architectures}; this command compresses {sorted(_CLASS_BY_TASK)}. Give "
        "--task if it is one of these, or use `peft_jactus.calibrate` with your own batches and loss."
    )


def load_pretrained(name: str, config: PreTrainedConfig, task: Task | None) -> PreTrainedModel:
    """Load a model with all its weights.

    Args:
        name: Directory, Hub name or GGUF file.
        config: Of the model.
        task: What the model is to do. Default: what it was saved for.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If the checkpoint lacks some, such as the head for the task: nothing would ever train it.
    """
    cls: Any = model_class(config) if task is None else getattr(transformers, _CLASS_BY_TASK[task])
    place = gguf_place(name) if is_gguf(name) else {"pretrained_model_name_or_path": name}
    model, report = cls.from_pretrained(**place, dtype="auto", output_loading_info=True)
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(
            f"{name} has no weights for {sorted(report['missing_keys'])[:5]}, which {type(model).__name__} has. "
            "Fine-tune it first, or while you compress it (`JactusConfig` and a Trainer), or give another --task."
        )
    return cast("PreTrainedModel", model.eval())


def calibration_from(
    model: str,
    *,
    budget: tuple[float | None, float | None, str | None],
    data: DataOptions,
    data_free: bool,
    target_modules: str,
    storage: Storage | None,
    allocation: Literal["global", "uniform"],
    **options: Any,
) -> Calibration:
    """Return the calibration that the options of a command describe.

    Args:
        model: Directory or Hub name.
        budget: ``retained_ratio``, ``model_ratio`` and ``max_model_size`` of the config, as far as they are given.
        data: What to calibrate on.
        data_free: Decompose without data.
        target_modules: ``"all-linear"``, names with commas between them, or one regular expression.
        storage: As in the config. Default: its own.
        allocation: As in the config.
        **options: Other fields of `Calibration`.

    Raises:
        ValueError: If options contradict each other.
    """
    given = {**vars(data), **options}
    defaults = _CALIBRATION_OPTIONS.items()
    excluded = [option for option, (name, default) in defaults if given.get(name, default) != default]
    if data_free and excluded:
        raise ValueError(f"--data-free excludes {', '.join(excluded)}: nothing is calibrated.")
    if sum(value is not None for value in budget) > 1:
        raise ValueError("Give one of --retained-ratio, --model-ratio and --max-size.")
    retained_ratio, model_ratio, max_size = budget
    config = JactusConfig(
        target_modules=_targets_from(target_modules),
        retained_ratio=JactusConfig.retained_ratio if retained_ratio is None else retained_ratio,
        model_ratio=model_ratio,
        max_model_size=max_size,
        allocation=allocation,
        storage=storage or JactusConfig.storage,
        decomposition="svd" if data_free else "jactus",
        adaptation_rank=0,  # nothing trains afterwards
    )
    return Calibration(model, config, None if data_free else data, **options)


def _check_matches(expression: str, model: PreTrainedModel) -> None:
    """Raise `ValueError` if no module's name matches a regular expression as a whole, as PEFT asks for."""
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(f"--target-modules: {expression!r} is not a regular expression: {error}.") from error
    if not any(pattern.fullmatch(name) for name, _ in model.named_modules()):
        raise ValueError(
            f"--target-modules: the regular expression {expression!r} matches no whole name of a module of "
            f"{type(model).__name__}. For the ends of names, begin it with '.*'."
        )


def _targets_from(option: str) -> str | list[str]:
    if not _NAMES.fullmatch(option):
        return option.strip()
    names = [name for part in option.split(",") if (name := part.strip())]
    if not names:
        raise ValueError(f"--target-modules names nothing; give names with commas between them, or {_ALL_LINEAR}.")
    return _ALL_LINEAR if len(names) == 1 and targets_all_linear(names[0]) else names
