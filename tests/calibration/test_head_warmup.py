import pytest
import torch
from torch import nn

from peft_jactus import JactusConfig, calibrate
from tests.support.tiny_models import classified_texts, collate, tiny_bert


def config(**options):
    return JactusConfig(target_modules="all-linear", task_type="SEQ_CLS", **options)


def run(model, batches, *, steps=3, settings=None, **options):
    return calibrate(model, settings or config(), batches, head_warmup_steps=steps, progress_bar=False, **options)


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copied_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["pooler", "classifier"]}])
def test_warm_up_changes_the_head_and_nothing_else(settings):
    model = tiny_bert()
    before = copied_state(model)
    run(model, [collate(classified_texts())], settings=config(**settings))
    head = {"classifier.weight", "classifier.bias"}
    if settings:
        head |= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert changed(model, before) == head


def test_a_part_of_the_head_may_be_named_by_its_path():
    model = tiny_bert()
    before = copied_state(model)
    run(model, [collate(classified_texts())], settings=JactusConfig(modules_to_save=["pooler.dense"]))
    assert changed(model, before) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_warm_up_lowers_the_loss():
    batch = collate(classified_texts())
    model = tiny_bert()
    before = model(**batch).loss.item()
    run(model, [batch], steps=20, head_warmup_lr=1e-2)
    assert model(**batch).loss.item() < before


def test_warm_up_is_adamw_on_the_mean_loss():
    """Whatever the reduction: the learning rate does not depend on the batch size."""

    def summed_loss(model, batch):
        return nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="sum")

    batch = collate(classified_texts())
    expected = tiny_bert()
    optimizer = torch.optim.AdamW(expected.classifier.parameters(), lr=1e-3)
    for _ in range(3):
        expected(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    by_mean, by_sum = tiny_bert(), tiny_bert()
    run(by_mean, [batch])
    run(by_sum, [batch], loss_fn=summed_loss, loss_reduction="sum")
    for model in (by_mean, by_sum):
        torch.testing.assert_close(model.classifier.weight, expected.classifier.weight, rtol=0, atol=1e-12)


def test_statistics_are_taken_with_the_warmed_up_head():
    model = tiny_bert()
    warmed_up = run(model, [collate(classified_texts())])
    again = run(model, [collate(classified_texts())], steps=0)
    name = "bert.encoder.layer.1.output.dense"
    assert torch.equal(warmed_up[name].gradient.scatter, again[name].gradient.scatter)


def test_a_head_of_zeros_needs_a_warm_up():
    model = tiny_bert()
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(ValueError, match=r"(?s)its gradient is zero everywhere.*`head_warmup_steps`"):
        run(model, classified_texts(), steps=0)
    run(model, classified_texts(), steps=2)


def test_batches_are_repeated_when_there_are_fewer_than_steps():
    seen = []

    class Batches:
        def __iter__(self):
            for batch in classified_texts()[:2]:
                seen.append(batch["labels"].item())
                yield batch

    run(tiny_bert(), Batches(), steps=3)
    assert seen[:3] == [0, 1, 0]  # of the warm-up
    assert seen[-2:] == [0, 1]  # of the calibration


def test_the_model_comes_back_with_its_modes_gradients_and_trainable_parameters():
    model = tiny_bert()
    model.bert.encoder.layer[0].train()
    model.bert.pooler.requires_grad_(False)
    run(model, classified_texts())
    assert model.bert.encoder.layer[0].training
    assert not model.training
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_the_head_had_are_kept_and_not_stepped_with():
    model, expected = tiny_bert(), tiny_bert()
    for parameter in model.classifier.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    for warmed_up in (model, expected):
        run(warmed_up, [collate(classified_texts())])
    assert torch.equal(model.classifier.weight, expected.classifier.weight)
    assert all(bool((parameter.grad == 100).all()) for parameter in model.classifier.parameters())


def test_warm_up_works_where_gradients_are_switched_off():
    model, expected = tiny_bert(), tiny_bert()
    run(expected, classified_texts())
    with torch.no_grad():
        run(model, classified_texts())
    assert torch.equal(model.classifier.weight, expected.classifier.weight)


def test_an_iterator_that_can_be_read_once_is_refused():
    with pytest.raises(ValueError, match="`head_warmup_steps` reads the batches twice"):
        run(tiny_bert(), iter(classified_texts()))


def test_no_batches_are_refused():
    class Empty:
        num_reads = 0

        def __iter__(self):
            self.num_reads += 1
            assert self.num_reads < 10, "reads an empty iterable for ever"
            return iter(())

    with pytest.raises(ValueError, match="`batches` is empty"):
        run(tiny_bert(), Empty())


def test_a_model_whose_head_is_unknown_is_refused():
    settings = JactusConfig(target_modules="all-linear")
    with pytest.raises(ValueError, match=r"needs a head to train.*`modules_to_save`.*`task_type`"):
        run(tiny_bert(), classified_texts(), settings=settings)
