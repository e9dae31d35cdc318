"""Where things are: directories and Hub names, configs, classes, processors."""

from pathlib import Path
from typing import Any, cast

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import has_file

from peft_jactus._files import opened_safetensors
from peft_jactus.tuner.config import JactusConfig


def local_folder(directory_or_name: str) -> Path:
    """Return a directory, or that to which the JSON and safetensors files of a Hub repository are downloaded.

    Raises:
        ValueError: If it is neither.
    """
    if _is_directory(directory_or_name):
        return Path(directory_or_name)
    try:
        return Path(snapshot_download(directory_or_name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(directory_or_name, error)) from error


def load_model_config(directory_or_name: str) -> PreTrainedConfig:
    """Return the config of a model in a directory, on the Hub, or in a GGUF file.

    Raises:
        ValueError: If it is none of these, or an adapter.
    """
    folder = Path(directory_or_name)
    if is_gguf(directory_or_name):
        config = cast("PreTrainedConfig", AutoConfig.from_pretrained(**gguf_place(directory_or_name)))
        config.architectures = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        return config
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{directory_or_name} is an adapter. `peft-jactus export {directory_or_name} OUTPUT_DIR` writes a JACTUS "
            "adapter as a compressed checkpoint; merge that of another tuner into its model first."
        )
    if _is_directory(directory_or_name):
        return cast("PreTrainedConfig", AutoConfig.from_pretrained(folder))
    try:
        return cast("PreTrainedConfig", AutoConfig.from_pretrained(directory_or_name))
    except OSError as error:
        raise ValueError(_not_found(directory_or_name, error)) from error


def is_gguf(name: str) -> bool:
    """Whether a model is given as a GGUF file."""
    return Path(name).suffix == ".gguf" and Path(name).is_file()


def gguf_place(file: str) -> dict[str, str]:
    """Return the arguments with which ``from_pretrained`` reads a GGUF file."""
    return {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}


def _is_directory(directory_or_name: str) -> bool:
    """Whether this is a directory; raise `ValueError` if it cannot be a name on the Hub either."""
    folder = Path(directory_or_name)
    if folder.is_dir():
        return True
    message = f"{directory_or_name} is neither a directory nor a name on the Hub (`user/name`)."
    if folder.exists():
        raise ValueError(message)
    try:
        validate_repo_id(directory_or_name)
    except HFValidationError as error:
        raise ValueError(message) from error
    return False


def _not_found(name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"There is no directory {name} here, and it was not found on the Hub. {reason}"


def model_class(config: PreTrainedConfig, name: str | None = None) -> type[PreTrainedModel]:
    """Return the class of transformers that a checkpoint was saved from.

    Args:
        config: Of the checkpoint.
        name: Of the class. Default: what the config says.

    Returns:
        The class.

    Raises:
        ValueError: If its config names none that transformers has.
    """
    names = [name] if name else config.architectures or []
    for candidate in names:
        found = getattr(transformers, candidate, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(
        f"{config.name_or_path} names {names} as its model class; transformers {transformers.__version__} has no such "
        "class."
    )


def find_processor(*places: str) -> Any | None:
    """Return the processor, tokenizer or image processor of the first directory or Hub name that has one."""
    for place in places:
        if is_gguf(place):
            return AutoTokenizer.from_pretrained(**gguf_place(place))
        has_tokenizer, has_features, has_processor = (
            has_file(place, f"{kind}_config.json") for kind in ("tokenizer", "preprocessor", "processor")
        )
        if has_processor or (has_tokenizer and has_features):
            return AutoProcessor.from_pretrained(place)  # type: ignore[no-untyped-call]
        if has_tokenizer:
            return AutoTokenizer.from_pretrained(place)
        if has_features:
            return AutoImageProcessor.from_pretrained(place)  # type: ignore[no-untyped-call]
    return None


def load_adapter_config(folder: Path) -> JactusConfig:
    """Return the config of an adapter in a directory; a `ValueError` says if it is another tuner's."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except KeyError as error:
        raise ValueError(f"{folder} holds a {error} adapter, which this version of PEFT does not know.") from error
    if not isinstance(config, JactusConfig):
        raise ValueError(f"{folder} holds a {config.peft_type} adapter, not a JACTUS one.")  # noqa: TRY004  # a file
    return config


def read_adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors; a `ValueError` says if they cannot be read."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    with opened_safetensors(path, remedy="Save or download it again.") as reader:
        return {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118  # no mapping
