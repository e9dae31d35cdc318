"""``peft-jactus compress``: from a pretrained model to a compressed checkpoint, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import get_peft_model

from peft_jactus.cli.options import check_output_dir
from peft_jactus.deployment.export import export_compressed
from peft_jactus.deployment.quantization import check_bits

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from peft_jactus.cli.calibration import Calibration


def compress_model(
    calibration: Calibration, output_dir: Path, *, dtype: torch.dtype | None, bits: int | None, overwrite: bool
) -> Path:
    """Calibrate, factorise and write.

    Args:
        calibration: Of which model, and how.
        output_dir: Where to write the checkpoint.
        dtype: Of the checkpoint. Default: the model's.
        bits: As for `export_compressed`.
        overwrite: Replace what is in ``output_dir``.

    Returns:
        The directory. A `ValueError` says if anything of this cannot be done; what costs nothing is checked first.
    """
    data = calibration.data
    options = {} if data is None else {"--data-dir": data.data_dir, "--dataset": data.dataset}
    check_output_dir(output_dir, overwrite=overwrite, read={"MODEL": calibration.model, **options})
    check_bits(bits)
    calibrated = calibration.run()
    statistics = calibrated.config.statistics  # `get_peft_model` lets go of them
    return export_compressed(
        get_peft_model(calibrated.model, calibrated.config),
        output_dir,
        dtype=dtype,
        bits=bits,
        statistics=statistics,
        processor=calibrated.processor,
        datasets=None if data is None else data.dataset,
        overwrite=overwrite,
    )
