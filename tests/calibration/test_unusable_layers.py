"""Layers that calibration says nothing about, and weights that a model uses past their layer: named, or left dense."""

import copy
import logging

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.nn import functional

from peft_jactus import JactusConfig, calibrate, export_compressed
from peft_jactus.tuner.layer import JactusLayer
from tests.support.compressed_models import VOCABULARY, tiny_bert
from tests.support.strategies import randn

DIM = 6


class Uses(nn.Module):
    """Calls three layers, and does something with the weight of `odd` besides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.odd, self.last = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x):
        self.tamper()
        return self.last(torch.tanh(self.odd(self.first(x)) + self.past_the_layer(x)))

    def tamper(self):
        pass

    def past_the_layer(self, x):
        return 0


class Outer(nn.Module):
    """Has a layer that nobody calls, with the name that a layer in use ends with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.odd, self.block = nn.Linear(DIM, DIM), Uses()

    def forward(self, x):
        return self.block(x)


class Reads(Uses):
    def past_the_layer(self, x):
        return functional.linear(x, self.odd.weight)


class Stacks(Uses):
    def past_the_layer(self, x):
        return x @ torch.stack([self.odd.weight, self.first.weight.detach()]).sum(0)


class Clips(Uses):
    def tamper(self):
        with torch.no_grad():
            self.odd.weight.clamp_(-0.1, 0.1)


class ClipsData(Uses):
    def tamper(self):
        self.odd.weight.data.clamp_(-0.1, 0.1)


class Normalises(Uses):
    def tamper(self):
        self.odd.weight.data = functional.normalize(self.odd.weight.data)


class Replaces(Uses):
    def tamper(self):
        self.odd.weight = nn.Parameter(self.odd.weight.detach() * 0.99)


class ReplacesUnread(Uses):
    def tamper(self):
        self.odd.weight = nn.Parameter(torch.eye(DIM))


class ReplacesByTensor(Uses):
    def tamper(self):
        weight = self.odd.weight
        del self.odd.weight
        self.odd.weight = torch.eye(DIM).to(weight.dtype)


class Sums(Uses):
    def past_the_layer(self, x):
        return self.odd.weight.sum()


class AsksForDtype(Uses):
    def past_the_layer(self, x):
        assert self.odd.weight.device == x.device
        assert self.odd.weight.shape == (DIM, DIM)
        return x.to(self.odd.weight.dtype)


CULPRITS = [Reads, Sums, Stacks, Clips, ClipsData, Normalises, Replaces, ReplacesUnread]
BATCHES = [{"x": randn(seed, 4, DIM).float()} for seed in range(2)]


def loss_fn(model, batch):
    return model(batch["x"]).square().sum(1).mean()


def run(model, config, **options):
    return calibrate(model, config, BATCHES, loss_fn=loss_fn, progress_bar=False, **options)


def config_for(**options):
    return JactusConfig(target_modules="all-linear", **({"retained_ratio": 0.8} | options))


def tuned_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, JactusLayer)}


@pytest.mark.parametrize("excluded", [None, ["first"], {"first"}, "first|nothing"], ids=str)
def test_a_layer_is_left_dense_alone_though_another_name_ends_with_its_name(excluded):
    model, config = Outer(), config_for(exclude_modules=excluded)
    run(model, config, leave_unusable_dense=True)
    tuned = get_peft_model(model, config)
    names = {"block.odd", "block.last"} | ({"block.first"} if excluded is None or isinstance(excluded, str) else set())
    assert tuned_names(tuned.base_model.model) == names


# -- weights that are used past their layer ---------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_statistics_memory": "4KiB"}], ids=["one pass", "groups"])
@pytest.mark.parametrize("model_class", CULPRITS)
def test_calibration_refuses_a_weight_that_is_used_past_its_layer(model_class, options):
    model = model_class()
    with pytest.raises(
        ValueError, match=r"(?s)odd: the model uses its weight without calling the layer.*exclude_modules"
    ):
        run(model, config_for(), **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_all_of_them_are_named_after_the_first_batch():
    seen = []

    def counted(model, batch):
        seen.append(batch)
        return loss_fn(model, batch)

    message = r"^first: the model uses its weight.*`detach`.*\nodd: the model uses its weight.*`stack`"
    with pytest.raises(ValueError, match=message):
        calibrate(Stacks(), config_for(), BATCHES, loss_fn=counted, progress_bar=False)
    assert len(seen) == 1


@pytest.mark.parametrize("model_class", [Uses, AsksForDtype])
def test_metadata_of_a_weight_may_be_read(model_class):
    model, config = model_class(), config_for()
    run(model, config)
    tuned = get_peft_model(model, config)
    assert torch.isfinite(tuned(BATCHES[0]["x"])).all()


@pytest.mark.parametrize("keep_base_weights", [False, True])
@pytest.mark.parametrize("model_class", [*CULPRITS, ReplacesByTensor])
def test_a_compressed_model_refuses_it_too_where_nothing_was_calibrated(model_class, keep_base_weights):
    config = config_for(decomposition="svd", keep_base_weights=keep_base_weights)
    tuned = get_peft_model(model_class(), config)
    with pytest.raises(RuntimeError, match=r"^(odd|first): the model uses its weight without.*`exclude_modules`"):
        tuned(BATCHES[0]["x"])


def test_with_the_adapter_disabled_or_merged_the_dense_weight_is_what_the_model_reads():
    model, x = Reads(), BATCHES[0]["x"]
    expected = model(x)
    tuned = get_peft_model(model, config_for(decomposition="svd", keep_base_weights=True))
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(x), expected)
    tuned.merge_adapter()
    assert torch.isfinite(tuned(x)).all()


# Of torch's, when it resumes after what it did not compile.
resumes = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@resumes
@pytest.mark.parametrize("keep_base_weights", [False, True])
@pytest.mark.parametrize("model_class", [Reads, Sums, Clips, ClipsData, ReplacesUnread])
def test_a_compressed_model_refuses_it_under_compile_too(model_class, keep_base_weights):
    torch._dynamo.reset()
    tuned = get_peft_model(model_class(), config_for(decomposition="svd", keep_base_weights=keep_base_weights))
    compiled = torch.compile(tuned, backend="eager")
    with pytest.raises(RuntimeError, match=r"odd: the model uses its weight without.*`exclude_modules`"):
        compiled(BATCHES[0]["x"])


@pytest.mark.parametrize("keep_base_weights", [False, True])
def test_metadata_may_be_read_under_compile_in_one_graph(keep_base_weights):
    torch._dynamo.reset()
    config = config_for(decomposition="svd", keep_base_weights=keep_base_weights)
    tuned, x = get_peft_model(AsksForDtype(), config), BATCHES[0]["x"]
    torch.testing.assert_close(torch.compile(tuned, backend="eager", fullgraph=True)(x), tuned(x))


def test_functional_call_refuses_a_dense_weight_for_a_compressed_layer():
    dense = Uses()
    parameters = {name: parameter.detach().clone() for name, parameter in dense.named_parameters()}
    get_peft_model(dense, config_for(decomposition="svd"))  # in place
    with pytest.raises(RuntimeError, match=r"(first|odd|last): the model uses its weight without"):
        torch.func.functional_call(dense, parameters, (BATCHES[0]["x"],))


class Loadable(transformers.PreTrainedModel):
    config_class = transformers.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = Uses()
        self.post_init()

    def forward(self, x):
        return self.layer(x)


def deployed(folder, storage, model_class=Uses, bits=None):
    """Return a compressed model, exported and loaded, whose code then is that of ``model_class``."""
    config = config_for(decomposition="svd", storage=storage, adaptation_rank=0, retained_ratio=0.5)
    tuned = get_peft_model(Loadable(transformers.BertConfig()), config)
    export_compressed(tuned, folder, bits=bits)
    loaded = Loadable.from_pretrained(folder)
    loaded.layer.__class__ = model_class
    return loaded, tuned


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_a_deployed_layer_refuses_it_too(storage, tmp_path):
    loaded, tuned = deployed(tmp_path / "compressed", storage)
    x = BATCHES[0]["x"]
    torch.testing.assert_close(loaded(x), tuned(x))
    weight = loaded.layer.odd.weight
    assert (weight.dtype, weight.device) == (x.dtype, x.device)
    with pytest.raises(
        RuntimeError, match=r"^A (ColumnPivoted|LowRank)Linear \(6 x 6\) has no dense weight.*`exclude_modules`"
    ):
        weight.data.clamp_(-1, 1)


@resumes
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("model_class", [Reads, Sums, Clips, ReplacesUnread])
def test_so_does_a_deployed_model_compiled_or_not(model_class, storage, compiled, tmp_path):
    torch._dynamo.reset()
    model, _ = deployed(tmp_path / "compressed", storage, model_class)
    run_model = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(RuntimeError, match=r"A (ColumnPivoted|LowRank)Linear \(6 x 6\) has no dense weight"):
        run_model(BATCHES[0]["x"])


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_metadata_of_a_deployed_weight_may_be_read_under_compile(storage, tmp_path):
    torch._dynamo.reset()
    model, _ = deployed(tmp_path / "compressed", storage, AsksForDtype)
    x = BATCHES[0]["x"]
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_no_dense_weight_can_be_put_into_a_deployed_layer(storage, bits, tmp_path):
    model, _ = deployed(tmp_path / "compressed", storage, bits=bits)
    for weight in (nn.Parameter(torch.eye(DIM)), torch.eye(DIM)):
        with pytest.raises(RuntimeError, match=r"^A (ColumnPivoted|LowRank)Linear \(6 x 6\) has no dense weight"):
            model.layer.odd.weight = weight
    with pytest.raises(RuntimeError, match=r"^A (ColumnPivoted|LowRank)Linear \(6 x 6\) has no dense weight"):
        torch.func.functional_call(model, {"layer.odd.weight": torch.eye(DIM)}, (BATCHES[0]["x"],))


def test_transformer_layers_of_torch_do_not_take_their_fast_path_past_the_factors():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1, enable_nested_tensor=False
    ).eval()
    config = JactusConfig(target_modules=["linear1", "linear2"], decomposition="svd", retained_ratio=0.5)
    tuned, x = get_peft_model(model, config).eval(), torch.randn(2, 3, 8)
    slow = tuned(x)  # with gradients it takes the slow one
    with torch.no_grad():
        torch.testing.assert_close(tuned(x), slow.detach())


# -- layers that nothing reaches --------------------------------------------------------------------------


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM))
        self.vision = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM))

    def forward(self, x):
        return self.text(x)


@pytest.mark.parametrize("options", [{}, {"max_statistics_memory": "4KiB"}], ids=["one pass", "groups"])
def test_all_layers_that_no_token_reached_are_named_at_once(options):
    with pytest.raises(
        ValueError, match=r"(?s)^vision\.0, vision\.1: no calibration token reached it.*leave_unusable_dense"
    ):
        run(TwoTowers(), config_for(), **options)


@pytest.mark.parametrize("exclude", [None, ["text.1"], r"text\.1"])
@pytest.mark.parametrize("options", [{}, {"max_statistics_memory": "4KiB"}], ids=["one pass", "groups"])
def test_they_are_left_dense_by_choice(options, exclude, caplog):
    model, config = TwoTowers(), config_for(exclude_modules=exclude)
    with caplog.at_level(logging.WARNING):
        run(model, config, leave_unusable_dense=True, **options)
    assert (
        "Left dense, added to `exclude_modules`:\nvision.0, vision.1: no calibration token reached it" in caplog.text
    )
    dense = copy.deepcopy(model.vision)
    tuned = get_peft_model(model, config)
    expected = {"base_model.model.text.0"} | ({"base_model.model.text.1"} if exclude is None else set())
    assert tuned_names(tuned) == expected
    assert torch.equal(model.vision[0].weight, dense[0].weight)


def test_a_statistics_file_of_such_a_run_serves_again(tmp_path):
    path = tmp_path / "statistics.safetensors"
    run(TwoTowers(), config_for(), leave_unusable_dense=True, statistics_file=path)
    with pytest.raises(ValueError, match=r"^vision\.0, vision\.1: no calibration token"):
        run(TwoTowers(), config_for(), statistics_file=path)
    config = config_for()
    run(TwoTowers(), config, leave_unusable_dense=True, statistics_file=path)
    assert config.exclude_modules == ["vision.0", "vision.1"]


def test_a_model_without_odd_uses_is_not_spoken_of(caplog):
    model, config = tiny_bert(), JactusConfig(target_modules=["query"])
    ids = torch.randint(2, VOCABULARY, (2, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
    calibrate(model, config, [batch], leave_unusable_dense=True, progress_bar=False)
    assert config.exclude_modules is None
    assert not caplog.records
