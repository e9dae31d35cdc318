"""``peft-jactus bench``: a compressed model beside the dense one, on this machine."""

import json
import platform
from dataclasses import asdict, dataclass
from inspect import signature
from typing import cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from peft_jactus._version import __version__
from peft_jactus.cli.hub import load_model_config, model_class
from peft_jactus.cli.stopwatch import Case, Timing, compare, decode_case, forward_case, num_bytes, num_parameters
from peft_jactus.deployment.config import is_compression
from peft_jactus.deployment.quantizer import loading_options

COMPRESSED, DENSE = "compressed", "dense"
_DECODED_TOKENS = 16


@dataclass(frozen=True)
class Comparison:
    """Two models, measured.

    Attributes:
        num_parameters: By model.
        num_bytes: Of parameters and buffers in memory, by model.
        timings: All cases and models.
        machine: What they were measured on.
    """

    num_parameters: dict[str, int]
    num_bytes: dict[str, int]
    timings: list[Timing]
    machine: dict[str, str | int]

    def to_json(self) -> str:
        """Return all figures."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        rows = [
            (
                "parameters",
                *(f"{self.num_parameters[name]:,}" for name in (DENSE, COMPRESSED)),
                _ratio(self.num_parameters[COMPRESSED], self.num_parameters[DENSE]),
                "",
            ),
            (
                "bytes in memory",
                *(f"{self.num_bytes[name]:,}" for name in (DENSE, COMPRESSED)),
                _ratio(self.num_bytes[COMPRESSED], self.num_bytes[DENSE]),
                "",
            ),
        ]
        by_case: dict[str, dict[str, Timing]] = {}
        for timing in self.timings:
            by_case.setdefault(timing.case, {})[timing.model] = timing
        for case, timing_of in by_case.items():
            dense, compressed = timing_of[DENSE], timing_of[COMPRESSED]
            rows.append((
                f"{case}, ms",
                f"{dense.min_seconds * 1e3:,.3f}",
                f"{compressed.min_seconds * 1e3:,.3f}",
                _ratio(compressed.min_seconds, dense.min_seconds),
                _ratio(compressed.median_seconds, dense.median_seconds),
            ))
        rows.insert(0, ("", DENSE, COMPRESSED, "ratio", "of medians"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([f"{row[0]:<{widths[0]}}", *(f"{v:>{w}}" for v, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )


def _ratio(value: float, reference: float) -> str:
    return f"{value / reference:.3f}"


def load_pair(checkpoint: str, dense: str | None, device: torch.device) -> dict[str, PreTrainedModel]:
    """Load a compressed model and a dense one to compare it with.

    Args:
        checkpoint: Directory or Hub name of the compressed checkpoint.
        dense: Directory or Hub name of a dense model. Default: the compressed one with its factors multiplied out.
        device: Where to.

    Returns:
        Both models, by what they are.

    Raises:
        ValueError: If ``checkpoint`` is not compressed.
    """
    config = load_model_config(checkpoint)
    if not is_compression(getattr(config, "quantization_config", None)):
        raise ValueError(
            f"{checkpoint} is not a compressed checkpoint; make one with `peft-jactus export` or `compress`."
        )
    cls = model_class(config)
    compressed = cls.from_pretrained(checkpoint, dtype="auto")
    with loading_options(dense=dense is None):
        reference = cls.from_pretrained(dense or checkpoint, dtype=compressed.dtype)
    return {DENSE: reference.to(device), COMPRESSED: compressed.to(device)}  # type: ignore[arg-type]  # its signature


def make_cases(model: PreTrainedModel, batch_sizes: list[int], sequence_length: int) -> list[Case]:
    """Return what this kind of model is timed on: a forward pass, and decoding if it is a causal LM.

    Raises:
        ValueError: If the model takes neither tokens nor images, or has too few positions.
    """
    if model.main_input_name == "pixel_values":
        return [_image_case(model, batch_size) for batch_size in batch_sizes]
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}; this command can only make tokens and images."
        )
    is_causal = model.can_generate() and not model.config.is_encoder_decoder
    needed = sequence_length + (_DECODED_TOKENS if is_causal else 0)
    positions = getattr(model.config, "max_position_embeddings", None) or needed
    if needed > positions:
        raise ValueError(
            f"--sequence-length must be at most {positions - needed + sequence_length} for this model, which has "
            f"{positions} positions; got {sequence_length}."
        )
    cases = []
    for batch_size in batch_sizes:
        tokens = _random_tokens(model, batch_size, sequence_length)
        size = f"{batch_size} x {sequence_length} tokens"
        cases.append(forward_case(f"{'prefill' if is_causal else 'forward'}, {size}", _token_inputs(model, tokens)))
        if is_causal:
            cases.append(decode_case(f"decode a token, after {size}", tokens, num_tokens=_DECODED_TOKENS))
    return cases


def _random_tokens(model: PreTrainedModel, batch_size: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    return torch.randint(vocabulary, (batch_size, length), generator=generator).to(model.device)


def _token_inputs(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, object]:
    inputs: dict[str, object] = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    elif model.can_generate():
        inputs["use_cache"] = True
        if "logits_to_keep" in signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1  # as `generate` does
    return inputs


def _image_case(model: PreTrainedModel, batch_size: int) -> Case:
    side = model.config.image_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch_size, model.config.num_channels, height, width, generator=generator)
    return forward_case(
        f"forward, {batch_size} images of {height} x {width}",
        {"pixel_values": pixels.to(model.device, model.dtype)},
    )


def compare_models(
    checkpoint: str,
    dense: str | None,
    *,
    device: torch.device,
    batch_sizes: list[int],
    sequence_length: int,
    num_repeats: int,
    num_threads: int,
) -> Comparison:
    """Load a compressed model and a dense one (see `load_pair`), and measure their sizes and times."""
    models = load_pair(checkpoint, dense, device)
    cases = make_cases(models[COMPRESSED], batch_sizes, sequence_length)
    return Comparison(
        {name: num_parameters(model) for name, model in models.items()},
        {name: num_bytes(model) for name, model in models.items()},
        compare(models, cases, num_repeats=num_repeats, num_threads=num_threads),
        {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "threads": num_threads,
            "dtype": str(models[DENSE].dtype),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft_jactus": __version__,
        },
    )
