"""The model, and the random generators, are after `calibrate` as they were before; also if it fails."""

import random

import numpy as np
import pytest
import torch
from peft import get_peft_model

from peft_jactus import JactusConfig, calibrate
from peft_jactus.tuner.layer import JactusLayer
from tests.support.tiny_models import classified_texts, tiny_bert

HEAD = "classifier"


class UserError(Exception):
    pass


@pytest.fixture
def model():
    """A model in use: some frozen parameters, some gradients, mixed modes, a hook of its own."""
    model = tiny_bert(hidden_dropout_prob=0.1)
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].train()
    for parameter in model.classifier.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.bert.pooler.register_forward_hook(lambda *_: None)
    return model


def run(model, batches, **options):
    config = JactusConfig(target_modules="all-linear", exclude_modules=[HEAD])
    return calibrate(model, config, batches, progress_bar=False, **options)


def failing_after(num_batches):
    yield from classified_texts()[:num_batches]
    raise UserError


def failing_loss(model, batch):
    model(**batch)
    raise UserError


def failing_inside(model, batch):
    """In the middle of the forward pass, with hooks of the first block fired and those of the second not."""

    def fail(*_):
        raise UserError

    with model.bert.encoder.layer[1].register_forward_pre_hook(fail):
        return model(**batch).loss


class DropsBehind(torch.nn.BatchNorm1d):
    """As timm's, which has an activation and dropout inside."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.was_training = torch.nn.Dropout(0.5), []

    def forward(self, x):
        self.was_training.append(self.drop.training)
        return self.drop(super().forward(x))


class Normalised(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(4, 4), DropsBehind(4), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_it_needs_gradients_and_makes_them_possible_where_they_are_off(model):
    expected = run(model, classified_texts())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside `torch.inference_mode\(\)`"):
        run(model, classified_texts())
    with torch.no_grad():
        found = run(model, classified_texts())
    assert all(torch.equal(found[name].gradient.scatter, expected[name].gradient.scatter) for name in expected)


def test_running_means_stay_with_dropout_on():
    model = Normalised()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [{"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}]
    config = JactusConfig(target_modules="all-linear")

    def loss_fn(model, batch):
        return model(batch["x"]).square().mean()

    calibrate(model, config, batches, loss_fn=loss_fn, train_mode=True, progress_bar=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.norm.training
    assert model.norm.was_training == [True]


def test_an_adapter_that_is_merged_elsewhere_is_refused_and_stays_merged(model):
    first = JactusConfig(target_modules=["query"], decomposition="svd", keep_base_weights=True)
    tuned = get_peft_model(model, first)
    tuned.merge_adapter()
    config = JactusConfig(target_modules=["key"])
    with pytest.raises(ValueError, match=r"query: an adapter is merged.*`unmerge_adapter`"):
        calibrate(tuned, config, classified_texts(), progress_bar=False)
    layers = [module for module in tuned.modules() if isinstance(module, JactusLayer)]
    assert layers
    assert all(layer.merged for layer in layers)


FAILURES = {
    "nothing": (classified_texts, {}),
    "dropout": (classified_texts, {"train_mode": True}),
    "batches": (lambda: failing_after(2), {}),
    "dropout_and_batches": (lambda: failing_after(2), {"train_mode": True}),
    "loss": (classified_texts, {"loss_fn": failing_loss}),
    "forward": (classified_texts, {"loss_fn": failing_inside}),
    "backward": (classified_texts, {"loss_fn": lambda model, batch: model(**batch).loss * torch.nan}),
}


@pytest.fixture(params=FAILURES)
def calibrated(request, model):
    """Calibrate, with one of the failures, after the test has looked at the model."""
    batches, options = FAILURES[request.param]

    def calibrate_it():
        if request.param in {"nothing", "dropout"}:
            run(model, batches(), **options)
        else:
            error = ValueError if request.param == "backward" else UserError
            with pytest.raises(error):
                run(model, batches(), **options)

    return calibrate_it


def hooks(model):
    attributes = [
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ]
    return {
        (name, attribute): list(getattr(module, attribute).items())
        for name, module in model.named_modules()
        for attribute in attributes
    }


def test_hooks_are_removed(model, calibrated):
    before = hooks(model)
    calibrated()
    assert hooks(model) == before


def test_modes_and_requires_grad_are_restored(model, calibrated):
    def state():
        modes = {name: module.training for name, module in model.named_modules()}
        trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        return modes, trainable

    before = state()
    assert set(before[0].values()) == set(before[1].values()) == {True, False}
    calibrated()
    assert state() == before


def test_gradients_are_neither_added_nor_changed(model, calibrated):
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    calibrated()
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name]
        assert parameter.grad is None or bool((parameter.grad == 1).all())


def test_weights_and_buffers_are_untouched(model, calibrated):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrated()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def test_random_generators_come_back_as_they_were(calibrated):
    before = random_states()
    calibrated()
    assert random_states() == before


@pytest.mark.parametrize("limit", [None, 8_000], ids=["one pass", "groups"])
def test_random_numbers_drawn_by_the_batches_are_given_back(model, limit):
    def drawing():
        for batch in classified_texts():
            states.append(random_states())
            torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002  # the global one
            yield batch

    states = []
    before = random_states()
    run(model, drawing(), max_statistics_memory=limit)
    assert all(one != other for one, other in zip(states[0], states[-1], strict=True))
    assert random_states() == before


def test_no_weight_gradient_is_allocated_on_the_way(model):
    """Not between two batches, and not during a backward pass: nothing but activations requires a gradient."""
    model.zero_grad(set_to_none=True)

    def watched():
        for batch in classified_texts():
            yield batch
            assert all(parameter.grad is None for parameter in model.parameters())

    def loss_fn(model, batch):
        loss = model(**batch).loss
        assert loss.requires_grad
        assert not any(parameter.requires_grad for parameter in model.parameters())
        return loss

    assert run(model, watched(), loss_fn=loss_fn).num_batches == 4


def test_a_failed_calibration_leaves_no_statistics_on_the_config(model):
    config = JactusConfig(target_modules="all-linear")
    with pytest.raises(UserError):
        calibrate(model, config, failing_after(2), progress_bar=False)
    assert config.statistics is None
