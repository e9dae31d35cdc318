"""Write a compressed checkpoint that carries its own model code: for vLLM, and where peft_jactus is not installed.

vLLM's Transformers backend builds a model by `AutoModel.from_config`, which does not look at ``quantization_config``.
So the layers are described in a field of their own, and ``auto_map`` names classes that put them into the model.
"""

from __future__ import annotations

import copy
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_jactus._version import __version__
from peft_jactus.deployment.arguments import check_shard_size
from peft_jactus.deployment.atomic_folder import appearing_whole, check_target
from peft_jactus.deployment.extensions import extensions_in
from peft_jactus.deployment.layers import FactorizedLinear
from peft_jactus.deployment.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedConfig

_MODULE = "modeling_low_rank"
# What the model's own file has after the layers.
_CLASSES = """# -- of this checkpoint, written by peft-jactus $version

from transformers import $causal_class, $base_class


class LowRank$base_class($base_class):
    def __init__(self, config):
        super().__init__(config)
        put_low_rank_layers(self, config.low_rank_layers)
        self._tp_plan = {}  # the family's plan cuts whole layers, and would cut their low-rank parts in the same way


class LowRank$causal_class($causal_class):
    def __init__(self, config):
        super().__init__(config)
        put_low_rank_layers(self.base_model, config.low_rank_layers)
"""
# What a tokenizer or processor, and the settings for generation, are stored in.
_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")
_NOT_COMPANIONS = ("config.json", "model.safetensors.index.json")


def export_remote_code(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a compressed causal language model in a form that loads without peft_jactus.

    ``AutoModelForCausalLM.from_pretrained(output_dir, trust_remote_code=True)`` gives the same model. vLLM serves it
    with ``vllm serve output_dir --trust-remote-code``, on one device per replica (``tensor_parallel_size=1``).

    Args:
        checkpoint_dir: What `export_compressed` wrote.
        output_dir: Directory to write; it must be new or empty, unless ``overwrite``.
        max_shard_size: Largest file, as for `save_pretrained`.
        overwrite: Replace what is in ``output_dir``.

    Returns:
        ``output_dir``.

    Raises:
        ValueError: If ``checkpoint_dir`` is not a compressed causal language model of a family that transformers
            implements, or ``output_dir`` is not empty, or contains ``checkpoint_dir`` or the current directory.
    """
    source, target = Path(checkpoint_dir), Path(output_dir)
    check_target(target, overwrite=overwrite, argument="`output_dir`", read={"`checkpoint_dir`": source})
    check_shard_size(max_shard_size)
    if not (source / "config.json").is_file():
        raise ValueError(f"`checkpoint_dir` {source} has no config.json; give what `export_compressed` wrote.")
    _check_architecture(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    if extensions := extensions_in(model):
        raise ValueError(
            f"`checkpoint_dir` {source} has a {extensions[0].field}, which vLLM's code would not run. Export the "
            "compressed checkpoint that it was added to."
        )
    layers = _low_rank_layers(source, model)
    with appearing_whole(target) as folder:
        for pattern in _COMPANIONS:
            for file in source.glob(pattern):
                if file.name not in _NOT_COMPANIONS:
                    shutil.copyfile(file, folder / file.name)
        _remote_config(model, layers).save_pretrained(folder)
        (folder / f"{_MODULE}.py").write_text(_model_code(model), encoding="utf-8")
        tensors = remove_tied_weights_from_state_dict(model.state_dict(), model)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    return target


def _check_architecture(source: Path) -> None:
    config = AutoConfig.from_pretrained(source)
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if (config.architectures or [None])[0] != expected:
        raise ValueError(
            f"`checkpoint_dir` {source} holds a {config.architectures}; only causal language models have this form. "
            "Save others with full-size layers: load them under `loading_options(dense=True)`."
        )


def _low_rank_layers(source: Path, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Return the arguments of each layer's class in the template, by name in the base model."""
    layers = {}
    if any(isinstance(part, QuantizedLinear) for part in model.modules()):
        raise ValueError(
            f"`checkpoint_dir` {source} has weights in 8 or 4 bits, which vLLM's code would not read. Export it again "
            "without `bits`."
        )
    prefix = f"{model.base_model_prefix}."
    for name, layer in model.named_modules():
        if not isinstance(layer, FactorizedLinear):
            continue
        if not name.startswith(prefix):
            raise ValueError(
                f"{name} is compressed and outside of the base model, where vLLM uses its own layer. Compress the "
                "model again with this layer in `exclude_modules`, or load it under `loading_options(dense=True)`."
            )
        layers[name.removeprefix(prefix)] = {
            "form": type(layer).__name__,
            "in_features": layer.in_features,
            "rank": layer.rank,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
        }
    if not layers:
        raise ValueError(f"`checkpoint_dir` {source} has no low-rank layers; it needs no code of its own.")
    return layers


def _remote_config(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> PreTrainedConfig:
    config = copy.deepcopy(model.config)
    del config.quantization_config
    base_class, causal_class = (f"LowRank{type(part).__name__}" for part in (model.base_model, model))
    # vLLM runs architectures that it has by its own code, which knows no low-rank layers.
    config.architectures = [causal_class]
    config.auto_map = {
        "AutoModel": f"{_MODULE}.{base_class}",
        "AutoModelForCausalLM": f"{_MODULE}.{causal_class}",
    }
    config.low_rank_layers = layers
    return config


def _model_code(model: PreTrainedModel) -> str:
    layers = files("peft_jactus.deployment").joinpath("remote_modeling.py").read_text(encoding="utf-8")
    classes = Template(_CLASSES).substitute(
        base_class=type(model.base_model).__name__, causal_class=type(model).__name__, version=__version__
    )
    return f"{layers}\n\n{classes}"
