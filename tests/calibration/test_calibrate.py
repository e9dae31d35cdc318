import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from peft_jactus import JactusConfig, calibrate
from tests.support import oracles
from tests.support.comparisons import assert_moments_close, assert_same_statistics, assert_statistics_of
from tests.support.strategies import randn
from tests.support.tiny_models import (
    FLOAT32_LOSS,
    TASKS,
    classified_texts,
    collate,
    continued_texts,
    randint,
    tiny_bert,
    tiny_llama,
    tiny_llava,
    tiny_t5,
    translated_texts,
)

# bfloat16 has 8 bits: 0.4 % for each of the operations of two blocks.
BFLOAT16 = 0.05


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def run(model, batches, *, head="classifier", **options):
    config = JactusConfig(target_modules="all-linear", exclude_modules=[head])
    return calibrate(model, config, batches, progress_bar=False, **options)


# -- what is measured -------------------------------------------------------------------------------------


def test_statistics_of_a_padded_batch_are_those_of_each_example_alone(task):
    """Single tokens, their gradients by autograd, no padding, the loss written out."""
    model = task.model()
    names = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and name != task.head
    ]
    assert len(names) >= 8
    tokens = oracles.calibration_tokens(model, names, task.examples(), task.summed_loss)
    *others, last = task.examples()  # alone, the last source of T5 is longer than its target
    statistics = run(model, [collate(others), last], head=task.head)
    assert_statistics_of(statistics, tokens, rtol=task.rtol)


def test_statistics_do_not_depend_on_the_batch_size(task):
    examples = task.examples()
    one_by_one = run(task.model(), examples, head=task.head)
    together = run(task.model(), [collate(examples)], head=task.head)
    assert (one_by_one.num_batches, together.num_batches) == (len(examples), 1)
    assert_same_statistics(together, one_by_one, rtol=task.rtol)


@pytest.mark.parametrize(
    ("model_class", "options", "labels"),
    [
        (
            BertForSequenceClassification,
            {"num_labels": 1},
            [randn(0, 1), torch.tensor([-100.0]).double(), randn(2, 1)],
        ),
        (
            BertForSequenceClassification,
            {"problem_type": "multi_label_classification"},
            [torch.tensor([row]).double() for row in ([1, 0, 1], [0, 0, 0], [1, 1, 0])],
        ),
        (BertForTokenClassification, {}, [randint(seed, 1, 4, low=0, high=3) for seed in range(3)]),
        (
            BertForMaskedLM,
            {"tie_word_embeddings": False},
            [torch.tensor([row]) for row in ([5, -100, 9, 7], 3 * [-100] + [4], 3 * [-100] + [8])],
        ),
    ],
    ids=["regression", "multi_label", "token_classification", "masked_lm"],
)
def test_every_kind_of_label_is_summed_over_what_the_model_averages(model_class, options, labels):
    examples = [{"input_ids": randint(seed, 1, 4), "labels": label} for seed, label in enumerate(labels)]
    one_by_one = run(tiny_bert(model_class, **options), examples)
    together = run(tiny_bert(model_class, **options), [collate(examples)])
    assert_same_statistics(together, one_by_one)


def test_answers_as_positions_are_summed_over_examples():
    examples = [
        {
            "input_ids": randint(seed, 1, 4),
            "start_positions": torch.tensor([seed]),
            "end_positions": torch.tensor([seed + 1]),
        }
        for seed in range(3)
    ]
    model = tiny_bert(BertForQuestionAnswering, num_labels=2)
    together = run(model, [collate(examples)], head="qa_outputs")
    assert_same_statistics(together, run(model, examples, head="qa_outputs"))


def test_text_of_a_vision_language_model_is_summed_over_its_next_tokens():
    examples = continued_texts()
    config = JactusConfig(target_modules=r".*language_model.*_proj")
    one_by_one, together = (
        calibrate(tiny_llava(), config, batches, progress_bar=False) for batches in (examples, [collate(examples)])
    )
    assert_same_statistics(together, one_by_one, rtol=FLOAT32_LOSS)


# -- padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_masked_positions_are_not_counted(name):
    task = TASKS[name]
    trimmed = run(task.model(), task.examples(), head=task.head)
    padded = [collate([example], length=9) for example in task.examples()]
    assert_same_statistics(run(task.model(), padded, head=task.head), trimmed, rtol=task.rtol)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_content_of_padding_does_not_matter(name):
    task = TASKS[name]
    one, other = (run(task.model(), [collate(task.examples(), token=token)], head=task.head) for token in (2, 7))
    assert_same_statistics(other, one, rtol=task.rtol)


def test_side_of_the_padding_does_not_matter():
    """For a model whose positions are relative."""
    task = TASKS["llama"]
    example = task.examples()[2]
    right = collate([example], length=9)
    num_padded = 9 - example["input_ids"].shape[1]
    left = {key: value.roll(num_padded, dims=1) for key, value in right.items()}
    assert left["attention_mask"][0, 0] == 0
    one, other = (run(task.model(), [batch], head=task.head) for batch in (right, left))
    assert_same_statistics(other, one, rtol=task.rtol)


def test_without_a_mask_every_position_counts():
    batch = collate(classified_texts())
    del batch["attention_mask"]
    statistics = run(tiny_bert(), [batch])
    assert statistics["bert.encoder.layer.0.attention.self.query"].num_tokens == 4 * 6
    assert statistics["bert.pooler.dense"].num_tokens == 4


def test_a_decoder_attention_mask_decides_for_the_decoder():
    batch = collate(translated_texts())
    mask = torch.ones_like(batch["labels"])
    mask[:, 3:] = 0
    statistics = run(tiny_t5(), [batch | {"decoder_attention_mask": mask}], head="lm_head")
    assert statistics["encoder.block.0.layer.0.SelfAttention.q"].num_tokens == 5 + 3 + 4
    assert statistics["decoder.block.0.layer.0.SelfAttention.q"].num_tokens == 3 * 3
    assert statistics["decoder.block.0.layer.1.EncDecAttention.q"].num_tokens == 3 * 3
    assert statistics["decoder.block.0.layer.1.EncDecAttention.k"].num_tokens == 5 + 3 + 4


# -- the same statistics another way ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "t5"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("train_mode", [True, False])
def test_gradient_checkpointing_changes_nothing_but_that_blocks_run_twice(name, use_reentrant, train_mode):
    task = TASKS[name]
    batches = [collate(task.examples()[:2]), collate(task.examples()[2:])]
    plain = run(task.model(), batches, head=task.head, train_mode=train_mode)
    model = task.model()
    enable_checkpointing(model, use_reentrant)
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    forwards = []
    for block in blocks:
        first_layer = next(module for module in block.modules() if isinstance(module, nn.Linear))
        first_layer.register_forward_pre_hook(lambda *_: forwards.append(1))
    use_cache = getattr(model.config, "use_cache", None)
    assert_same_statistics(run(model, batches, head=task.head, train_mode=train_mode), plain, rtol=task.rtol)
    assert len(forwards) == 2 * len(blocks) * len(batches)
    assert not any("forward" in vars(block) for block in blocks)
    assert getattr(model.config, "use_cache", None) == use_cache


def enable_checkpointing(model, use_reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None)  # its new name in transformers 5
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_keeps_the_inputs_of_no_more_than_one_block(name, use_reentrant):
    task = TASKS[name]
    model = task.model(num_hidden_layers=6)
    enable_checkpointing(model, use_reentrant)
    layers = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != task.head]
    inputs, alive = set(), []

    def watch_input(module, args):
        inputs.add((StorageWeakRef(args[0].untyped_storage()), args[0].numel()))

    def watch_gradient(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda _: alive.append(sum(size for ref, size in inputs if not ref.expired())))

    for layer in layers:
        layer.register_forward_pre_hook(watch_input)
        layer.register_forward_hook(watch_gradient)
    batch = collate(task.examples())
    run(model, [batch], head=task.head, train_mode=use_reentrant)
    # A block's layers read three tensors of the hidden size and one of the intermediate size; the rest is what
    # checkpointing keeps, the inputs of six blocks and what the head reads.
    sizes = 10 * model.config.hidden_size + model.config.intermediate_size
    assert max(alive) <= batch["input_ids"].numel() * sizes


@pytest.mark.parametrize("checkpointed", [True, False])
def test_an_input_that_is_changed_in_place_is_noticed_also_in_a_checkpointed_block(checkpointed):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4).double()

        def forward(self, x):
            y = x.tanh()
            z = self.linear(y)
            y.detach().add_(1)
            return z.tanh()

    def loss_fn(model, batch):
        x = model[0](batch["x"])
        y = checkpoint(model[1], x, use_reentrant=False) if checkpointed else model[1](x)
        return y.square().sum()

    model = nn.Sequential(nn.Linear(4, 4).double(), Block())
    config = JactusConfig(target_modules="all-linear")
    with pytest.raises(RuntimeError, match=r"^1\.linear: its input was changed in place"):
        calibrate(model, config, [{"x": randn(0, 5, 4)}], loss_fn=loss_fn, progress_bar=False)


def test_layers_that_read_one_tensor_share_its_covariance():
    bert = run(tiny_bert(), classified_texts())
    attention = "bert.encoder.layer.1.attention.self"
    assert bert[f"{attention}.query"].input is bert[f"{attention}.key"].input
    assert bert[f"{attention}.query"].input is bert[f"{attention}.value"].input
    assert bert[f"{attention}.query"].input is not bert["bert.encoder.layer.0.attention.self.query"].input
    llama = run(tiny_llama(), TASKS["llama"].examples(), head="lm_head")
    assert llama["model.layers.0.mlp.gate_proj"].input is llama["model.layers.0.mlp.up_proj"].input


def test_statistics_of_a_bfloat16_model_are_kept_in_float32():
    batches = [collate(classified_texts())]
    expected = run(tiny_bert().float(), batches)
    actual = run(tiny_bert().to(torch.bfloat16), batches)
    for name, layer in actual.items():
        for side in ("input", "gradient"):
            one, other = getattr(layer, side), getattr(expected[name], side)
            assert one.scatter.dtype == one.absolute_sum.dtype == torch.float32
            assert_moments_close(one, other.covariance, other.mean, rtol=BFLOAT16, what=f"{name} {side}")


class Stream(IterableDataset):
    """Has no length; a DataLoader over it has one that cannot be asked for."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


def test_batches_may_come_from_a_list_a_generator_or_a_data_loader():
    examples = classified_texts()
    expected = run(tiny_bert(), examples)
    loader = DataLoader(examples, batch_size=2, collate_fn=collate)
    stream = DataLoader(Stream(examples), batch_size=2, collate_fn=collate)
    for batches in ((example for example in examples), loader, stream):
        assert_same_statistics(run(tiny_bert(), batches), expected)


def test_max_batches_stops_early_and_draws_no_more():
    examples = classified_texts()
    iterator = iter(examples)
    statistics = run(tiny_bert(), iterator, max_batches=3)
    assert statistics.num_batches == 3
    assert_same_statistics(statistics, run(tiny_bert(), examples[:3]))
    assert len(list(iterator)) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_function_replaces_the_models_own_loss(reduction):
    def loss_fn(model, batch):
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], reduction=reduction)

    batches = [collate(classified_texts())]
    statistics = run(tiny_bert(), batches, loss_fn=loss_fn, loss_reduction=reduction)
    assert_same_statistics(statistics, run(tiny_bert(), batches))


@pytest.mark.parametrize("train_mode", [False, True])
def test_dropout_is_off_unless_asked_for(train_mode):
    def loss_fn(model, batch):
        assert {module.training for module in model.modules()} == {train_mode}
        return model(**batch).loss

    model = tiny_bert().train(not train_mode)
    assert run(model, classified_texts(), loss_fn=loss_fn, train_mode=train_mode).num_batches == 4


def test_calibration_works_where_gradients_are_switched_off():
    batches = [collate(classified_texts())]
    with torch.no_grad():
        statistics = run(tiny_bert(), batches)
    assert_same_statistics(statistics, run(tiny_bert(), batches))
