"""Routers are trained offline, against the dense model."""

import copy

import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import AutoModel, TrainingArguments

from peft_jactus import calibrate
from peft_jactus.deployment.export import compressed_copy
from peft_jactus.parse import RouterConfig, RouterTrainer, expert_importance, initialize_router_, routed_copy
from peft_jactus.parse.training import divergence, ridge_regression
from tests.parse.test_models import run
from tests.support.compressed_models import (
    VOCABULARY,
    batches_for,
    compressed,
    jactus_config,
    tiny_bert,
    tiny_llama,
    tiny_vit,
)
from tests.support.routed_models import padded, prompts, routed

DECOMPOSITIONS = ["svd", "fwsvd", "asvd", "svd-llm", "kfac", "jactus"]


def corpus(num=64, length=10, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (num, length), generator=generator)
    return Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).with_format("torch")


def arguments(folder, **fields):
    options = {
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-2,
        "num_train_epochs": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=folder, **{**options, **fields})


def untrained(dense, **fields):
    return routed(dense, spread=0.0, active_ratio=0.4, **fields)


# -- rank-one terms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_terms_are_the_same_weight_and_lead_with_the_best_truncation(decomposition):
    dense = tiny_llama()
    config = jactus_config(dense, decomposition="fwsvd", retained_ratio=0.9, allocation="uniform")
    statistics = calibrate(dense, config, batches_for(dense), progress_bar=False)
    full = compressed_copy(
        compressed(copy.deepcopy(dense), retained_ratio=0.9, decomposition="svd", adaptation_rank=0)
    ).eval()
    model = routed_copy(
        full,
        RouterConfig(active_ratio=0.5, expert_size=2),
        statistics=statistics,
        decomposition=decomposition,
        progress_bar=False,
    )
    for layer in model.rank_router.layers:
        name = next(name for name, module in model.named_modules() if module is layer)
        weight = full.get_submodule(name).dense_weight().double()
        torch.testing.assert_close(layer.dense_weight().double(), weight, rtol=0, atol=1e-5)
        if decomposition == "svd":
            rank = layer.rank // 2
            u, sigma, vh = torch.linalg.svd(weight)
            best = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
            leading = layer.up.weight[:, :rank].double() @ layer.down.weight[:rank].double()
            torch.testing.assert_close(leading, best, rtol=0, atol=1e-5)


# -- importance -------------------------------------------------------------------------------------------


def test_importance_is_the_fisher_information_of_gates():
    model = untrained(tiny_bert()).double()
    batch = {name: value[:2] for name, value in batches_for(model)[0].items()}
    router = model.rank_router
    expected = torch.zeros(2, len(router.table), dtype=torch.float64)
    for label in range(3):  # every label, weighted by its probability
        gates = torch.ones_like(expected, requires_grad=True)
        with router.gated(gates):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        log_probabilities = functional.log_softmax(logits, -1)[:, label]
        (gradient,) = torch.autograd.grad(log_probabilities.sum(), gates)
        expected += log_probabilities.detach().exp().unsqueeze(1) * gradient.square()
    generator = torch.Generator().manual_seed(0)
    drawn = expert_importance(model, batch, num_samples=2000, generator=generator).double()
    relative = (drawn - expected).norm() / expected.norm()
    assert relative < 0.05


def test_padding_has_no_importance():
    model = untrained(tiny_llama())
    rows = prompts(3)
    batch = padded(rows)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = torch.stack([
        expert_importance(model, batch, generator=torch.Generator().manual_seed(seed)) for seed in range(200)
    ]).mean(0)
    for row, prompt in enumerate(rows):
        alone = torch.stack([
            expert_importance(model, {"input_ids": prompt.unsqueeze(0)}, generator=torch.Generator().manual_seed(seed))
            for seed in range(200)
        ]).mean(0)
        assert float((together[row] - alone[0]).norm() / alone.norm()) < 0.35  # the labels drawn differ


def test_ridge_regression_is_the_penalised_solution_that_predicts_best():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 20, generator=generator, dtype=torch.float64)
    truth = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    targets = inputs @ truth + torch.randn(80, 3, generator=generator, dtype=torch.float64)
    found = ridge_regression(inputs, targets)
    residual = inputs.mT @ (targets - inputs @ found)
    penalties = residual / found  # normal equations: X^T (Y - X B) = penalty B
    assert float(penalties.std() / penalties.mean()) < 1e-6
    assert float((found - truth).norm() / truth.norm()) < 0.3
    noise = torch.randn(80, 3, generator=generator, dtype=torch.float64)
    assert float(ridge_regression(inputs, noise).norm()) < 0.1 * float(found.norm())


def test_an_initialised_router_chooses_what_matters_on_average():
    dense = tiny_llama()
    model = untrained(dense, router_kind="mlp")  # no regression: the same choice for all prompts
    initialize_router_(model, [{"input_ids": corpus()["input_ids"][:]}], progress_bar=False)
    inputs = {"input_ids": corpus(seed=1)["input_ids"][:]}
    expected = run(dense, **inputs)
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            model.rank_router.bias.mul_(sign)
        model.rank_router.clear_cache()
        losses.append(divergence(expected, run(model, **inputs)).mean())
    assert losses[0] < 0.8 * losses[1]


# -- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"router_kind": "mlp"}, {"router_input": "first_block"}], ids=str)
def test_training_brings_the_model_nearer_to_the_dense_one_and_changes_the_router_alone(fields, tmp_path):
    dense = tiny_llama()
    model = untrained(dense, **fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = RouterTrainer(model, dense, arguments(tmp_path), train_dataset=corpus(), eval_dataset=corpus(seed=1))
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.95 * start
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("rank_router.") for name in changed)
    assert not model.training
    assert model.rank_router._state.active is None


def test_the_default_arguments_are_a_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = RouterTrainer(untrained(tiny_llama()), tiny_llama(), train_dataset=corpus())
    assert (trainer.args.learning_rate, trainer.args.output_dir) == (2e-2, "router")


def test_the_loss_is_the_divergence_of_what_is_served(tmp_path):
    dense = tiny_llama()
    model = routed(dense)
    trainer = RouterTrainer(model, dense, arguments(tmp_path), train_dataset=corpus())
    ids = corpus()["input_ids"][:8]
    with torch.no_grad():
        loss = trainer.compute_loss(model.rank_router.eval(), {"input_ids": ids})
    expected, served = run(dense, input_ids=ids), run(model, input_ids=ids)
    reference = functional.kl_div(
        served.double().log_softmax(-1), expected.double().log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(loss.double(), reference.sum(-1).mean(), rtol=1e-4, atol=1e-7)


def test_a_resumed_training_is_an_uninterrupted_one(tmp_path):
    dense = tiny_llama()
    options = {"train_dataset": corpus(), "active_ratios": (0.4, 0.8), "prompt_tokens": (2, 10)}
    saving = {"save_strategy": "steps", "save_steps": 8, "num_train_epochs": 2}

    def trained(folder, **kwargs):
        model = untrained(dense)
        RouterTrainer(model, dense, arguments(folder, **saving), **options).train(**kwargs)
        return model.rank_router.state_dict()

    whole = trained(tmp_path)
    resumed = trained(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_mixed_precision_is_that_of_the_models_and_the_router_stays_float32(tmp_path):
    dense = tiny_llama()
    model = untrained(dense)
    seen = {"routed": set(), "teacher": set(), "float32 routed": set()}

    def note(name):
        return lambda module, args, output: seen[name].add(output.dtype)

    hooks = [part.model.layers[0].mlp.register_forward_hook(note(name)) for name, part in
             (("routed", model), ("teacher", dense))]  # fmt: skip
    rows = {"train_dataset": corpus(), "eval_dataset": corpus(seed=1), "initial_batches": 0}
    trainer = RouterTrainer(model, dense, arguments(tmp_path, bf16=True, use_cpu=True, max_steps=2), **rows)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert seen["routed"] == seen["teacher"] == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.rank_router.state_dict().values()} == {torch.float32}
    for hook in hooks:
        hook.remove()
    exact = RouterTrainer(model, dense, arguments(tmp_path), **rows).evaluate()["eval_loss"]
    assert loss != exact
    assert loss == pytest.approx(exact, rel=0.1)


def test_evaluation_with_short_prompts_takes_the_middle_of_their_lengths(tmp_path):
    dense = tiny_llama()
    model = routed(dense)
    router, rows = model.rank_router, corpus(seed=1)
    args = arguments(tmp_path, per_device_eval_batch_size=len(rows))
    trainer = RouterTrainer(model, dense, args, train_dataset=corpus(), eval_dataset=rows, prompt_tokens=(2, 8))
    ids = rows["input_ids"][:]
    with torch.no_grad():
        seen = model.get_input_embeddings()(ids[:, :5]).double().mean(1)
        with router.gated(router.select(seen).float()):
            served = model(input_ids=ids).logits
    expected = float(divergence(run(dense, input_ids=ids), served).mean())
    assert [trainer.evaluate()["eval_loss"] for _ in range(3)] == 3 * [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize("make", [tiny_bert, tiny_vit])
def test_encoders_train_too(make, tmp_path):
    dense = make()
    model = untrained(dense)
    rows = [
        {name: value[row] for name, value in batch.items() if name != "labels"}
        for batch in batches_for(dense)
        for row in range(4)
    ]
    options = {"train_dataset": rows, "eval_dataset": rows, "prompt_tokens": (2, 40)}  # or patches
    trainer = RouterTrainer(model, dense, arguments(tmp_path), **options)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start


def test_initialisation_forgets_what_was_chosen_before():
    model = untrained(tiny_llama())
    ids = corpus()["input_ids"][:2]
    run(model, input_ids=ids)
    assert model.rank_router.cache_info().entries
    initialize_router_(model, [{"input_ids": ids}], progress_bar=False)
    assert model.rank_router.cache_info().entries == 0


def test_what_a_trainer_cannot_use(tmp_path):
    dense = tiny_llama()
    model = untrained(dense)
    args = arguments(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    headless = AutoModel.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="`model` has no router"):
        RouterTrainer(dense, dense, args, train_dataset=corpus())
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        RouterTrainer(model, dense, args, train_dataset=corpus().select([]))
    with pytest.raises(ValueError, match="`active_ratios` must be two positive numbers"):
        RouterTrainer(model, dense, args, train_dataset=corpus(), active_ratios=(0.8, 0.4))
    with pytest.raises(ValueError, match=r"`active_ratio` must be in \(0, 1\]; got 80"):
        RouterTrainer(model, dense, args, train_dataset=corpus(), active_ratios=(0.4, 80))
    with pytest.raises(ValueError, match=r"`prompt_tokens` must be integers; got \(1\.5, 3\)"):
        RouterTrainer(model, dense, args, train_dataset=corpus(), prompt_tokens=(1.5, 3))
    with pytest.raises(ValueError, match="`temperature` must be positive; got 0"):
        RouterTrainer(model, dense, args, train_dataset=corpus(), temperature=0)
    for options, of_args, names in (
        ({"compute_metrics": print, "compute_loss_func": print}, {}, "`compute_loss_func`, `compute_metrics`"),
        ({"preprocess_logits_for_metrics": print}, {}, "`preprocess_logits_for_metrics`"),
        ({}, {"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
        ({}, {"bf16_full_eval": True, "use_cpu": True}, "`bf16_full_eval`"),
    ):
        with pytest.raises(ValueError, match=f"`RouterTrainer` has no use for {names}: "):
            RouterTrainer(model, dense, arguments(tmp_path, **of_args), train_dataset=corpus(), **options)
    with pytest.raises(ValueError, match="is too small: one expert in each layer"):
        RouterTrainer(model, dense, args, train_dataset=corpus(), active_ratios=(0.01, 0.4))
    with pytest.raises(ValueError, match="`batches` is empty"):
        initialize_router_(model, [])
    with pytest.raises(TypeError, match="returns no `logits` to compare"):
        # A base model has no predictions.
        initialize_router_(headless, [{"input_ids": corpus()["input_ids"][:2]}], progress_bar=False)
    ids = corpus()["input_ids"][:2]
    padding = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(ValueError, match="No expert changes any prediction on `batches`"):
        initialize_router_(model, [padding], progress_bar=False)
    regression = untrained(tiny_bert())
    regression.classifier = torch.nn.Linear(regression.config.hidden_size, 1)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification returns one number.* regression model can"):
        initialize_router_(regression, [{"input_ids": ids}], progress_bar=False)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    with pytest.raises(ValueError, match="uses gradient checkpointing"):
        RouterTrainer(model, dense, args, train_dataset=corpus())
