"""``peft-jactus export``: from an adapter on disk to a compressed checkpoint, and from either to plain layers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from peft_jactus.calibration.statistics import CalibrationStatistics
from peft_jactus.cli.heads import load_base
from peft_jactus.cli.hub import (
    find_processor,
    load_adapter_config,
    load_model_config,
    local_folder,
    model_class,
    read_adapter_shapes,
)
from peft_jactus.cli.options import check_output_dir
from peft_jactus.deployment.arguments import check_repo_id
from peft_jactus.deployment.atomic_folder import appearing_whole
from peft_jactus.deployment.config import is_compression, is_export
from peft_jactus.deployment.export import compressed_copy, export_compressed
from peft_jactus.deployment.quantization import check_bits
from peft_jactus.deployment.quantizer import loading_options
from peft_jactus.numerics.allocation import Storage
from peft_jactus.tuner.config import JactusConfig

_CLASS_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

# What sentence-transformers lists its modules in.
_PIPELINE_FILE = "modules.json"
# What a dense checkpoint has of its own, or not at all.
_NOT_COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json", "README.md", "ranks.png")


def load_adapter(folder: Path, base_model: str | None = None) -> PeftModel:
    """Load an adapter onto its base model; a `ValueError` says if it is none, or the base model is not known.

    Args:
        folder: The adapter.
        base_model: Directory or Hub name. Default: what the adapter's config says.

    Returns:
        The model, in the base model's dtype.
    """
    config = read_adapter_config(folder, base_model)
    base = load_base(_base_class(config), config, read_adapter_shapes(folder))
    return PeftModel.from_pretrained(base, str(folder), config=config)


def read_adapter_config(folder: Path, base_model: str | None = None) -> JactusConfig:
    """Return the config of an adapter, with the base model to load.

    Raises:
        ValueError: If this is no JACTUS adapter, or the base model is not known.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is not an adapter: it has no adapter_config.json.")
    if (folder / _PIPELINE_FILE).is_file():  # its other modules would be lost
        raise ValueError(
            f"{folder} is a model of sentence-transformers. Load it with `SentenceTransformer({str(folder)!r})`, and "
            "give the model to `export_compressed`."
        )
    config = load_adapter_config(folder)
    config.base_model_name_or_path = base_model or config.base_model_name_or_path
    if not config.base_model_name_or_path:
        raise ValueError("The adapter's config does not say what its base model is; give --base-model.")
    config.inference_mode = True
    return config


def _read_by(folder: Path, config: JactusConfig) -> dict[str, str | Path | None]:
    """Return what loading an adapter reads, by what an error calls it."""
    base = config.base_model_name_or_path
    return {"ADAPTER_DIR": folder, "the adapter's base model": None if not base or is_export(Path(base)) else base}


def _base_class(config: JactusConfig) -> Any:
    if config.task_type is not None:
        return getattr(transformers, _CLASS_BY_TASK[str(config.task_type)])
    name = (config.auto_mapping or {}).get("base_model_class")
    return model_class(load_model_config(str(config.base_model_name_or_path)), name)


def _check_upload(push_to_hub: bool, repo_id: str | None, output_dir: Path) -> None:
    """Raise `ValueError` for a repository to which nothing would, or could, be uploaded."""
    if repo_id is not None and not push_to_hub:
        raise ValueError("--repo-id is only for uploads; also give --push-to-hub.")
    if push_to_hub:
        check_repo_id(repo_id, output_dir, "--repo-id")


def export_adapter(
    adapter_dir: str,
    output_dir: Path,
    *,
    base_model: str | None,
    storage: Storage | None,
    dtype: torch.dtype | None,
    bits: int | None,
    statistics: Path | None,
    overwrite: bool,
    push_to_hub: bool,
    repo_id: str | None,
) -> None:
    """Load an adapter from a directory or the Hub and write it as a compressed checkpoint, see `export_compressed`."""
    options = {"ADAPTER_DIR": adapter_dir, "--base-model": base_model, "--statistics": statistics}
    check_output_dir(output_dir, overwrite=overwrite, read=options)
    _check_upload(push_to_hub, repo_id, output_dir)
    check_bits(bits)
    if statistics is not None and bits is None:
        raise ValueError("--statistics is only for --bits; leave it out, or also give --bits.")
    loaded = None if statistics is None else CalibrationStatistics.load(statistics)
    folder = local_folder(adapter_dir)
    config = read_adapter_config(folder, base_model)
    check_output_dir(output_dir, overwrite=overwrite, read=_read_by(folder, config))
    model = load_adapter(folder, base_model)
    export_compressed(
        model,
        output_dir,
        storage=storage,
        dtype=dtype,
        bits=bits,
        statistics=loaded,
        processor=find_processor(adapter_dir, str(config.base_model_name_or_path)),
        overwrite=overwrite,
        push_to_hub=push_to_hub,
        repo_id=repo_id,
    )


def check_dense_options(*options: object) -> None:
    """Raise `ValueError` for options that plain layers have no use for, if one of them is given."""
    if any(option is not None and option is not False for option in options):  # `--bits 0` is given, too
        raise ValueError(
            "--dense writes plain layers to a directory; leave out --storage, --bits, --statistics, --push-to-hub and "
            "--repo-id."
        )


def export_dense(
    directory: str, output_dir: Path, *, base_model: str | None, dtype: torch.dtype | None, overwrite: bool
) -> None:
    """Write an adapter or a compressed checkpoint with plain layers, for tools that cannot import this package.

    Args:
        directory: Of an adapter or a compressed checkpoint, or its Hub name.
        output_dir: Where to.
        base_model: Of an adapter, as for `load_adapter`.
        dtype: Of the checkpoint. Default: the model's.
        overwrite: Replace what is in ``output_dir``. A `ValueError` says, as in other cases, if it holds something.
    """
    options = {"ADAPTER_DIR": directory, "--base-model": base_model}
    check_output_dir(output_dir, overwrite=overwrite, read=options)
    folder = local_folder(directory)
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter:
        config = read_adapter_config(folder, base_model)
        check_output_dir(output_dir, overwrite=overwrite, read=_read_by(folder, config))
        model = compressed_copy(load_adapter(folder, base_model), dtype=dtype, progress_bar=True)
        model.dequantize()  # type: ignore[no-untyped-call]  # transformers does not annotate it
        processor = find_processor(directory, str(config.base_model_name_or_path))
    else:
        model = _load_dense(folder, dtype)
        processor = find_processor(directory)
    with appearing_whole(output_dir) as written:
        if not is_adapter:
            shutil.copytree(folder, written, dirs_exist_ok=True, ignore=_leave_out_of(folder, written, output_dir))
        model.save_pretrained(written)
        if processor is not None:
            processor.save_pretrained(written)


def _load_dense(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is neither an adapter nor a checkpoint: it has no config.json.")
    config = load_model_config(str(folder))
    if not is_compression(getattr(config, "quantization_config", None)):
        raise ValueError(f"{folder} is not compressed: its config.json has no `quantization_config` of this package.")
    with loading_options(dense=True):
        return model_class(config).from_pretrained(folder, dtype=dtype or "auto")


def _leave_out_of(folder: Path, *outputs: Path) -> Callable[[str, list[str]], set[str]]:
    """Return what tells `shutil.copytree` what not to copy: ``outputs``, and files at the top that are written anew.

    Parts below the top keep theirs.
    """
    own = shutil.ignore_patterns(*_NOT_COPIED)
    written = {output.resolve() for output in outputs}

    def left_out(place: str, names: list[str]) -> set[str]:
        inside = {name for name in names if (Path(place) / name).resolve() in written}
        return inside | (own(place, names) if Path(place) == folder else set())

    return left_out
