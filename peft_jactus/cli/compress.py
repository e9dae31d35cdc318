"""``peft-jactus compress``: from a pretrained model to a compressed checkpoint, without training."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import transformers
import typer
from peft import get_peft_model
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from peft_jactus.calibration import calibrate, memory_limit
from peft_jactus.cli.data import DataOptions, Task, make_batches, open_rows
from peft_jactus.cli.options import DeviceOption, DtypeOption, OverwriteOption, StorageOption, to_device, to_dtype
from peft_jactus.cli.hub import find_processor, model_class
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.deployment.export import check_target, export_compressed
from peft_jactus.tuner.targeting import HEAD_NAMES

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
# Stay dense, whatever the task.
_HEADS = rf"({'|'.join(sorted(set(itertools.chain.from_iterable(HEAD_NAMES.values()))))})(\..*)?"


@dataclass(frozen=True)
class Compression:
    """What to compress, and into what.

    Attributes:
        model: Directory or Hub name.
        output_dir: Where to write the checkpoint.
        config: How to compress.
        data: What to calibrate on; ``None`` for a data-free decomposition.
        task: What the model does. Default: what its architecture says.
        max_batches: To calibrate on.
        max_statistics_memory: As `calibrate` takes it.
        gradient_checkpointing: Recompute activations in the backward pass of the calibration instead of keeping them.
        dtype: Of the checkpoint. Default: the model's.
        device: Where to compute. Default: a GPU if there is one.
        overwrite: Replace what is in ``output_dir``.
    """

    model: str
    output_dir: Path
    config: JactusConfig
    data: DataOptions | None
    task: Task | None = None
    max_batches: int = 16
    max_statistics_memory: str | None = None
    gradient_checkpointing: bool = False
    dtype: torch.dtype | None = None
    device: str | None = None
    overwrite: bool = False

    def run(self) -> Path:
        """Check, calibrate, factorise and write.

        Returns:
            The directory.

        Raises:
            ValueError: If anything of this cannot be done; what costs nothing is checked first.
        """
        check_target(self.output_dir, overwrite=self.overwrite)
        memory_limit(self.max_statistics_memory)
        device = to_device(self.device)
        model_config = AutoConfig.from_pretrained(self.model)
        if getattr(model_config, "quantization_config", None):
            raise ValueError(f"{self.model} is quantised or compressed already; give the model that it was made from.")
        processor = find_processor(self.model)
        batches = None if self.data is None else self._batches(self.data, model_config, processor)
        model = load_pretrained(model_config, self.task).to(device)  # type: ignore[arg-type]  # its signature
        config = self._config_for(model)
        if self.gradient_checkpointing:
            # Its name since transformers 5.23.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if batches is not None:
            on_device = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)
            calibrate(
                model,
                config,
                on_device,
                max_batches=self.max_batches,
                max_statistics_memory=self.max_statistics_memory,
            )
        return export_compressed(
            get_peft_model(model, config),
            self.output_dir,
            dtype=self.dtype,
            processor=processor,
            datasets=None if self.data is None else self.data.dataset,
            overwrite=self.overwrite,
        )

    def _batches(self, data: DataOptions, model_config: PreTrainedConfig, processor: Any) -> Iterable[dict[str, Any]]:
        task = self.task or find_task(model_config)
        data.check(task)
        if processor is None:
            raise ValueError(f"{self.model} has no tokenizer or processor, which calibration needs.")
        return make_batches(open_rows(data, task), task, data, model_config, processor)

    def _config_for(self, model: PreTrainedModel) -> JactusConfig:
        """Return the config; under 'all-linear', it leaves out the head of this model if it has one."""
        if self.config.target_modules != _ALL_LINEAR:
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
        "--task if it is one of these, or use `peft_jactus.calibrate` with batches and a loss of your own."
    )


def load_pretrained(config: PreTrainedConfig, task: Task | None) -> PreTrainedModel:
    """Load a model with all its weights.

    Args:
        config: Of the model.
        task: What the model is to do. Default: what it was saved for.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If the checkpoint lacks some, such as the head for the task: nothing would ever train it.
    """
    cls: Any = model_class(config) if task is None else getattr(transformers, _CLASS_BY_TASK[task])
    name = config.name_or_path
    model, report = cls.from_pretrained(name, dtype="auto", output_loading_info=True)
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(
            f"{name} has no weights for {sorted(report['missing_keys'])[:5]}, which {type(model).__name__} has. "
            "Fine-tune it first (or while compressing: see the README), or give another --task."
        )
    return cast("PreTrainedModel", model.eval())


def _checked(data: DataOptions, *, data_free: bool) -> DataOptions | None:
    """Return ``None`` for a data-free decomposition; a `ValueError` says if data are given nevertheless."""
    if data_free and (data.dataset is not None or data.data_dir is not None):
        raise ValueError("--data-free excludes --dataset and --data-dir.")
    return None if data_free else data


def compress(
    model: Annotated[str, typer.Argument(help="A pretrained, fine-tuned model: a directory or Hub name.")],
    output_dir: Annotated[Path, typer.Argument(help="Where to write the compressed checkpoint.")],
    retained_ratio: Annotated[
        float, typer.Option(help="Share of the targeted layers' parameters to keep, in (0, 1].")
    ] = 0.8,
    dataset: Annotated[str | None, typer.Option(help="Hub name of the data to calibrate on.")] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Its configuration, if it has several.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Directory of parquet files to calibrate on.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data.")] = "train",
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Truncated SVD without data: much less accurate.")
    ] = False,
    text_column: Annotated[
        list[str] | None, typer.Option(help="Column of the texts; give it twice for pairs. [default: text]")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of the images.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column of the classes. Causal LMs need none.")] = "label",
    task: Annotated[Task | None, typer.Option(help="Default: what the model's architecture says.")] = None,
    max_batches: Annotated[int, typer.Option(help="Batches to calibrate on.", min=1)] = 16,
    max_statistics_memory: Annotated[
        str | None,
        typer.Option(help="For instance 8GiB: calibrate a part of the layers at a time. Default: all at once."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Calibrate in less memory, with another forward pass.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Rows, or blocks of tokens, of a batch.", min=1)] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a row. Default: 512, or what the model can take.", min=2)
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help="'all-linear', or names of layers, with commas between them.")
    ] = _ALL_LINEAR,
    storage: StorageOption = None,
    allocation: Annotated[
        Literal["global", "uniform"], typer.Option(help="Ranks by what they bring, or the same ratio for every layer.")
    ] = "global",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compress a model without training: calibrate on a few batches, factorise, write the checkpoint.

    Training while compressing (`get_peft_model` and a Trainer) gives a better model at the same size.
    """
    data = DataOptions(
        dataset=dataset,
        dataset_config=dataset_config,
        data_dir=data_dir,
        split=split,
        text_columns=tuple(text_column or ["text"]),
        image_column=image_column,
        label_column=label_column,
        batch_size=batch_size,
        max_length=max_length,
    )
    config = JactusConfig(
        target_modules=target_modules if target_modules == _ALL_LINEAR else target_modules.split(","),
        retained_ratio=retained_ratio,
        allocation=allocation,
        storage=storage or JactusConfig.storage,
        decomposition="svd" if data_free else "jactus",
    )
    compression = Compression(
        model=model,
        output_dir=output_dir,
        config=config,
        data=_checked(data, data_free=data_free),
        task=task,
        max_batches=max_batches,
        max_statistics_memory=max_statistics_memory,
        gradient_checkpointing=gradient_checkpointing,
        dtype=to_dtype(dtype),
        device=device,
        overwrite=overwrite,
    )
    compression.run()
    typer.echo(f"Written to {output_dir}; look at it with `peft-jactus inspect {output_dir}`.")
