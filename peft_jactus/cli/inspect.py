"""``peft-jactus inspect``: what is in a directory, without reading a weight."""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from peft_jactus.cli.hub import load_adapter_config, read_adapter_shapes
from peft_jactus.deployment.config import CompressionConfig, is_compression
from peft_jactus.deployment.extensions import find_extension
from peft_jactus.deployment.integrity import CheckpointFiles
from peft_jactus.deployment.ranks import summary_of_adapter, summary_of_checkpoint
from peft_jactus.tuner.rank_table import RankSummary


@dataclass(frozen=True)
class Inspection:
    """What a directory says about itself.

    Attributes:
        folder: The directory.
        facts: Base model, versions and the like, by label.
        summary: The ranks.
        files: The headers of a compressed checkpoint; ``None`` for an adapter.
    """

    folder: Path
    facts: dict[str, str]
    summary: RankSummary
    files: CheckpointFiles | None

    def __str__(self) -> str:
        sizes = {file.name: file.stat().st_size for file in sorted(self.folder.iterdir()) if file.is_file()}
        lines = {**self.facts, **{name: _in_bytes(size) for name, size in sizes.items()}}
        lines["all files"] = _in_bytes(sum(sizes.values()))
        width = max(map(len, lines))
        return "\n".join([*(f"{label:<{width}}  {value}" for label, value in lines.items()), "", str(self.summary)])


def inspect_folder(folder: Path) -> Inspection:
    """Look at an adapter or a compressed checkpoint.

    Args:
        folder: Where its files are.

    Returns:
        What they say.

    Raises:
        ValueError: If it is neither, or files are missing or damaged.
    """
    if _is_compressed(folder / "config.json"):
        return _inspect_checkpoint(folder)
    if (folder / "adapter_config.json").is_file():
        return _inspect_adapter(folder)
    raise ValueError(
        f"{folder} is neither a compressed checkpoint (config.json with `quantization_config`) nor a JACTUS adapter "
        "(adapter_config.json)."
    )


def _is_compressed(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        return is_compression(json.loads(path.read_text(encoding="utf-8")).get("quantization_config"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as the config of a model.") from error


def _inspect_checkpoint(folder: Path) -> Inspection:
    config = AutoConfig.from_pretrained(folder)
    compression = CompressionConfig(**config.quantization_config)
    files = CheckpointFiles.read(_weight_files(folder))
    summary = summary_of_checkpoint(compression, {name: entry.shape for name, entry in files.entries.items()})
    facts = {
        "kind": "compressed checkpoint",
        "architecture": ", ".join(config.architectures or ["unknown"]),
        "base model": compression.base_model or "unknown",
        "dtype": str(config.dtype).removeprefix("torch."),
        "storage": summary.storage,
        "format version": f"{compression.format_version}, written by peft-jactus {compression.peft_jactus_version} "
        f"and transformers {compression.transformers_version}",
    }
    for field, settings in compression.extensions.items():
        entry = find_extension(field)
        assert entry is not None
        facts[field] = entry.load().describe(settings)
    return Inspection(folder, facts, summary, files)


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors file. Download or export it again.")
    return files


def _inspect_adapter(folder: Path) -> Inspection:
    config = load_adapter_config(folder)
    shapes = read_adapter_shapes(folder)
    facts = {
        "kind": "adapter",
        "base model": config.base_model_name_or_path or "unknown",
        "task type": str(config.task_type or "none"),
        "storage": f"{config.storage}, once exported",
        "written by": f"peft-jactus {config.peft_jactus_version}",
    }
    if config.adaptation_rank:
        trains = "they and the cores train" if config.train_core else "they train"
        how = "of each layer's ranks, half at most, or on top of a dense one"
        if config.adaptation_space == "retained":
            how = "in each layer, half of its ranks at most, in the space that it retains"
        facts["adaptation"] = f"{config.adaptation_rank} {how}; {trains}"
    return Inspection(folder, facts, summary_of_adapter(config, shapes), None)


def _in_bytes(size: int) -> str:
    return f"{size:,} bytes"


def verify_contents(inspection: Inspection) -> None:
    """Compare every byte with the digests that the checkpoint carries.

    Raises:
        ValueError: Naming tensors that differ, or for an adapter, which carries no digests.
    """
    if inspection.files is None:
        raise ValueError("--verify: an adapter carries no digests; only a compressed checkpoint does.")
    inspection.files.check_contents(all_bytes=True)
