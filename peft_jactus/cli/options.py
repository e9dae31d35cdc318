"""Options that several commands have."""

from typing import Annotated, Literal

import torch
import typer

DtypeName = Literal["float32", "bfloat16", "float16"]

StorageOption = Annotated[
    Literal["pivoted", "factored"] | None,
    typer.Option(
        help="'pivoted' stores rank * (out + in - rank) numbers a layer, 'factored' rank * (out + in). Default: "
        "the form that the budget was reckoned in."
    ),
]
DtypeOption = Annotated[DtypeName | None, typer.Option(help="Of the checkpoint. Default: the model's.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where to compute, e.g. cuda:1. Default: a GPU if there is one.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is in OUTPUT_DIR.")]


def to_dtype(name: DtypeName | None) -> torch.dtype | None:
    """Return the dtype of a name."""
    return None if name is None else getattr(torch, name)


def to_device(name: str | None) -> torch.device:
    """Return a device that is there.

    Raises:
        ValueError: If it is not.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter, where torch has no CUDA
        raise ValueError(f"--device {name} cannot be used: {error}") from error
    return device
