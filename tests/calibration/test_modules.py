"""Modules that are not just called once with a batch of sequences."""

import re

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_jactus import JactusConfig, calibrate
from tests.support import oracles
from tests.support.comparisons import assert_moments_close, assert_same_statistics, assert_statistics_of
from tests.support.strategies import randn
from tests.support.tiny_models import FLOAT64


def square_loss(model, batch):
    return model(batch["x"]).square().sum()


def run_on_vectors(model, x):
    config = JactusConfig(target_modules="all-linear")
    options = {"loss_fn": square_loss, "loss_reduction": "sum", "progress_bar": False}
    return calibrate(model, config, [{"x": x}], **options)


def vectors_tokens(model, names, x):
    """The oracle runs each vector alone."""
    return oracles.calibration_tokens(model, names, [{"x": row} for row in x.split(1)], square_loss)


def two_layers(*between):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), *between, nn.Linear(6, 3)).double()


@pytest.mark.parametrize("shape", [(10, 4), (2, 5, 4)], ids=["vectors", "sequences"])  # an output of these is a view
@pytest.mark.parametrize("frozen_below", [True, False])
def test_an_operation_in_place_on_the_output_changes_nothing(frozen_below, shape):
    """Also for the first layer, whose output starts the graph."""
    below = [] if frozen_below else [nn.Linear(4, 4).double()]
    in_place = nn.Sequential(*below, *two_layers(nn.ReLU(inplace=True)))
    out_of_place = nn.Sequential(*below, *two_layers(nn.ReLU()))
    x = randn(0, *shape)
    assert_same_statistics(run_on_vectors(in_place, x), run_on_vectors(out_of_place, x))


class PositionsFirst(nn.Linear):
    """Its output is a view that has another order than what was computed."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class Twice(nn.Module):
    """A layer that is called twice, whose first output is changed before the second call."""

    def __init__(self, layer_class, change, checkpointing):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.below, self.layer = nn.Linear(4, 6).double(), layer_class(6, 6).double()
        self.change, self.checkpointing = change, checkpointing

    def forward(self, x):
        x = self.below(x).tanh()
        if self.checkpointing is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.checkpointing == "reentrant")

    def block(self, x):
        return self.layer(self.change(self.layer(x)))


def change_a_part_(x):
    x[..., :2] = 0
    return x.mul_(2)


def change_a_part(x):
    return 2 * torch.cat([torch.zeros_like(x[..., :2]), x[..., 2:]], dim=-1)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "saved tensors"])
@pytest.mark.parametrize("layer_class", [nn.Linear, PositionsFirst])
@pytest.mark.parametrize(
    ("in_place", "out_of_place"), [(torch.relu_, torch.relu), (change_a_part_, change_a_part)], ids=["all", "a part"]
)
def test_nor_does_it_at_one_of_several_calls(layer_class, in_place, out_of_place, checkpointing):
    x = randn(0, 2, 5, 4)
    found = run_on_vectors(Twice(layer_class, in_place, checkpointing), x)
    assert found["layer"].num_tokens == 20
    model = Twice(layer_class, out_of_place, None)
    assert_same_statistics(found, run_on_vectors(model, x))
    assert_statistics_of(found, vectors_tokens(model, ["below", "layer"], x))


class Repeated(nn.Module):
    """Two layers read one tensor; one of them reads it again, and then something else."""

    def __init__(self):
        super().__init__()
        self.linear, self.other = two_layers()[0], two_layers()[0]

    def forward(self, x):
        return self.linear(x) + self.other(x) + self.linear(x).tanh() + self.linear(x.square())


def test_every_call_of_a_repeated_layer_is_counted():
    model, x = Repeated(), randn(0, 5, 4)
    assert_statistics_of(run_on_vectors(model, x), vectors_tokens(model, ["linear", "other"], x))


class Reshaped(nn.Module):
    """Sees tokens in one dimension, as experts do, or every second one."""

    def __init__(self, reshape):
        super().__init__()
        self.linear, self.reshape = two_layers()[0], reshape

    def forward(self, x):
        return self.linear(self.reshape(x))


def run_masked(model):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    batch = {"x": randn(0, 2, 4, 4), "attention_mask": mask}
    config = JactusConfig(target_modules="all-linear")
    statistics = calibrate(model, config, [batch], loss_fn=square_loss, loss_reduction="sum", progress_bar=False)
    return statistics["linear"], batch["x"][mask.bool()]


def test_the_mask_fits_tokens_that_were_flattened(caplog):
    layer, kept = run_masked(Reshaped(lambda x: x.flatten(0, 1)))
    assert layer.num_tokens == 5
    assert_moments_close(layer.input, oracles.covariance(kept), oracles.mean(kept), rtol=FLOAT64, what="linear")
    assert not said_of_masks(caplog)


def said_of_masks(caplog):
    return [record.getMessage() for record in caplog.records if "position_masks" in record.name]


def test_padding_that_cannot_be_told_apart_is_counted_with_a_warning(caplog):
    layer, _ = run_masked(Reshaped(lambda x: x[:, ::2]))
    assert layer.num_tokens == 4
    (message,) = said_of_masks(caplog)
    assert re.match(r"linear: its input of shape \(2, 2, 4\) does not fit .*\(2, 4\)", message)


class Routed(nn.Module):
    """Two experts that see the tokens with a positive and a negative first entry; without any, they are not called."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([two_layers()[0], two_layers()[0]])

    def forward(self, x):
        positive = x[:, 0] > 0
        output = x.new_zeros(len(x), 6)
        for expert, chosen in zip(self.experts, (positive, ~positive), strict=True):
            if chosen.any():
                output = output.index_put((chosen.nonzero()[:, 0],), expert(x[chosen]))
        return output


def test_experts_count_the_tokens_that_are_routed_to_them():
    x = randn(0, 12, 4)
    statistics = run_on_vectors(Routed(), x)
    num_positive = int((x[:, 0] > 0).sum())
    assert 0 < num_positive < 12
    for name, num_tokens, vectors in (
        ("experts.0", num_positive, x[x[:, 0] > 0]),
        ("experts.1", 12 - num_positive, x[x[:, 0] <= 0]),
    ):
        assert statistics[name].num_tokens == statistics[name].input.num_tokens == num_tokens
        covariance, mean = oracles.covariance(vectors), oracles.mean(vectors)
        assert_moments_close(statistics[name].input, covariance, mean, rtol=FLOAT64, what=name)


def test_experts_that_one_part_of_the_data_misses_are_continued(tmp_path):
    """The saved part has met the first expert alone, the rest the second, and the whole both."""

    def interrupted():
        yield parts[0]
        raise KeyboardInterrupt

    x = randn(0, 12, 4)
    positive = x[:, 0] > 0
    parts = [{"x": x[positive]}, {"x": x[~positive]}]
    options = {"loss_fn": square_loss, "loss_reduction": "sum", "progress_bar": False}
    config = JactusConfig(target_modules="all-linear")
    path = tmp_path / "statistics"
    with pytest.raises(KeyboardInterrupt):
        calibrate(Routed(), config, interrupted(), statistics_file=path, save_every=1, **options)
    resumed = calibrate(Routed(), config, parts, statistics_file=path, **options)
    assert_same_statistics(resumed, calibrate(Routed(), config, parts, **options))


class CalledByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = two_layers()[0]

    def forward(self, x):
        return self.linear(input=x)


def test_a_layer_may_be_called_with_a_keyword():
    x = randn(0, 5, 4)
    by_position, by_keyword = nn.ModuleDict({"linear": two_layers()[0]}), CalledByKeyword()
    by_position.forward = lambda x: by_position.linear(x)
    assert_same_statistics(run_on_vectors(by_keyword, x), run_on_vectors(by_position, x))


def test_a_layer_with_an_input_that_never_varies_can_be_compressed():
    """In float32 over many batches; with a bias, in the metric around the mean."""
    model = two_layers(nn.Tanh()).float()
    batches = [{"x": randn(seed, 256, 4).float()} for seed in range(100)]
    for batch in batches:
        batch["x"][:, 3] = 30.1
    config = JactusConfig(target_modules="all-linear", retained_ratio=0.6)
    options = {"loss_fn": square_loss, "loss_reduction": "sum", "progress_bar": False}
    statistics = calibrate(model, config, batches, **options)
    x = torch.cat([batch["x"] for batch in batches]).double()
    mean = x.mean(0)
    around_mean = (x - mean).mT @ (x - mean) / len(x) + torch.outer(mean, mean) / len(x)
    torch.testing.assert_close(statistics["0"].input.centred_covariance, around_mean, rtol=1e-4, atol=1e-5)
    compressed = get_peft_model(model, config)
    assert torch.isfinite(compressed(x.float())).all()
