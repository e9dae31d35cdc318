"""What `calibrate` refuses, and that it says which module, what came, and what to do."""

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_jactus import JactusConfig, calibrate
from tests.support.strategies import randn
from tests.support.tiny_models import classified_texts, collate, tiny_bert

QUERY = "bert.encoder.layer.0.attention.self.query"


def run(model, batches=None, *, targets=r".*query", exclude=None, **options):
    config = JactusConfig(target_modules=targets, exclude_modules=exclude)
    batches = classified_texts() if batches is None else batches
    return calibrate(model, config, batches, progress_bar=False, **options)


# -- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
def test_no_batches(batches):
    with pytest.raises(ValueError, match="`batches` is empty"):
        run(tiny_bert(), batches)


def test_a_batch_that_is_no_mapping():
    with pytest.raises(TypeError, match=r"`batches` must yield mappings.*got a Tensor"):
        run(tiny_bert(), [torch.zeros(1, 3, dtype=torch.long)])


@pytest.mark.parametrize("form", ["lists", "torch"])
def test_rows_in_place_of_batches(form):
    texts = collate(classified_texts())
    rows = datasets.Dataset.from_dict({name: tensor.tolist() for name, tensor in texts.items()})
    with pytest.raises(TypeError, match=r"input_ids.*one row of a data set.*DataLoader\(.*get_train_dataloader\(\)"):
        run(tiny_bert(), rows.with_format("torch") if form == "torch" else rows)


def test_a_model_of_ones_own_may_take_what_it_likes():
    class OfWords(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, words):
            lengths = torch.tensor([[len(word), 1.0] for word in words])
            return {"loss": self.layer(lengths).square().sum()}

    config = JactusConfig(target_modules=["layer"])
    batch = {"words": ["one", "three"]}
    statistics = calibrate(OfWords(), config, [batch], loss_reduction="sum", progress_bar=False)
    assert statistics["layer"].num_tokens == 2


@pytest.mark.parametrize("options", [{"max_batches": 0}, {"save_every": 0}])
def test_counts_below_one(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1; got 0"):
        run(tiny_bert(), **options)


def test_a_negative_number_of_warm_up_steps():
    with pytest.raises(ValueError, match="`head_warmup_steps` must be at least 0; got -5"):
        run(tiny_bert(), head_warmup_steps=-5)


# -- the loss ---------------------------------------------------------------------------------------------


def test_no_labels_no_loss():
    batch = collate(classified_texts())
    del batch["labels"]
    with pytest.raises(ValueError, match=r"output has no loss. The batch has .* Put labels .*`labels`.*`loss_fn"):
        run(tiny_bert(), [batch])


def test_labels_under_another_name():
    class TakesAnything(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = tiny_bert().bert

        def forward(self, input_ids, attention_mask, **others):
            return self.bert(input_ids, attention_mask)

    batch = collate(classified_texts())
    batch["label"] = batch.pop("labels")
    with pytest.raises(
        ValueError, match=r"has \['attention_mask', 'input_ids', 'label'.*labels under the name `labels`"
    ):
        run(TakesAnything(), [batch])


@pytest.mark.parametrize("result", [None, 1.0, torch.ones(2)], ids=str)
def test_a_loss_function_that_returns_no_scalar(result):
    with pytest.raises(ValueError, match="`loss_fn` returned no scalar"):
        run(tiny_bert(), loss_fn=lambda model, batch: result)


def test_a_loss_function_that_detaches():
    with pytest.raises(ValueError, match=r"does not depend on any targeted module.*`loss_fn`"):
        run(tiny_bert(), loss_fn=lambda model, batch: model(**batch).loss.detach())


def test_an_unknown_reduction():
    with pytest.raises(ValueError, match="`loss_reduction` must be 'mean' or 'sum'; got 'none'"):
        run(tiny_bert(), loss_reduction="none")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite(value):
    def loss_fn(model, batch):
        factor = float(value) if batch["labels"].item() == 1 else 1.0
        return model(**batch).loss * factor

    with pytest.raises(ValueError, match=f"loss of calibration batch 1 is {value}"):
        run(tiny_bert(), loss_fn=loss_fn)


def test_a_gradient_that_is_not_finite_names_the_module():
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    def loss_fn(model, batch):
        return Overflow.apply(model(**batch).loss)

    with pytest.raises(ValueError, match=f"^{QUERY}, {QUERY.replace('0', '1')}: its inputs or gradients"):
        run(tiny_bert(), loss_fn=loss_fn)


# -- modules that nothing reaches -------------------------------------------------------------------------


class Forked(nn.Module):
    """`unused` is never called, `ignored` does not reach the loss, `masked` is multiplied by zero."""

    def __init__(self):
        super().__init__()
        for name in ("used", "unused", "ignored", "masked"):
            setattr(self, name, nn.Linear(4, 4).double())

    def forward(self, x):
        self.ignored(x)
        return self.used(x) + 0 * self.masked(x)


def run_forked(targets):
    return run(
        Forked(),
        [{"x": randn(0, 5, 4)}],
        targets=targets,
        loss_fn=lambda model, batch: model(batch["x"]).square().sum(),
    )


@pytest.mark.parametrize("name", ["unused", "ignored"])
def test_a_module_that_no_token_reached(name):
    with pytest.raises(ValueError, match=f"^{name}: no calibration token reached it"):
        run_forked(["used", name])


def test_a_module_whose_input_is_zero():
    with pytest.raises(ValueError, match=r"(?s)^second: its inputs are zero everywhere.*`exclude_modules`"):
        run(Starved(), [{"x": randn(0, 5, 4)}], targets=["first", "second"], loss_fn=lambda model, b: model(b["x"]))


class Starved(nn.Module):
    """No value reaches `second`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x):
        return (self.first(x) + self.second(torch.zeros_like(x))).square().sum()


def test_a_module_whose_gradient_is_zero():
    with pytest.raises(ValueError, match=r"(?s)^masked: its gradient is zero everywhere.*`head_warmup_steps`"):
        run_forked(["used", "masked"])
    assert list(run_forked(["used"])) == ["used"]


def test_an_input_that_is_changed_in_place_after_the_layer_read_it():
    def loss_fn(model, batch):
        x = batch["x"].clone()
        y = model.used(x)
        x.add_(1)
        return y.square().sum()

    with pytest.raises(RuntimeError, match=r"^used: its input was changed in place"):
        run(Forked(), [{"x": randn(0, 5, 4)}], targets=["used"], loss_fn=loss_fn)


# -- modules that cannot be factorized --------------------------------------------------------------------


def test_an_embedding():
    with pytest.raises(TypeError, match=r"word_embeddings is a Embedding; only torch\.nn\.Linear"):
        run(tiny_bert(), targets=["query", "word_embeddings"])


class Int8Linear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


@pytest.mark.parametrize("targets", [["query"], "all-linear"])
@pytest.mark.parametrize("layer_class", [nn.Linear, Int8Linear])
def test_a_quantized_layer(layer_class, targets):
    model = tiny_bert()
    layer = layer_class(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    model.set_submodule(QUERY, layer)
    with pytest.raises(TypeError, match=f"{QUERY} is quantized"):
        run(model, targets=targets)


def test_a_layer_without_weights_in_memory():
    model = tiny_bert()
    model.get_submodule(QUERY).to("meta")
    with pytest.raises(TypeError, match=f"{QUERY} has no weight in memory"):
        run(model)


def test_a_projection_that_multi_head_attention_never_calls():
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(TypeError, match=r"0\.out_proj belongs to an nn\.MultiheadAttention"):
        run(model, targets=["out_proj"])


def test_a_layer_that_carries_another_adapter():
    model = inject_adapter_in_model(LoraConfig(target_modules=["query"]), tiny_bert())
    with pytest.raises(TypeError, match=f"{QUERY} already carries a peft.*lora.*`merge_and_unload`"):
        run(model)
    assert set(run(model, targets=["key"])) == {QUERY.replace("query", "key").replace("0", i) for i in "01"}


@pytest.mark.parametrize("limit", [None, "1MiB"])
def test_a_layer_that_was_compressed_without_its_dense_weight(limit):
    model = get_peft_model(tiny_bert(), JactusConfig(target_modules=["query"], decomposition="svd"))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=f"^{QUERY}: its dense weight was freed.*`keep_base_weights=True`"):
        run(model, targets=["query"], max_statistics_memory=limit)


def test_a_layer_that_an_adapter_is_merged_into():
    settings = JactusConfig(target_modules=["query"], decomposition="svd", keep_base_weights=True)
    model = get_peft_model(tiny_bert(), settings)
    model.merge_adapter()
    with pytest.raises(ValueError, match=f"^{QUERY}: an adapter is merged.*`unmerge_adapter`"):
        run(model, targets=["query"])


def test_excluded_modules_may_be_anything():
    statistics = run(tiny_bert(), targets=r".*(query|word_embeddings)", exclude=["word_embeddings"])
    assert len(statistics) == 2


@pytest.mark.parametrize("targets", [["no_such_layer"], r".*nowhere"])
def test_targets_that_match_nothing(targets):
    with pytest.raises(ValueError, match=r"`target_modules`=.* matches no module of BertFor"):
        run(tiny_bert(), targets=targets)


def test_all_linear_of_a_model_without_a_linear_layer_says_so():
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2))
    config = JactusConfig(target_modules="all-linear")
    with pytest.raises(
        ValueError, match=r"Sequential has nothing to compress: .*no linear layer that factors could replace"
    ):
        calibrate(model, config, [{"x": torch.ones(2, 3, 5)}], progress_bar=False)


def test_no_targets_for_a_model_that_peft_does_not_know():
    model = Forked()
    with pytest.raises(ValueError, match="`target_modules` must be given for Forked"):
        run(model, [{"x": randn(0, 5, 4)}], targets=None)


def test_errors_come_before_the_first_batch_is_read(tmp_path):
    def batches():
        pytest.fail("a batch was read")
        yield

    for targets in (["no_such_layer"], ["word_embeddings"]):
        with pytest.raises((ValueError, TypeError)):
            run(tiny_bert(), batches(), targets=targets)
    with pytest.raises(ValueError, match=r"`statistics_file` .* is a directory; give a file in it"):
        run(tiny_bert(), batches(), statistics_file=tmp_path)
