"""What a user does: calibrate, compress, train a step, export, load; and what may not differ on the way."""

import linecache
import re
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import get_peft_model

from benchmarks.model_types.building import answer, first_line, tensors_in
from peft_jactus import JactusConfig, calibrate, compressed_copy, export_compressed

RATIO = 0.5
STORAGES = ("pivoted", "factored")
TASKS = {
    "CausalLM": "CAUSAL_LM",
    "Seq2SeqLM": "SEQ_2_SEQ_LM",
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
# Of the norm of what the adapter gives: the order of sums, and in float32.
EXPORT_TOLERANCE = 1e-3
LOADING_TOLERANCE = 1e-5
PACKAGE = str(Path(__file__).parents[2] / "peft_jactus")


class DifferenceError(Exception):
    """Something came out other than it went in, and nobody said so."""


class UnstableError(Exception):
    """All came out as it went in, but outputs cannot be compared: rounding alone changes them."""

    def __init__(self, figures):
        super().__init__(f"a millionth of the dense weights changes the outputs by {figures['instability']:.1e}")
        self.figures = figures


@dataclass
class Settings:
    """What a user can change after a refusal; `describe` says it as one would write it.

    Attributes:
        leave_unusable_dense: Of `calibrate`.
        without_data: Start from singular values, without a loss, and without ranks that train.
        exclude_modules: Of `JactusConfig`.
    """

    leave_unusable_dense: bool = False
    without_data: bool = False
    exclude_modules: list[str] = field(default_factory=list)

    def describe(self):
        """Return the settings that are not the default, in words."""
        return [
            *(["leave_unusable_dense=True"] if self.leave_unusable_dense else []),
            *(['decomposition="svd", without data'] if self.without_data else []),
            *(
                [f"exclude_modules={sorted(map(_without_numbers, self.exclude_modules))}"]
                if self.exclude_modules
                else []
            ),
        ]


def _without_numbers(name):
    return re.sub(r"\.\d+\.", ".*.", name)


def config_of(built, settings):
    task = next((task for ending, task in TASKS.items() if built.auto.__name__.endswith(f"For{ending}")), None)
    options = {"decomposition": "svd", "adaptation_rank": 0} if settings.without_data else {}
    return JactusConfig(
        task_type=task,
        target_modules="all-linear",
        exclude_modules=settings.exclude_modules or None,
        retained_ratio=RATIO,
        **options,
    )


def travel(built, settings, enter):
    """Take a model through all of it.

    Args:
        built: How to make the model.
        settings: What is not the default.
        enter: Called with the name of each stage.

    Returns:
        Figures: how many layers were compressed, and the largest relative differences.
    """
    figures = {}
    model = built.model()
    config = config_of(built, settings)
    if not settings.without_data:
        enter("calibrate")
        calibrate(
            model,
            config,
            [built.batch],
            loss_fn=None if built.has_own_loss else mean_square,
            leave_unusable_dense=settings.leave_unusable_dense,
            progress_bar=False,
        )
    enter("compress")
    adapted = get_peft_model(model, config)
    enter("train")
    if not settings.without_data:
        _train_a_step(adapted, built)
    wanted = answer(adapted.get_base_model(), built.batch)
    for storage in STORAGES:
        enter(f"export {storage}")
        compressed = compressed_copy(adapted, storage=storage).eval()
        figures["layers"] = len(compressed.config.quantization_config.layers)
        difference = relative_difference(answer(compressed, built.batch), wanted)
        figures["export_difference"] = max(difference, figures.get("export_difference", 0.0))
        if not difference <= EXPORT_TOLERANCE:
            by_a_millionth = instability(built)
            if by_a_millionth <= EXPORT_TOLERANCE:
                raise DifferenceError(f"exported {storage}, its outputs are off by {difference:.1e}")
            figures["instability"] = by_a_millionth
        with tempfile.TemporaryDirectory() as folder:
            export_compressed(adapted, folder, storage=storage, overwrite=True, progress_bar=False)
            enter(f"load {storage}")
            figures["loading_difference"] = max(
                check_reload(built, compressed, folder), figures.get("loading_difference", 0.0)
            )
    if "instability" in figures:
        raise UnstableError(figures)
    return figures


@torch.no_grad()
def instability(built):
    """Return how far the dense model's outputs change if its weights do by a millionth: where it chooses, by much."""
    model = built.model().eval()
    wanted = answer(model, built.batch)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return relative_difference(answer(model, built.batch), wanted)


def mean_square(model, batch):
    """Return a loss for a model that has none, or none for these inputs."""
    tensors = [tensor for tensor in tensors_in(model(**batch)) if tensor.is_floating_point() and tensor.requires_grad]
    return sum(tensor[torch.isfinite(tensor)].square().mean() for tensor in tensors)  # masked scores are not


def _train_a_step(adapted, built):
    """Take one step in evaluation mode: what trains starts at zero."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    base = adapted.get_base_model()
    loss = base(**built.batch)["loss"] if built.has_own_loss else mean_square(base, built.batch)
    loss.backward()
    optimizer.step()
    adapted.eval()


def check_reload(built, model, folder):
    """Return how far the outputs of the model in ``folder`` are from those of ``model``.

    Raises:
        DifferenceError: If a tensor is new, missing or another, or the outputs are.
    """
    loaded, info = built.auto.from_pretrained(folder, output_loading_info=True)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(name):
            raise DifferenceError(f"loaded with {name}: {sorted(map(str, info[name]))[:4]}")
    if type(loaded) is not type(model):
        raise DifferenceError(f"loaded as a {type(loaded).__name__}, not a {type(model).__name__}")
    loaded.eval()
    _check_tensors("tensors", model.state_dict(), loaded.state_dict())
    _check_tensors("buffers", dict(model.named_buffers()), dict(loaded.named_buffers()))
    difference = relative_difference(answer(loaded, built.batch), answer(model, built.batch))
    if not difference <= LOADING_TOLERANCE:
        raise DifferenceError(f"loaded, its outputs are off by {difference:.1e}")
    return difference


def _check_tensors(what, before, after):
    if before.keys() != after.keys():
        raise DifferenceError(f"loaded with other {what}: {sorted(before.keys() ^ after.keys())[:4]}")
    others = [name for name, tensor in before.items() if not _is_same(tensor, after[name])]
    if others:
        raise DifferenceError(f"loaded with other values of {what}: {others[:4]}")


def _is_same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def relative_difference(output, reference):
    """Return the largest of the norms of differences, each over the norm of what is right."""
    pairs = list(zip(tensors_in(output), tensors_in(reference), strict=True))
    return max((_difference(one, other) for one, other in pairs), default=0.0)


def _difference(one, other):
    if one.shape != other.shape:
        return float("inf")
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else float("inf")
    finite = torch.isfinite(other)  # masked scores are minus infinity
    if not torch.equal(finite, torch.isfinite(one)):
        return float("inf")
    one, other = one[finite].double(), other[finite].double()
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


# -- what a failure was -----------------------------------------------------------------------------------


def is_refusal(error):
    """Whether this package raised an error on purpose."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno).strip()
    return last.filename.startswith(PACKAGE) and line.startswith("raise ") and isinstance(error, Exception)


def where(error):
    """Return the file and line of the last frame, in this package or another."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"


def check_dense(built):
    """Return what transformers itself loses of the model that was not compressed, if it does; else ``None``."""
    model = built.model()
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            check_reload(built, model, folder)
        except Exception as error:  # noqa: BLE001  # whatever models' code raises
            return f"{type(error).__name__}: {first_line(error)}"
    return None
