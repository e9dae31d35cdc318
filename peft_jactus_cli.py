"""The command ``peft-jactus``: its options, and nothing that takes long to import.

This module is beside the package and not in it, because importing `peft_jactus` imports PyTorch, transformers and
PEFT, which takes seconds: too long for ``--help``. Each command imports what it needs from `peft_jactus.cli`, calls
it, and prints. There is no ``from __future__ import annotations`` here: typer reads the annotations of parameters.
"""

import ast
import logging
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

# PEFT imports these where they are installed, and they tell everybody of kernels that this machine has no use for.
_NOISY_LOGGERS = ("torchao", "bitsandbytes", "torch.utils._pytree")
# Raised for wrong arguments, missing files, models that cannot be compressed; by this package, PEFT and transformers.
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError)

Storage = Literal["pivoted", "factored"]
DtypeName = Literal["float32", "bfloat16", "float16"]
Task = Literal["causal-lm", "sequence-classification", "image-classification"]


def _help_of_fields() -> dict[str, str]:
    """Return what `JactusConfig` says of its fields, from its source, since importing it takes seconds."""
    source = Path(__file__).with_name("peft_jactus") / "tuner" / "config.py"
    texts: dict[str, str] = {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            settings = {keyword.arg: keyword.value for keyword in node.value.keywords}
            if "metadata" in settings:
                texts[ast.unparse(node.target)] = ast.literal_eval(settings["metadata"])["help"]
    return texts


_HELP = _help_of_fields()


def _field(name: str, default: str = "") -> str:
    """Return the help of a field for its option, whose default may be another one."""
    text = _HELP[name].partition(" Default: ")[0]
    return f"{text} {default}".replace("`retained_ratio`", "--retained-ratio").strip()


ModelArgument = Annotated[
    str, typer.Argument(help="A pretrained, fine-tuned model: a directory, Hub name or GGUF file.")
]
OutputArgument = Annotated[Path, typer.Argument(help="Where to write the compressed checkpoint.")]
RatioOption = Annotated[float | None, typer.Option(help=_field("retained_ratio", "Default: 0.8."))]
ModelRatioOption = Annotated[float | None, typer.Option(help=_field("model_ratio"))]
MaxSizeOption = Annotated[str | None, typer.Option(help=_field("max_model_size"))]
DatasetOption = Annotated[str | None, typer.Option(help="Hub name of the data to calibrate on.")]
DatasetConfigOption = Annotated[str | None, typer.Option(help="Configuration of the data set, if it has several.")]
DataDirOption = Annotated[Path | None, typer.Option(help="Directory of parquet files to calibrate on.")]
SplitOption = Annotated[str, typer.Option(help="Split of the data.")]
DataFreeOption = Annotated[bool, typer.Option("--data-free", help="Use no data: truncated SVD, much less accurate.")]
TextColumnOption = Annotated[
    list[str] | None, typer.Option(help="Column of the texts; give it twice for pairs. Default: text.")
]
ImageColumnOption = Annotated[str, typer.Option(help="Column of the images.")]
LabelColumnOption = Annotated[str, typer.Option(help="Column of the classes. Causal LMs need none.")]
TaskOption = Annotated[Task | None, typer.Option(help="Task of the model. Default: the task of its architecture.")]
MaxBatchesOption = Annotated[int, typer.Option(help="Batches to calibrate on.", min=1)]
StatisticsMemoryOption = Annotated[
    str | None, typer.Option(help="Memory limit, such as 8GiB: calibrate some layers at a time. Default: all at once.")
]
CheckpointingOption = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Calibrate with less memory, for one more forward pass.")
]
BatchSizeOption = Annotated[int, typer.Option(help="Rows, or blocks of tokens, per batch.", min=1)]
MaxLengthOption = Annotated[
    int | None, typer.Option(help="Tokens per row. Default: 512, or the model's maximum if that is less.", min=2)
]
TargetModulesOption = Annotated[str, typer.Option(help=_field("target_modules", "Put commas between names."))]
StorageOption = Annotated[
    Storage | None, typer.Option(help=_field("storage", "Default: the form that the budget is counted in."))
]
AllocationOption = Annotated[Literal["global", "uniform"], typer.Option(help=_field("allocation"))]
DtypeOption = Annotated[DtypeName | None, typer.Option(help="Dtype of the checkpoint. Default: the model's.")]
BitsOption = Annotated[
    int | None, typer.Option(help="8 or 4: bits per number of the compressed layers. 4 bits need bitsandbytes.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Device to compute on, e.g. cuda:1. Default: a GPU if there is one.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is in OUTPUT_DIR.")]


class _Group(TyperGroup):
    """Shows an expected error as its message."""

    def invoke(self, ctx: Any) -> Any:
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 by an old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, BrokenPipeError):  # for typer itself
                raise
            except _EXPECTED as error:
                if ctx.params["traceback"]:
                    raise
                typer.secho(f"Error: {error}", fg="red", err=True)
                raise typer.Exit(1) from error


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-jactus {installed_version('peft-jactus')}")
        raise typer.Exit


@app.callback()
def main(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compress transformers and inspect the result."""
    del traceback, version  # read by the group and by the callback


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(help="An adapter or a compressed checkpoint: a directory or Hub name.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a whole compressed checkpoint and compare it with its digests.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write the plot of the ranks to this file, e.g. ranks.png.", dir_okay=False)
    ] = None,
) -> None:
    """Show the ranks, the origin and the size of an adapter or a compressed checkpoint.

    Reads only the headers of weight files, unless --verify is given.
    """
    from peft_jactus.cli.hub import local_folder
    from peft_jactus.cli.inspect import inspect_folder, verify_contents
    from peft_jactus.cli.options import check_plot_file
    from peft_jactus.deployment.plots import plot_ranks

    check_plot_file(plot)
    inspection = inspect_folder(local_folder(directory))
    typer.echo(inspection)
    if plot is not None:
        plot_ranks(inspection.summary).savefig(plot, dpi=120)
        typer.echo(f"Plotted to {plot}.")
    if verify:
        verify_contents(inspection)
        typer.echo("All tensors are what was saved.")


@app.command()
def export(
    adapter_dir: Annotated[
        str, typer.Argument(help="An adapter, or with --dense also a compressed checkpoint: a directory or Hub name.")
    ],
    output_dir: OutputArgument,
    base_model: Annotated[
        str | None,
        typer.Option(help="Directory or Hub name of the base model. Default: the one in the adapter's config."),
    ] = None,
    dense: Annotated[
        bool,
        typer.Option(
            "--dense", help="Write plain layers, at the base model's size: for lm_eval, vLLM and other tools."
        ),
    ] = False,
    storage: StorageOption = None,
    dtype: DtypeOption = None,
    bits: BitsOption = None,
    statistics: Annotated[
        Path | None, typer.Option(help="The `statistics_file` of the calibration, for --bits.", dir_okay=False)
    ] = None,
    overwrite: OverwriteOption = False,
    push_to_hub: Annotated[bool, typer.Option("--push-to-hub", help="Also upload the checkpoint.")] = False,
    repo_id: Annotated[
        str | None, typer.Option(help="Repository to upload to, user/name. Default: the name of OUTPUT_DIR.")
    ] = None,
) -> None:
    """Write a trained adapter as a compressed checkpoint, which loads without the base model.

    The tokenizer or processor of the adapter, or else of the base model, is copied too.
    """
    from peft_jactus.cli.export import check_dense_options, export_adapter, export_dense
    from peft_jactus.cli.options import to_dtype

    if dense:
        check_dense_options(storage, bits, statistics, push_to_hub, repo_id)
        export_dense(adapter_dir, output_dir, base_model=base_model, dtype=to_dtype(dtype), overwrite=overwrite)
        typer.echo(f"Written to {output_dir}, with plain layers.")
        return
    export_adapter(
        adapter_dir,
        output_dir,
        base_model=base_model,
        storage=storage,
        dtype=to_dtype(dtype),
        bits=bits,
        statistics=statistics,
        overwrite=overwrite,
        push_to_hub=push_to_hub,
        repo_id=repo_id,
    )
    typer.echo(_written(output_dir))


@app.command()
def compress(
    model: ModelArgument,
    output_dir: OutputArgument,
    retained_ratio: RatioOption = None,
    model_ratio: ModelRatioOption = None,
    max_size: MaxSizeOption = None,
    dataset: DatasetOption = None,
    dataset_config: DatasetConfigOption = None,
    data_dir: DataDirOption = None,
    split: SplitOption = "train",
    data_free: DataFreeOption = False,
    text_column: TextColumnOption = None,
    image_column: ImageColumnOption = "image",
    label_column: LabelColumnOption = "label",
    task: TaskOption = None,
    max_batches: MaxBatchesOption = 16,
    max_statistics_memory: StatisticsMemoryOption = None,
    gradient_checkpointing: CheckpointingOption = False,
    batch_size: BatchSizeOption = 8,
    max_length: MaxLengthOption = None,
    target_modules: TargetModulesOption = "all-linear",
    storage: StorageOption = None,
    allocation: AllocationOption = "global",
    dtype: DtypeOption = None,
    bits: BitsOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compress a model without training: calibrate on a few batches, factorise, write the checkpoint.

    Compressing and training together (`get_peft_model` and a Trainer) gives a better model at the same size.
    """
    from peft_jactus.cli.calibration import calibration_from
    from peft_jactus.cli.compress import compress_model
    from peft_jactus.cli.data import DataOptions
    from peft_jactus.cli.options import to_device, to_dtype

    calibration = calibration_from(
        model,
        budget=(retained_ratio, model_ratio, max_size),
        data=DataOptions(
            dataset=dataset,
            dataset_config=dataset_config,
            data_dir=data_dir,
            split=split,
            text_columns=tuple(text_column or ["text"]),
            image_column=image_column,
            label_column=label_column,
            batch_size=batch_size,
            max_length=max_length,
        ),
        data_free=data_free,
        target_modules=target_modules,
        storage=storage,
        allocation=allocation,
        task=task,
        max_batches=max_batches,
        max_statistics_memory=max_statistics_memory,
        gradient_checkpointing=gradient_checkpointing,
        device=to_device(device),
    )
    compress_model(calibration, output_dir, dtype=to_dtype(dtype), bits=bits, overwrite=overwrite)
    typer.echo(_written(output_dir))


@app.command()
def plan(
    model: ModelArgument,
    retained_ratio: RatioOption = None,
    model_ratio: ModelRatioOption = None,
    max_size: MaxSizeOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the curve over all ratios to this file, e.g. plan.png.", dir_okay=False)
    ] = None,
    dataset: DatasetOption = None,
    dataset_config: DatasetConfigOption = None,
    data_dir: DataDirOption = None,
    split: SplitOption = "train",
    data_free: DataFreeOption = False,
    text_column: TextColumnOption = None,
    image_column: ImageColumnOption = "image",
    label_column: LabelColumnOption = "label",
    task: TaskOption = None,
    max_batches: MaxBatchesOption = 16,
    max_statistics_memory: StatisticsMemoryOption = None,
    gradient_checkpointing: CheckpointingOption = False,
    batch_size: BatchSizeOption = 8,
    max_length: MaxLengthOption = None,
    target_modules: TargetModulesOption = "all-linear",
    storage: StorageOption = None,
    allocation: AllocationOption = "global",
    device: DeviceOption = None,
) -> None:
    """Show what compression would give, before you do it: ranks, sizes, and the expected rise of the loss.

    The table at the end compares several ratios; --plot draws it.
    """
    from peft_jactus.cli.calibration import calibration_from
    from peft_jactus.cli.data import DataOptions
    from peft_jactus.cli.options import to_device
    from peft_jactus.cli.plan import curve_table, plan_model
    from peft_jactus.deployment.plots import plot_plan

    calibration = calibration_from(
        model,
        budget=(retained_ratio, model_ratio, max_size),
        data=DataOptions(
            dataset=dataset,
            dataset_config=dataset_config,
            data_dir=data_dir,
            split=split,
            text_columns=tuple(text_column or ["text"]),
            image_column=image_column,
            label_column=label_column,
            batch_size=batch_size,
            max_length=max_length,
        ),
        data_free=data_free,
        target_modules=target_modules,
        storage=storage,
        allocation=allocation,
        task=task,
        max_batches=max_batches,
        max_statistics_memory=max_statistics_memory,
        gradient_checkpointing=gradient_checkpointing,
        device=to_device(device),
    )
    planned = plan_model(calibration, plot)
    typer.echo(f"{planned}\n\n{curve_table(planned)}")
    if plot is not None:
        plot_plan(planned).savefig(plot, dpi=120)
        typer.echo(f"Plotted to {plot}.")


@app.command()
def bench(
    directory: Annotated[str, typer.Argument(help="A compressed checkpoint: a directory or Hub name.")],
    dense: Annotated[
        str | None,
        typer.Option(help="The dense model: a directory or Hub name. Default: the checkpoint's weights made dense."),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(help="Sequences per batch; can be given several times. Default: 1 and 32.", min=1),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.", min=1)] = 128,
    device: DeviceOption = None,
    threads: Annotated[int, typer.Option(help="Threads of torch, on a CPU.", min=1)] = 1,
    repeats: Annotated[
        int, typer.Option(help="Measurements of each model; the fastest and the median are used.", min=1)
    ] = 7,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all figures to this file.", dir_okay=False)
    ] = None,
) -> None:
    """Compare the times of a compressed and a dense model, in one process, in turns.

    On a CPU with one thread, the thread's processor time is measured; with several, the wall clock; on a GPU, CUDA
    events.
    """
    from peft_jactus.cli.bench import compare_models
    from peft_jactus.cli.options import check_output_file, to_device

    check_output_file(json_file, "--json")
    comparison = compare_models(
        directory,
        dense,
        device=to_device(device),
        batch_sizes=batch_size or [1, 32],
        sequence_length=sequence_length,
        num_repeats=repeats,
        num_threads=threads,
    )
    typer.echo(", ".join(f"{label} {value}" for label, value in comparison.machine.items()))
    typer.echo(comparison)
    if json_file is not None:
        json_file.write_text(comparison.to_json() + "\n", encoding="utf-8")
        typer.echo(f"Written to {json_file}.")


def _written(output_dir: Path) -> str:
    return f"Written to {output_dir}; look at it with `peft-jactus inspect {output_dir}`."
