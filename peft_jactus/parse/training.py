"""Train a router offline, on a broad corpus, so that the routed model predicts what the dense model predicts."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from peft_jactus._progress import progress
from peft_jactus.parse.experts import relaxed_gates
from peft_jactus.parse.importance import counted_positions, expert_importance, logits_of
from peft_jactus.parse.inputs import check_not_checkpointed, pool_states, prompt_states
from peft_jactus.parse.installation import ROUTER_NAME, check_in_memory, router_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.trainer_utils import TrainOutput

    from peft_jactus.calibration.batches import Batch
    from peft_jactus.parse.router import RankRouter

# Least importance of an expert, as a share of the mean: the logarithm needs one.
_IMPORTANCE_FLOOR = 1e-6
# Penalties of the ridge regression, over the largest squared singular value, in powers of ten; the last is as good as
# no regression.
_PENALTIES = [exponent / 2 for exponent in range(-8, 9)]

# Of the Trainer and of its arguments.
_USELESS_OPTIONS = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
_USELESS_ARGUMENTS = ("label_smoothing_factor", "bf16_full_eval", "fp16_full_eval")


class RouterTrainer(Trainer):
    """A `transformers.Trainer` for the router only; the model and its teacher do not change.

    The loss is the divergence ``KL(teacher || routed model)`` of their predictions. The forward pass uses the hard
    choice of experts, the backward pass a soft one (`relaxed_gates`). Checkpoints hold the router. Resuming, logging,
    learning rate schedules and everything else work as in the Trainer.

    Args:
        model: What `routed_copy` returned, or a model loaded from its checkpoint.
        teacher: The dense model, with the same vocabulary or classes. Frozen and in evaluation mode.
        args: As for the Trainer. Default: those of `default_arguments`.
        train_dataset: Broad text, or other inputs of the model; not only the calibration data.
        active_ratios: Each step draws its budget from this range, so that the router works for the whole range.
        prompt_tokens: For each row, the router sees only the first tokens, as when it continues a prompt. Their number
            is drawn from this range; in evaluation, it is the middle. Default: all tokens.
        temperature: Temperature of the soft choice, in units of the scores; see `relaxed_gates`.
        initial_batches: Number of batches that set the router's standardisation and the average worth of each expert
            before the first step (`initialize_router_`), in the dtype of the models. 0 leaves the router as it is.
        **trainer_options: ``eval_dataset``, ``data_collator``, ``callbacks`` and other arguments of the Trainer.

    Raises:
        ValueError: If the model has no router or checkpoints its activations, the corpus is empty, a range has
            invalid values, or an option of the Trainer has no use here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any,
        active_ratios: tuple[float, float] | None = None,
        prompt_tokens: tuple[int, int] | None = None,
        temperature: float = 0.5,
        initial_batches: int = 8,
        **trainer_options: Any,
    ) -> None:
        router = router_of(model)
        if router is None:
            raise ValueError("`model` has no router; use `routed_copy`.")
        if isinstance(train_dataset, Sized) and len(train_dataset) == 0:
            raise ValueError("`train_dataset` is empty; a router is trained on text like what it will serve.")
        check_not_checkpointed(model)
        self.router: RankRouter = router
        self.active_ratios = _checked_range("active_ratios", active_ratios or (router.active_ratio,) * 2)
        for ratio in self.active_ratios:
            replace(router.router_config, active_ratio=ratio)  # raises if it is above one
            router.budgets(ratio)
        self.prompt_tokens = None if prompt_tokens is None else _checked_range("prompt_tokens", prompt_tokens)
        if any(type(length) is not int for length in self.prompt_tokens or ()):
            raise ValueError(f"`prompt_tokens` must be integers; got {prompt_tokens!r}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive; got {temperature}.")
        _check_used(args, trainer_options)
        self.temperature = temperature
        self.initial_batches = initial_batches
        self.routed, self.teacher = model, teacher
        for module in (model, teacher):
            module.train(False)
        args = TrainingArguments(**default_arguments()) if args is None else args
        super().__init__(model=router, args=args, train_dataset=train_dataset, **trainer_options)
        for module in (model, teacher):
            nn.Module.to(module, args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; as `Trainer.train`."""
        if not resume_from_checkpoint and self.initial_batches:
            batches = islice(self.get_train_dataloader(), self.initial_batches)
            initialize_router_(self.routed, (self._prepare_inputs(batch) for batch in batches), seed=self.args.seed)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the divergence from the teacher, in nats a prediction."""
        del num_items_in_batch
        # accelerate wraps only the router, which is float32 anyway.
        with torch.no_grad(), self.accelerator.autocast():
            expected = logits_of(self.teacher, inputs)
            states = prompt_states(self.routed, inputs, self.router.router_config.router_input)
        pooled = pool_states(states, self._prompt_mask(inputs, states, drawn=model.training))
        low, high = self.active_ratios
        ratio = low + (high - low) * (float(torch.rand(())) if model.training else 0.5)
        budgets = self.router.budgets(ratio)
        allocation = self.router.router_config.allocation
        gates = relaxed_gates(model(pooled), self.router.table, budgets, allocation, temperature=self.temperature)
        with self.router.gated(gates), self.accelerator.autocast():
            logits = logits_of(self.routed, inputs)
        loss = divergence(expected, logits)[counted_positions(inputs, logits)].mean()
        return (loss, {"logits": logits}) if return_outputs else loss

    def _prompt_mask(self, inputs: Batch, states: Tensor, *, drawn: bool) -> Tensor | None:
        mask = inputs.get("attention_mask")
        if self.prompt_tokens is None:
            return mask
        mask = states.new_ones(states.shape[:2], dtype=torch.int64) if mask is None else mask
        low, high = self.prompt_tokens
        if drawn:
            lengths = torch.randint(low, high + 1, (len(mask), 1), device=mask.device)
        else:
            lengths = mask.new_full((len(mask), 1), (low + high) // 2)
        return mask * (mask.cumsum(1) <= lengths)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch of the evaluation set; the predictions themselves are of no use."""
        del prediction_loss_only, ignore_keys
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(dict(inputs))).detach(), None, None

    def _set_signature_columns_if_needed(self) -> None:
        # The columns that the model reads, not those of the router.
        trained, self.model = self.model, self.routed
        try:
            super()._set_signature_columns_if_needed()
        finally:
            self.model = trained


def _check_used(args: TrainingArguments | None, trainer_options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for options of the Trainer that would have no effect."""
    useless = [name for name in _USELESS_OPTIONS if trainer_options.get(name) is not None]
    useless += [name for name in _USELESS_ARGUMENTS if getattr(args, name, None)]
    if useless:
        raise ValueError(
            f"`RouterTrainer` has no use for {', '.join(f'`{name}`' for name in useless)}: its loss is the divergence "
            "from the teacher, and it returns no predictions. Leave this out."
        )


def default_arguments() -> dict[str, Any]:
    """Return arguments of `TrainingArguments` that serve as a start."""
    return {
        "output_dir": "router",
        "learning_rate": 2e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 1,
        "report_to": [],
    }


def divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """Return ``KL(softmax(expected) || softmax(logits))`` over the last dimension, in nats, float32."""
    expected = functional.log_softmax(expected.float(), dim=-1)
    logits = functional.log_softmax(logits.float(), dim=-1)
    return (expected.exp() * (expected - logits)).sum(-1)


@torch.no_grad()
def initialize_router_(
    model: PreTrainedModel, batches: Iterable[Batch], *, seed: int = 0, progress_bar: bool = True
) -> None:
    """Set an untrained router as well as is possible without training.

    Its input is standardised over the prompts of ``batches``. Its scores become the log of the average worth of each
    expert's parameters: the best static choice to second order. A linear router also gets a ridge regression of how
    each prompt's worth differs from the average.

    Args:
        model: A routed model.
        batches: On the model's device.
        seed: Seed for the drawn labels.
        progress_bar: Show a bar over the batches.

    Raises:
        ValueError: If there are no batches, or the model has no router, or one that is offloaded.
    """
    router = router_of(model)
    if router is None:
        raise ValueError("`model` has no router; use `routed_copy`.")
    check_in_memory({ROUTER_NAME: router})
    generator = torch.Generator(router.weight.device).manual_seed(seed)
    importance, pooled = [], []
    for batch in progress(batches, description="Weighing experts", unit="batch", shown=progress_bar):
        importance.append(expert_importance(model, batch, generator=generator))
        states = prompt_states(model, batch, router.router_config.router_input)
        pooled.append(pool_states(states, batch.get("attention_mask")))
    if not pooled:
        raise ValueError("`batches` is empty; a router needs at least one.")
    inputs, worth = torch.cat(pooled), torch.cat(importance).double()
    average = worth.mean(0)
    if not average.any():
        raise ValueError(
            "No expert changes any prediction on `batches`, as if all tokens were padding; give other batches."
        )
    average = average + _IMPORTANCE_FLOOR * average.mean()
    scores = (average / router.table.costs.to(average)).log()
    router.bias.copy_(scores - scores.mean())
    router.input_mean.copy_(inputs.mean(0))
    if len(inputs) > 1:
        deviation = inputs.std(0)
        router.input_scale.copy_(1 / deviation.clamp(min=1e-3 * float(deviation.mean()) + 1e-12))
        if router.router_config.router_kind == "linear":
            slopes = ridge_regression(router.features(inputs).double(), worth / average - 1)
            router.weight.copy_(slopes.mT)
    router.clear_cache()  # of what it chose before


def ridge_regression(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the coefficients of a ridge regression whose penalty is chosen by generalised cross-validation.

    Args:
        inputs: ``(num, in)``, float64.
        targets: ``(num, out)``, float64; all share one penalty.

    Returns:
        ``(in, out)``.

    References:
        Golub, Heath & Wahba, Technometrics 21, 1979.
    """
    u, sigma, vh = torch.linalg.svd(inputs, full_matrices=False)
    projected = u.mT @ targets
    outside = targets.square().sum() - projected.square().sum()

    def score(penalty: float) -> float:
        kept = penalty / (sigma.square() + penalty)  # of each direction's residual
        residual = outside + (kept.unsqueeze(1) * projected).square().sum()
        freedom = (len(inputs) - sigma.numel() + kept.sum()) / len(inputs)
        return float(residual / freedom.square())

    largest = float(sigma[0].square())
    penalty = min((largest * 10.0**exponent for exponent in _PENALTIES), key=score)
    coefficients: Tensor = vh.mT @ ((sigma / (sigma.square() + penalty)).unsqueeze(1) * projected)
    return coefficients


def _checked_range(name: str, values: Sequence[float]) -> tuple[Any, Any]:
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise ValueError(f"`{name}` must be two positive numbers, the smaller one first; got {values!r}.")
    return values[0], values[1]
