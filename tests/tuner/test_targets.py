"""Which layers are targeted, which are refused, and which 'all-linear' leaves dense: before anything is changed."""

import copy
import functools
import logging
import time

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from peft_jactus import JactusConfig, calibrate, export_compressed, plan_ranks, rank_summary
from peft_jactus.cli.inspect import inspect_folder
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.target_checks import used_elsewhere
from peft_jactus.tuner.targeting import DEFAULT_TARGET_MODULES, log_once
from tests.support.compressed_models import jactus_config, tiny_gpt2, tiny_llama, tiny_t5

DIM = 8


@pytest.fixture(autouse=True)
def each_log_message_is_new():
    log_once.cache_clear()


def config_for(targets="all-linear", **options):
    return JactusConfig(target_modules=targets, decomposition="svd", **options)


def compressed_names(model, config):
    return {name for name, module in get_peft_model(model, config).named_modules() if isinstance(module, JactusLayer)}


def linear_model(*names):
    return nn.ModuleDict({name: nn.Linear(DIM, DIM) for name in names})


# -- one weight in several places -------------------------------------------------------------------------


def share_the_parameter(model):
    model["second"].weight = model["first"].weight


def share_the_memory(model):
    model["second"].weight = nn.Parameter(model["first"].weight.data)


def share_the_layer(model):
    model["second"] = model["first"]


SHARED = [share_the_parameter, share_the_memory, share_the_layer]


@pytest.mark.parametrize("share", SHARED)
@pytest.mark.parametrize("targets", [["first", "second", "third"], ["first", "third"]])
def test_a_weight_in_several_places_is_refused(share, targets):
    model = linear_model("first", "second", "third")
    share(model)
    before = copy.deepcopy(model)
    with pytest.raises(TypeError, match=r"^first shares its weight with second: .*`exclude_modules`"):
        get_peft_model(model, config_for(targets))
    config = JactusConfig(target_modules=targets)
    with pytest.raises(TypeError, match=r"^first shares its weight with second: "):
        calibrate(model, config, [], loss_fn=lambda *_: pytest.fail("the model was run"))
    assert repr(model) == repr(before)
    assert torch.equal(model["first"].weight, before["first"].weight)


@pytest.mark.parametrize("share", SHARED)
def test_all_linear_leaves_a_weight_in_several_places_dense_and_says_so_once(share, caplog):
    model = linear_model("first", "second", "third")
    share(model)
    again = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        assert compressed_names(model, config_for()) == {"base_model.model.third"}
        compressed_names(again, config_for())
    (message,) = [text for record in caplog.records if "be factorized:" in (text := record.getMessage())]
    assert "'all-linear' leaves these layers dense, as they cannot be factorized:\n- first" in message
    assert "third" not in message


class CallsFromAList(nn.Module):
    """As Mask2Former's predictors do: what is called is in a list, what is registered is the same layers by name."""

    def __init__(self, hold):
        super().__init__()
        self.first, self.second = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.third = nn.Linear(DIM, DIM)
        self.blocks = hold([self.first, self.second])

    def forward(self, x):
        for block in self.blocks.values() if isinstance(self.blocks, dict) else self.blocks:
            x = block(x)
        return self.third(x)


HOLDS = [
    list,
    tuple,
    set,
    lambda blocks: dict(enumerate(blocks)),
    lambda blocks: {"all": [[block] for block in blocks]},
]


@pytest.mark.parametrize("hold", HOLDS)
def test_layers_that_a_model_calls_from_a_plain_list_are_refused(hold):
    model = nn.Sequential(CallsFromAList(hold))
    before = copy.deepcopy(model)
    with pytest.raises(
        TypeError, match=r"^0\.first is also held by `blocks` of 0, a CallsFromAList.*\n0\.second is also"
    ):
        get_peft_model(model, config_for(["first", "second", "third"]))
    with pytest.raises(TypeError, match=r"nn\.ModuleList"):
        calibrate(model, JactusConfig(target_modules=["first"]), [], loss_fn=lambda *_: pytest.fail("it was run"))
    assert torch.equal(model[0].first.weight, before[0].first.weight)
    assert compressed_names(model, config_for()) == {"base_model.model.0.third"}


def test_a_layer_held_as_a_plain_attribute_is_refused():
    model = linear_model("first", "second")
    vars(model["second"])["previous"] = model["first"]
    with pytest.raises(TypeError, match=r"^first is also held by `previous` of second, a Linear"):
        get_peft_model(model, config_for(["first", "second"]))


def is_held(hold):
    """Return a model that also holds what ``hold(model, layer)`` returns of its first layer."""
    model = linear_model("first", "second", "third")
    vars(model)["kept"] = hold(model, model["first"])
    return model


class Helper:
    def __init__(self, held):
        self.held = held


class Slots:
    __slots__ = ("empty", "held")

    def __init__(self, held):
        self.held = held


class OfSlots(Slots):
    __slots__ = ()


def clip(layer, _):
    layer.weight.data.clamp_(-1, 1)


WEIGHTS_HELD = {
    "attribute": lambda _, layer: layer.weight,
    "list": lambda _, layer: [layer.weight],
    "tuple": lambda _, layer: (layer.weight,),
    "dict": lambda _, layer: {"weight": layer.weight},
    "nested": lambda _, layer: {"all": [({layer.weight},)]},
    "data": lambda _, layer: layer.weight.data,
    "list of data": lambda _, layer: [layer.weight.data],
    "detached": lambda _, layer: [layer.weight.detach()],
    "transposed": lambda _, layer: layer.weight.data.T,
    "part": lambda _, layer: layer.weight.data[2:4, 3:],
    "state dict": lambda _, layer: layer.state_dict(),
    "object": lambda _, layer: Helper([layer.weight]),
    "object with slots": lambda _, layer: [OfSlots([layer.weight])],
    "array": lambda _, layer: layer.weight.detach().numpy(),
    "part of an array": lambda _, layer: {"rows": layer.weight.detach().numpy()[3:1:-1, ::-2]},
    "function": lambda _, layer: lambda x, weight=layer.weight: x @ weight,
    "closure": lambda _, layer: (lambda weight: lambda x: x @ weight)(layer.weight),
    "partial": lambda _, layer: functools.partial(torch.matmul, layer.weight),
    "buffer": lambda model, layer: model.register_buffer("shown", layer.weight.data),
    "parameter": lambda model, layer: model.register_parameter("shown", layer.weight),
    "list of parameters": lambda model, layer: model.update({"shown": nn.ParameterList([layer.weight])}),
    "hook": lambda model, layer: model.register_forward_hook(lambda *_, weight=layer.weight: weight.sum()),
    "hook of its own": lambda _, layer: layer.register_forward_hook(lambda *_, weight=layer.weight: weight.sum()),
    "hook that asks for it": lambda _, layer: layer.register_forward_pre_hook(clip),
    "partial hook": lambda _, layer: layer.register_forward_pre_hook(functools.partial(clip)),
    "hook of another": lambda model, layer: model["third"].register_forward_pre_hook(
        lambda *_, weight=layer.weight: weight.sum()
    ),
}


@pytest.mark.parametrize("keep_base_weights", [False, True])
@pytest.mark.parametrize("case", sorted(WEIGHTS_HELD))
def test_a_weight_that_a_model_also_holds_elsewhere_is_refused(case, keep_base_weights, caplog):
    model = is_held(WEIGHTS_HELD[case])
    before = model["first"].weight.clone()
    message = r"^first has a weight that is also held by `.*`exclude_modules`; in your own class"
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, config_for(["first", "second"], keep_base_weights=keep_base_weights))
    with pytest.raises(TypeError, match=message):
        calibrate(model, JactusConfig(target_modules=["first"]), [], loss_fn=lambda *_: pytest.fail("it was run"))
    assert torch.equal(model["first"].weight, before)
    assert not any(isinstance(module, JactusLayer) for module in model.modules())
    config = config_for(keep_base_weights=keep_base_weights)
    assert compressed_names(model, config) == {"base_model.model.second", "base_model.model.third"}
    assert "- first: has a weight that is also held by" in caplog.text


LAYERS_HELD = {
    "method": lambda _, layer: layer.forward,
    "closure": lambda _, layer: lambda x: layer(x),
    "object": lambda _, layer: Helper(layer),
    "not registered": lambda _, layer: [nn.Sequential(layer, nn.ReLU())],
}


@pytest.mark.parametrize("case", sorted(LAYERS_HELD))
def test_a_layer_that_something_else_calls_is_refused(case):
    with pytest.raises(TypeError, match=r"^first is also held by `kept` of the model, a ModuleDict"):
        get_peft_model(is_held(LAYERS_HELD[case]), config_for(["first"]))


HARMLESS = {
    "copy": lambda _, layer: [layer.weight.detach().clone()],
    "bias": lambda _, layer: [layer.bias],
    "array": lambda _, layer: [layer.weight.detach().numpy().copy(), layer.bias.detach().numpy()],
    "array in memory of a neighbour": lambda _, layer: share_out_memory(layer).numpy()[::-1],
    "itself": lambda _, layer: vars(layer).update(weights=[layer.weight.data]),
    "neighbour in memory": lambda model, layer: vars(model).update(rest=share_out_memory(layer)),
    "optimizer": lambda model, _: torch.optim.SGD(model.parameters()),
    "hook on outputs": lambda _, layer: layer.register_forward_hook(lambda _, args, output: output + args[0].sum()),
    "name": lambda _, layer: {"first.weight": layer.weight.shape},
    "embedding": lambda model, layer: tie_to_embedding(model, layer),
}


def share_out_memory(layer):
    """Put the weight at the start of a larger memory; return the rest."""
    memory = torch.randn(2, DIM, DIM)
    layer.weight = nn.Parameter(memory[0])
    return memory[1]


def tie_to_embedding(model, layer):
    model["embedding"] = nn.Embedding(DIM, DIM)
    model["embedding"].weight = layer.weight


@pytest.mark.parametrize("case", sorted(HARMLESS))
def test_what_does_not_hold_the_weight_is_no_reason_to_refuse(case):
    names = compressed_names(is_held(HARMLESS[case]), config_for(["first"]))
    assert names == {"base_model.model.first"}


def test_a_registered_weight_that_a_transformers_model_declares_as_tied_is_no_reason_either():
    model = linear_model("first", "second")
    model.register_parameter("table", model["first"].weight)
    model.all_tied_weights_keys = {"first.weight": "table"}
    assert compressed_names(model, config_for(["first"])) == {"base_model.model.first"}


def test_the_search_takes_less_than_a_second_for_ten_thousand_modules():
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(10_000)])
    vars(model)["kept"] = [model[-1].weight.data]
    start = time.process_time()  # others may use the machine
    found = used_elsewhere(model)
    assert time.process_time() - start < 1
    assert set(found) == {"9999"}


def test_registered_lists_are_no_such_list():
    model = CallsFromAList(nn.ModuleList)
    del model.first, model.second
    assert len(compressed_names(model, config_for())) == 3


def test_layers_of_a_model_that_shares_blocks_stay_dense():
    config = transformers.AlbertConfig(
        vocab_size=40, embedding_size=DIM, hidden_size=DIM, intermediate_size=12, num_attention_heads=2,
        num_hidden_layers=2, num_hidden_groups=1,
    )  # fmt: skip
    model = transformers.AlbertModel(config)  # one block that is called twice stands in one place
    num_linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert len(compressed_names(model, config_for())) == num_linear


class Detector(transformers.PreTrainedModel):
    """Has no embeddings of tokens, and transformers raises when asked for them, as of Deformable DETR."""

    config_class = transformers.PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.backbone, self.box = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self._tied_weights_keys = {}  # with such a dict, PEFT looks for those of the embeddings
        self.post_init()

    def forward(self, x):
        return self.box(self.backbone(x))


def test_a_model_without_token_embeddings_is_compressed_saved_and_loaded(tmp_path):
    dense = Detector(transformers.PreTrainedConfig())
    with pytest.raises(NotImplementedError):
        dense.get_input_embeddings()
    model = get_peft_model(copy.deepcopy(dense), config_for(["backbone"], retained_ratio=0.5))
    x = torch.randn(3, DIM)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(dense, tmp_path)
    assert torch.equal(loaded(x), model(x))


# -- what is exactly a product ----------------------------------------------------------------------------


class OwnProduct(nn.Linear):
    """As FalconLinear."""

    def forward(self, x):
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-10, 10))


class Rounded(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(torch.bfloat16).to(x.dtype))


class Grouped(nn.Linear):
    def forward(self, x):
        return torch.bmm(x, self.weight.expand(x.shape[0], *self.weight.shape))


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_class_of_its_own_that_computes_the_product_is_compressed(bias, dtype):
    model = nn.ModuleDict({"own": OwnProduct(DIM, DIM, bias=bias, dtype=dtype)})
    assert compressed_names(model, config_for()) == {"base_model.model.own"}


@pytest.mark.parametrize("layer_class", [Clipped, Rounded, Grouped, Router])
def test_one_that_computes_something_else_is_left_dense(layer_class, caplog):
    model = nn.ModuleDict({"plain": nn.Linear(DIM, DIM), "other": layer_class(DIM, DIM)})
    assert compressed_names(model, config_for()) == {"base_model.model.plain"}
    assert f"- other: is a {layer_class.__name__}, which computes more" in caplog.text


class Nested(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2)
        self.layer = layer


def test_all_linear_leaves_dense_what_it_would_refuse_by_name(caplog):
    model = Nested(nn.Linear(DIM, DIM))
    assert compressed_names(model, config_for()) == {"base_model.model.layer"}
    assert "- attention.out_proj: belongs to an nn.MultiheadAttention" in caplog.text


def test_what_is_excluded_is_not_spoken_of(caplog):
    compressed_names(Nested(nn.Linear(DIM, DIM)), config_for(exclude_modules=["out_proj"]))
    assert "'all-linear' leaves" not in caplog.text


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
    ids=["weight norm", "spectral norm", "pruning"],
)
def test_a_weight_that_is_computed_is_refused(wrap, caplog):
    model = linear_model("plain", "computed")
    wrap(model["computed"])
    with pytest.raises(TypeError, match=r"^computed has a weight that is computed.*remove_parametrizations"):
        get_peft_model(model, config_for(["plain", "computed"]))
    assert compressed_names(model, config_for()) == {"base_model.model.plain"}
    assert "- computed: has a weight that is computed" in caplog.text


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("v_porj", "'v_porj' (similar: v_proj"),
        (" v_proj", "' v_proj' (similar: v_proj"),
        ("self_atn.v_proj", "'self_atn.v_proj' (similar: self_attn.v_proj"),
        ("proj", "'proj' (similar: v_proj, q_proj, o_proj)"),  # not the end of a name between points
        ("convolution", "'convolution'. Correct"),
    ],
)
def test_a_name_that_matches_nothing_beside_others_is_said_once_with_names_like_it(name, similar, caplog):
    model = tiny_llama()
    config = config_for(["q_proj", name, "layers.0.mlp.up_proj"])
    with caplog.at_level(logging.WARNING, "peft_jactus"):
        plan_ranks(model, config)
        names = compressed_names(model, config)
    assert {each.rpartition(".")[2] for each in names} == {"q_proj", "up_proj"}
    (message,) = [text for text in caplog.messages if "match no module" in text]
    assert similar in message
    assert "'q_proj'" not in message
    assert "up_proj'" not in message


def test_many_names_that_match_nothing_are_counted(caplog):
    compressed_names(tiny_llama(), config_for(["q_proj", *(f"block.{number}" for number in range(15))]))
    assert "'block.0', 'block.1', 'block.10'" in caplog.text
    assert "and 5 more. Correct" in caplog.text


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["q_proj", "v_proj"], {"exclude_modules": ["v_proj"]}),
        (["q_proj", "layers.1.self_attn.v_proj"], {"layers_to_transform": [0]}),
        (r".*\.(q_proj|v_porj)", {}),
        ("all-linear", {}),
    ],
    ids=["excluded", "another block", "regular expression", "all-linear"],
)
def test_names_that_match_something_and_what_is_no_list_are_not_spoken_of(targets, options, caplog):
    compressed_names(tiny_llama(), config_for(targets, **options))
    assert "match no module" not in caplog.text


def test_the_list_that_peft_has_for_a_type_of_models_is_not_spoken_of(monkeypatch, caplog):
    monkeypatch.setitem(DEFAULT_TARGET_MODULES, "llama", ["q_proj", "only_in_other_llamas"])
    assert compressed_names(tiny_llama(), config_for(None))
    assert "match no module" not in caplog.text


def test_all_refusals_come_at_once():
    model = linear_model("plain", "one", "two")
    model["one"], model["two"] = Router(DIM, DIM), nn.Embedding(DIM, DIM)
    with pytest.raises(TypeError, match=r"(?s)^one is a Router.*\ntwo is a Embedding"):
        get_peft_model(model, config_for(["plain", "one", "two"]))


# -- heads that are trained whole -------------------------------------------------------------------------

SIZES = {"vocab_size": 40, "dim": DIM, "hidden_dim": 12, "n_heads": 2, "n_layers": 1}


def tiny_distilbert():
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**SIZES))


def tiny_bart():
    config = transformers.BartConfig(
        vocab_size=40, d_model=DIM, encoder_ffn_dim=12, decoder_ffn_dim=12, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, num_labels=2, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return transformers.BartForSequenceClassification(config)


def tiny_xlnet():
    config = transformers.XLNetConfig(vocab_size=40, d_model=DIM, n_layer=1, n_head=2, d_inner=12, num_labels=2)
    return transformers.XLNetForSequenceClassification(config)


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        (tiny_distilbert, ["pre_classifier", "classifier"]),
        (tiny_bart, ["classification_head.dense", "classification_head.out_proj"]),
        (tiny_xlnet, ["sequence_summary.summary", "logits_proj"]),
    ],
)
def test_a_head_is_trained_whole_and_comes_back(build, heads, tmp_path):
    torch.manual_seed(0)
    base = build()
    config = config_for(task_type="SEQ_CLS")
    model = get_peft_model(copy.deepcopy(base), config).eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for head in heads:
        root, _, rest = head.partition(".")
        suffix = ".".join(filter(None, [root, "modules_to_save.default", rest, "weight"]))
        assert any(name.endswith(suffix) for name in trained), suffix
    assert not any(head.split(".")[0] in name and "jactus" in name for head in heads for name in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    ids = {"input_ids": torch.tensor([[5, 6, 7, 2]])}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(**ids).logits, model(**ids).logits)


def test_a_target_that_peft_would_train_whole_is_refused_with_the_dense_weights_still_there():
    model = tiny_distilbert()
    with pytest.raises(TypeError, match=r"^pre_classifier is targeted, but PEFT would train it whole.*'classifier'"):
        get_peft_model(model, config_for(["q_lin", "pre_classifier"], task_type="SEQ_CLS"))
    assert not any(isinstance(module, JactusLayer) for module in model.modules())
    assert model.pre_classifier.weight.shape == (DIM, DIM)


def test_modules_to_save_are_matched_as_peft_matches_them():
    model = linear_model("first", "out_first", "second")
    names = compressed_names(model, config_for(modules_to_save=["first"]))
    assert names == {"base_model.model.second"}


def test_probing_runs_no_hook():
    model = nn.ModuleDict({"own": OwnProduct(DIM, DIM)})
    model["own"].register_forward_hook(lambda *_: pytest.fail("its hook was run"))
    assert compressed_names(model, config_for(["own"]))


# -- what is not targeted ---------------------------------------------------------------------------------


def test_what_most_of_the_parameters_are_is_said_once_where_they_are_not_targeted(caplog):
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=DIM, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    models = [transformers.MixtralForCausalLM(config) for _ in range(2)]
    total = sum(parameter.numel() for parameter in models[0].parameters())
    experts = sum(parameter.numel() for name, parameter in models[0].named_parameters() if "experts.gate_up" in name)
    targeted = 2 * 4 * DIM * DIM
    for model in models:
        tuned = get_peft_model(model, config_for(retained_ratio=0.5))
    (message,) = [text for record in caplog.records if "stay as they are" in (text := record.getMessage())]
    assert f"have {targeted / total:.0%} of the model's {total:,} parameters" in message
    assert f"model.layers.*.mlp.experts.gate_up_proj {experts / total:.0%}" in message
    summary = rank_summary(tuned)
    stored = sum(row.num_stored for row in summary.rows)
    assert summary.other_parameters == total - targeted
    assert summary.model_ratio == pytest.approx((total - targeted + stored) / total)
    assert f"The whole model keeps {total - targeted + stored:,} of {total:,}: " in str(summary)


def test_a_model_that_is_mostly_targeted_is_not_spoken_of(caplog):
    compressed_names(linear_model("first", "second"), config_for())
    assert not [message for message in caplog.messages if "will not write a" not in message]


def test_layers_of_another_adapter_are_no_rest_of_the_model(caplog):
    model = get_peft_model(linear_model(*"abcdefgh"), config_for(retained_ratio=0.9, keep_base_weights=True))
    model.add_adapter("other", config_for(["a", "b", "c", "d", "e"], keep_base_weights=True))
    assert "stay as they are" not in caplog.text


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("keep_base_weights", [False, True])
def test_the_whole_models_share_is_the_same_before_and_after_export(storage, keep_base_weights, tmp_path):
    base = tiny_distilbert()
    total = base.num_parameters()
    config = config_for(
        task_type="SEQ_CLS", storage=storage, retained_ratio=0.5, adaptation_rank=0,
        keep_base_weights=keep_base_weights,
    )  # fmt: skip
    planned = plan_ranks(base, config, None).summary
    model = get_peft_model(base, config)
    summary = rank_summary(model)
    targeted = sum(row.num_dense for row in summary.rows)
    assert summary.other_parameters == planned.other_parameters == total - targeted
    export_compressed(model, tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    of_loaded = rank_summary(loaded)
    assert of_loaded.model_ratio == summary.model_ratio
    assert of_loaded.other_parameters == summary.other_parameters
    assert f"the whole model {summary.model_ratio:.1%}" in (tmp_path / "README.md").read_text()
    assert inspect_folder(tmp_path).summary.model_ratio == summary.model_ratio
    on_top = get_peft_model(loaded, LoraConfig(target_modules="all-linear", r=1))
    assert rank_summary(on_top).model_ratio == summary.model_ratio


# -- what a checkpoint cannot hold --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("build", "fields", "is_warned"),
    [
        (tiny_t5, {"target_modules": ["q", "lm_head"]}, True),
        (tiny_t5, {"modules_to_save": ["embed_tokens"]}, True),
        (tiny_t5, {}, False),
        (tiny_gpt2, {"target_modules": ["c_attn", "lm_head"]}, False),  # all that is tied comes apart
    ],
)
def test_ties_that_export_cannot_write_are_said_before_anything_is_done(build, fields, is_warned, caplog):
    def batches():
        raise InterruptedError("the calibration has begun")
        yield

    model = build()
    with pytest.raises(InterruptedError), caplog.at_level(logging.WARNING, "peft_jactus"):
        calibrate(model, jactus_config(model, **fields), batches(), progress_bar=False)
    assert any("`export_compressed` will not write" in message for message in caplog.messages) is is_warned


class Plain(nn.Module):
    """No transformers model."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize(("build", "is_warned"), [(Plain, True), (tiny_llama, False)])
def test_that_export_writes_transformers_models_only_is_said_before_anything_is_done(build, is_warned, caplog):
    model = build()
    targets = ["first", "second"] if is_warned else "all-linear"
    with caplog.at_level(logging.WARNING, "peft_jactus"):
        get_peft_model(model, JactusConfig(target_modules=targets, retained_ratio=0.5, decomposition="svd"))
    assert any("`export_compressed` will not write a Plain" in message for message in caplog.messages) is is_warned
