"""The tuner through PEFT's public API, as a user calls it."""

import copy
import io
import re
from contextlib import redirect_stdout

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_jactus import JactusConfig, NumericalWarning, calibrate, plot_ranks, rank_summary
from peft_jactus.tuner.layer import JactusLayer
from tests.support.compressed_models import (
    VOCABULARY,
    batches_for,
    calibrated,
    compressed,
    jactus_config,
    logits_of,
    perturb_cores_,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)

# One float32 product after another, in another order: some units in the last place of logits of order one.
FLOAT32_REORDERED = {"rtol": 1e-4, "atol": 1e-5}
BUILDERS = [tiny_bert, tiny_llama, tiny_gpt2]


def jactus_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, JactusLayer)}


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_budget_is_kept(build, storage, allocation):
    model = compressed(build(), storage=storage, allocation=allocation)
    summary = rank_summary(model)
    assert 0.5 < summary.retained_ratio <= 0.6
    assert {row.name for row in summary.rows} == set(model.peft_config["default"].layer_ranks)


def test_layers_know_the_switch_for_casting_inputs():
    model = compressed(tiny_bert())
    expected = logits_of(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits_of(model), expected)
    assert all(layer.cast_input_dtype_enabled for layer in jactus_layers(model).values())


@pytest.mark.parametrize("build", BUILDERS)
def test_full_rank_reproduces_the_model(build):
    dense = logits_of(build())
    model = compressed(build(), rank_pattern={".*": 999})
    torch.testing.assert_close(logits_of(model), dense, **FLOAT32_REORDERED)


def test_error_shrinks_with_the_retained_ratio():
    dense = logits_of(tiny_bert())
    errors = [
        float((logits_of(compressed(tiny_bert(), retained_ratio=ratio, allocation="uniform")) - dense).norm())
        for ratio in (0.2, 0.5, 0.9)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(("adaptation_rank", "trains"), [(0, {"core"}), (32, {"adapt_down", "adapt_up"})])
def test_dense_weights_are_freed_and_nothing_trains_but_the_adapter_and_the_head(adaptation_rank, trains):
    model = compressed(tiny_bert(), adaptation_rank=adaptation_rank)
    for name, layer in jactus_layers(model).items():
        assert layer.base_layer.weight.numel() == 0, name
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_the_adapter = {name for name in trainable if "classifier" not in name}
    assert {name.split(".jactus_")[1] for name in of_the_adapter} == {f"{name}.default" for name in trains}
    assert len(of_the_adapter) == len(trains) * len(jactus_layers(model)) < len(trainable)


def test_printed_totals_count_the_frozen_bases():
    model = compressed(tiny_bert())
    with redirect_stdout(io.StringIO()) as printed:
        model.print_trainable_parameters()
    total = int(re.search(r"all params: ([\d,]+)", printed.getvalue()).group(1).replace(",", ""))
    stored = sum(tensor.numel() for tensor in model.state_dict().values() if tensor.is_floating_point())
    assert total == stored
    lora = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    assert lora.get_nb_trainable_parameters()[1] == sum(parameter.numel() for parameter in lora.parameters())


@pytest.mark.parametrize("build", BUILDERS)
def test_bases_held_as_parameters_change_nothing_that_a_user_sees(build, tmp_path):
    model = compressed(build())
    (batch,) = batches_for(model.get_base_model(), num_batches=1)
    buffers = {name for name, _ in model.named_buffers() if "jactus_left" in name}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    counted, state = model.get_nb_trainable_parameters(), model.state_dict()
    with torch.no_grad():
        expected = model(**batch).logits
    model.make_shardable()
    model.make_shardable()  # twice is as good as once
    parameters = dict(model.named_parameters())
    assert {name for name in buffers if name in parameters and parameters[name].numel()}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == trainable
    assert model.get_nb_trainable_parameters() == counted
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(**batch).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, **FLOAT32_REORDERED)
    model.set_adapter("default")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, **FLOAT32_REORDERED)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("keep_base_weights", [False, True])
def test_merge_and_unload_gives_plain_dense_modules(build, keep_base_weights):
    model = compressed(build(), keep_base_weights=keep_base_weights)
    perturb_cores_(model)
    expected = logits_of(model)
    merged = model.merge_and_unload(safe_merge=True)
    kinds = {type(module) for module in merged.modules() if isinstance(module, (nn.Linear, Conv1D, JactusLayer))}
    assert kinds <= {nn.Linear, Conv1D}
    torch.testing.assert_close(logits_of(merged), expected, **FLOAT32_REORDERED)


@pytest.mark.parametrize("keep_base_weights", [False, True])
def test_unmerge_restores_the_adapter_exactly(keep_base_weights):
    model = compressed(tiny_bert(), keep_base_weights=keep_base_weights)
    before = logits_of(model)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model), before, **FLOAT32_REORDERED)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model), before)


def test_disable_adapter_runs_the_dense_model_if_it_was_kept():
    dense = tiny_llama()
    expected = logits_of(dense)
    model = compressed(dense, keep_base_weights=True)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    assert not torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decomposition": "svd"},
        {"bias_correction": False},
        {"bias_correction": False, "rank_pattern": {".*": 999}},
        {"bias_correction": False, "rank_pattern": {".*": 999}, "adaptation_rank": 0},
        {"bias_correction": False, "adaptation_space": "retained"},
        {"bias_correction": False, "frozen_bits": 8},
    ],
)
def test_what_is_written_into_an_adapter_does_not_reach_the_dense_model(fields, build, dtype):
    model = build(dtype=dtype)
    expected = logits_of(model)
    places = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    model = compressed(model, keep_base_weights=True, **fields)
    for layer in jactus_layers(model).values():
        for tensor in layer.adapter_tensors("default").values():
            assert not tensor.numel() or tensor.untyped_storage().data_ptr() not in places
            tensor.detach().fill_(1)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.disable_adapter().__enter__(),
        lambda model: model.unload(),
        lambda model: model.delete_adapter("default"),
        lambda model: model.add_adapter("second", jactus_config(model.get_base_model(), decomposition="svd")),
    ],
    ids=["disable_adapter", "unload", "delete_adapter", "add_adapter"],
)
def test_what_needs_freed_weights_says_so_and_changes_nothing(use):
    model = compressed(tiny_llama())
    before = logits_of(model)
    with pytest.raises(ValueError, match="keep_base_weights=True"):
        use(model)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), before)


def test_the_difference_to_the_dense_weight_is_the_same_while_merged():
    model = compressed(tiny_llama(), keep_base_weights=True)
    layer = next(iter(jactus_layers(model).values()))
    difference = layer.get_delta_weight("default")
    assert difference.norm() > 0
    model.merge_adapter()
    assert torch.equal(layer.get_delta_weight("default"), difference)


def test_two_computed_adapters_switch():
    model = compressed(tiny_bert(), keep_base_weights=True)
    first = logits_of(model)
    config = jactus_config(model.get_base_model(), decomposition="svd", retained_ratio=0.3)
    model.add_adapter("second", config)
    model.set_adapter("second")
    second = logits_of(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits_of(model), first)


def test_a_further_adapter_is_computed_from_the_dense_model():
    expected = calibrated(tiny_bert()).statistics
    model = compressed(tiny_bert(), retained_ratio=0.2, keep_base_weights=True)
    config = calibrated(model, retained_ratio=0.5)
    for name, layer in config.statistics.items():
        torch.testing.assert_close(layer.input.covariance, expected[name].input.covariance)
        torch.testing.assert_close(layer.gradient.covariance, expected[name].gradient.covariance)
    before = logits_of(model)  # the first adapter is back

    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the dense weights.*`unmerge_adapter` first"):
        model.add_adapter("second", config)
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(logits_of(model), before)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert torch.equal(logits_of(model), logits_of(compressed(tiny_bert(), retained_ratio=0.5)))


def test_statistics_do_not_change_a_decomposition_that_needs_none():
    expected = compressed(tiny_bert(), decomposition="svd")
    config = jactus_config(tiny_bert(), decomposition="svd")
    config.statistics = calibrated(tiny_bert()).statistics
    assert torch.equal(logits_of(get_peft_model(tiny_bert(), config)), logits_of(expected))


def test_training_moves_cores_only_and_lowers_the_loss():
    model = compressed(tiny_bert(), adaptation_rank=0).train()
    batch = batches_for(model.get_base_model())[0]
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "core" not in name}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    for name, value in model.state_dict().items():
        if name in frozen and "modules_to_save" not in name:
            assert torch.equal(value, frozen[name]), name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("fields", [{"adaptation_rank": 0}, {}, {"adaptation_space": "retained"}])
def test_gradient_checkpointing_gives_the_same_gradients(fields):
    gradients = []
    for checkpointing in (False, True):
        model = compressed(tiny_llama(), **fields).train()
        perturb_cores_(model)  # B has to leave zero, or A gets no gradient
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batches_for(model.get_base_model())[0]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        assert all(gradient.abs().max() > 0 for gradient in gradients[-1])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, **FLOAT32_REORDERED)


@pytest.mark.parametrize("fields", [{}, {"adaptation_space": "retained"}])
def test_torch_compile_needs_no_graph_break(fields):
    model = compressed(tiny_bert(), **fields)
    batch = {key: value for key, value in batches_for(model.get_base_model())[0].items() if key != "labels"}
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, logits_of(model), **FLOAT32_REORDERED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_float32_cores(dtype):
    model = compressed(tiny_bert(dtype=dtype), adaptation_rank=0)
    for layer in jactus_layers(model).values():
        tensors = layer.adapter_tensors("default")
        assert tensors["jactus_core"].dtype == torch.float32
        assert tensors["jactus_left"].dtype == tensors["jactus_right"].dtype == dtype
    assert logits_of(model).dtype == dtype


@pytest.mark.parametrize("retained_ratio", [0.5, 1.0])
def test_outputs_have_the_dtype_of_those_of_a_linear_layer_under_autocast(retained_ratio):
    x = torch.randn(4, 64)
    plain = nn.Sequential(nn.Linear(64, 128))
    config = JactusConfig(target_modules=["0"], decomposition="svd", retained_ratio=retained_ratio)
    tuned = get_peft_model(copy.deepcopy(plain), config)
    assert tuned(x).dtype == plain(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert tuned(x).dtype == plain(x).dtype == torch.bfloat16


def test_model_status_knows_the_adapter():
    status = compressed(tiny_bert()).get_model_status()
    assert status.peft_types == {"default": "JACTUS"}
    assert status.enabled is True
    assert status.active_adapters == ["default"]


def test_mixed_batches_are_refused():
    model = compressed(tiny_bert(), keep_base_weights=True)
    batch = batches_for(model.get_base_model())[0]
    with pytest.raises(ValueError, match="adapter_names"):
        model(**batch, adapter_names=["default"] * 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Embedding(4, 4)), "0 is a Embedding"),
        (lambda: nn.ModuleDict({"0": nn.Conv2d(1, 1, 1)}), "0 is a Conv2d"),
        (lambda: get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])).model, "lora"),
    ],
    ids=["embedding", "convolution", "lora layer"],
)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
def test_unsupported_layers_are_refused_by_name(build, message):
    config = JactusConfig(target_modules=["0"], decomposition="svd")
    with pytest.raises(TypeError, match=message):
        get_peft_model(build(), config)


def test_attention_that_reads_its_projection_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TypeError, match=r"attention\.out_proj belongs to an nn\.MultiheadAttention"):
        get_peft_model(model, JactusConfig(target_modules=["out_proj"], decomposition="svd"))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_computes_more_than_its_product_is_left_alone_or_refused():
    model = nn.Sequential(nn.Linear(4, 4), Doubling(4, 4))
    with pytest.raises(TypeError, match="1 is a Doubling, which computes more"):
        get_peft_model(copy.deepcopy(model), JactusConfig(target_modules=["0", "1"], decomposition="svd"))
    tuned = get_peft_model(model, JactusConfig(target_modules="all-linear", decomposition="svd"))
    assert set(jactus_layers(tuned.get_base_model())) == {"0"}


@pytest.mark.parametrize(
    ("model_class", "task_type", "head"),
    [
        (transformers.BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (transformers.BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
        (transformers.RobertaForSequenceClassification, "SEQ_CLS", "classifier"),
    ],
)
def test_all_linear_leaves_the_head_that_peft_trains_whole(model_class, task_type, head):
    config = model_class.config_class(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = model_class(config)
    num_layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    num_in_head = sum(isinstance(module, nn.Linear) for module in model.get_submodule(head).modules())
    inputs = {"input_ids": torch.randint(2, VOCABULARY, (4, 8))}
    positions = {"start_positions": torch.zeros(4).long(), "end_positions": torch.ones(4).long()}
    labels = {"TOKEN_CLS": {"labels": torch.ones(4, 8).long()}, "SEQ_CLS": {"labels": torch.ones(4).long()}}
    jactus = JactusConfig(task_type=task_type, target_modules="all-linear")
    statistics = calibrate(model, jactus, [inputs | labels.get(task_type, positions)], progress_bar=False)
    tuned = get_peft_model(model, jactus)
    assert set(statistics) == set(jactus_layers(tuned.get_base_model()))
    assert len(statistics) == num_layers - num_in_head
    assert {name for name, p in tuned.get_base_model().named_parameters() if p.requires_grad and head in name}


def test_a_budget_that_is_out_of_reach_is_said():
    with pytest.warns(NumericalWarning, match=r"`retained_ratio`=0.001 cannot be reached: 0.0\d+ of the"):
        model = compressed(tiny_bert(), retained_ratio=0.001)
    assert {layer.r["default"] for layer in jactus_layers(model).values()} == {1}


def test_the_config_of_a_saved_adapter_computes_nothing_unless_asked_to(tmp_path):
    compressed(tiny_bert()).save_pretrained(tmp_path)
    config, model = JactusConfig.from_pretrained(tmp_path), tiny_bert()
    expected = logits_of(compressed(tiny_bert()))
    calibrate(model, config, batches_for(model), progress_bar=False)
    with pytest.raises(ValueError, match=r"Set `config\.init_weights = True` to compute new values"):
        get_peft_model(model, config)
    assert not jactus_layers(model)
    config.init_weights, config.inference_mode = True, False
    assert torch.equal(logits_of(get_peft_model(model, config)), expected)


def test_statistics_of_another_model_are_refused_before_anything_changes():
    model, other = tiny_bert(), tiny_llama()
    config = jactus_config(model)
    config.statistics = calibrate(other, jactus_config(other), batches_for(other), progress_bar=False)
    with pytest.raises(ValueError, match=r"has no statistics of bert\.encoder\.layer\.0"):
        get_peft_model(model, config)
    assert not jactus_layers(model)


def test_statistics_are_let_go_after_injection():
    model = tiny_bert()
    config = jactus_config(model)
    statistics = calibrate(model, config, batches_for(model), progress_bar=False)
    assert config.statistics is statistics
    get_peft_model(model, config)
    assert config.statistics is None


def test_saved_statistics_give_the_same_factors():
    first = compressed(tiny_bert())
    model = tiny_bert()
    config = jactus_config(model)
    config.statistics = calibrate(copy.deepcopy(model), jactus_config(model), batches_for(model), progress_bar=False)
    assert torch.equal(logits_of(get_peft_model(model, config).eval()), logits_of(first))


def test_rank_pattern_decides_and_is_paid_from_the_budget():
    model = compressed(tiny_bert(), rank_pattern={r"layer\.0\.attention\.self\.query": 3})
    summary = rank_summary(model)
    assert {row.rank for row in summary.rows if row.name.endswith("layer.0.attention.self.query")} == {3}
    assert summary.retained_ratio <= 0.6


def test_summary_prints_a_row_for_each_layer_and_the_plot_has_a_line_for_each_projection(tmp_path):
    model = compressed(tiny_bert())
    summary = rank_summary(model)
    text = str(summary)
    assert len(text.splitlines()) == len(summary.rows) + 3  # head, targeted layers, whole model
    for row in summary.rows:
        assert re.search(rf"^{re.escape(row.name)}\s+{row.out_features} x {row.in_features} ", text, re.MULTILINE)
        assert 0 < row.energy_kept <= 1
    figure = plot_ranks(model)
    labels = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert {"attention.self.query", "intermediate.dense", "output.dense"} <= labels
    figure.savefig(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 1000


def test_summary_of_a_model_without_adapter_says_so():
    with pytest.raises(ValueError, match="no JACTUS adapter named 'default'"):
        rank_summary(tiny_bert())
    lora = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    assert isinstance(lora, PeftModel)
    with pytest.raises(ValueError, match="no JACTUS adapter"):
        rank_summary(lora)
