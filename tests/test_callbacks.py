"""`CompressionCallback`: one run of a Trainer, at full size first, and compressed for the rest."""

import copy
import re

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    HiraConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from peft_jactus import (
    CompressionCallback,
    JactusConfig,
    JactusModel,
    calibrate,
    callbacks,
    export_compressed,
    rank_summary,
)
from tests.support.compressed_models import batches_for, logits_of, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from tests.support.compressed_models import jactus_config as model_config

STEPS, FIRST_STEPS = 10, 6
PEAK = 5e-3
TASK = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
FIRST = {
    "lora": lambda model: get_peft_model(model, LoraConfig(**TASK, r=4)),
    "dora": lambda model: get_peft_model(model, LoraConfig(**TASK, r=4, use_dora=True)),
    "hira": lambda model: get_peft_model(model, HiraConfig(**TASK, r=4)),
    "full": lambda model: model,
}


def full_size(first):
    set_seed(0)
    return FIRST[first](tiny_bert())


def jactus_config(**options):
    return JactusConfig(**TASK, **{"retained_ratio": 0.5} | options)


def rows():
    """Return rows that are all the same, so that their order does not matter."""
    batch = batches_for(tiny_bert())[0]
    return [{key: values[0] for key, values in batch.items()}] * 8


def calibration_batches():
    return batches_for(tiny_bert(), seed=1)


def arguments(folder, **options):
    options = {
        "max_steps": STEPS, "learning_rate": PEAK, "per_device_train_batch_size": 2, "max_grad_norm": 0.0,
        "optim": "adamw_torch", "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True,
    } | options  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **options)


def trainer_for(model, folder, *, trainer_class=Trainer, **options):
    return trainer_class(model, arguments(folder, **options), train_dataset=rows(), eval_dataset=rows())


def with_callback(trainer, **options):
    options = {
        "config": jactus_config(),
        "batches": calibration_batches(),
        "after": FIRST_STEPS / STEPS,
        "progress_bar": False,
    } | options
    trainer.add_callback(CompressionCallback(trainer, **options))
    return trainer


def trained(model, folder, *, callback=None, **options):
    trainer = with_callback(trainer_for(model, folder, **options), **callback or {})
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"lr_scheduler_type": "polynomial", "warmup_steps": 3, "lr_scheduler_kwargs": {"lr_end": 1e-3}},
        {"lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 0.8, "lr_scheduler_kwargs": {"min_lr": 1e-3}},
    ],
    ids=["linear", "polynomial", "cosine"],
)
def test_layers_are_compressed_after_the_first_steps_and_the_run_goes_on(schedule, tmp_path):
    trainer = trained(full_size("lora"), tmp_path, **schedule)
    plain = trainer_for(full_size("lora"), tmp_path, **schedule)
    plain.train()
    assert isinstance(trainer.model, PeftModel)
    assert isinstance(trainer.model.base_model, JactusModel)
    assert rank_summary(trainer.model).retained_ratio == pytest.approx(0.5, abs=0.02)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = [entry for entry in plain.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in steps] == [entry["learning_rate"] for entry in expected]
    losses, expected_losses = ([entry["loss"] for entry in entries] for entries in (steps, expected))
    assert losses[:FIRST_STEPS] == expected_losses[:FIRST_STEPS]
    assert losses[FIRST_STEPS] != expected_losses[FIRST_STEPS]


def train_by_hand(first, config, *, learning_rate=PEAK, carried_over=True):
    """Do what the callback does in a loop that can be read at once; return the compressed model."""
    batch = {key: torch.stack([value] * 2) for key, value in rows()[0].items()}
    model = full_size(first)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)

    def run(steps, peak):
        model.train()
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = peak * (STEPS - step) / STEPS
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    run(range(FIRST_STEPS), PEAK)
    head = [p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
    averages = [optimizer.state[parameter] for parameter in head]
    model = model.merge_and_unload() if isinstance(model, PeftModel) else model
    calibrate(model, config, calibration_batches(), progress_bar=False)
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    head = [p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
    assert len(head) == len(averages) == 2
    if carried_over:
        optimizer.state.update(zip(head, averages, strict=True))
    run(range(FIRST_STEPS, STEPS), learning_rate)
    return model


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("adaptation_rank", [0, 4])
def test_it_is_what_a_loop_by_hand_does(first, adaptation_rank, tmp_path):
    config = jactus_config(adaptation_rank=adaptation_rank)
    model = trained(full_size(first), tmp_path, callback={"config": config}).model
    expected = train_by_hand(first, jactus_config(adaptation_rank=adaptation_rank))
    torch.testing.assert_close(logits_of(model), logits_of(expected))
    started_anew = train_by_hand(first, jactus_config(adaptation_rank=adaptation_rank), carried_over=False)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(logits_of(started_anew), logits_of(expected))


def test_the_compressed_part_can_have_a_rate_of_its_own(tmp_path):
    trainer = trained(full_size("lora"), tmp_path, callback={"learning_rate": PEAK / 4})
    torch.testing.assert_close(
        logits_of(trainer.model), logits_of(train_by_hand("lora", jactus_config(), learning_rate=PEAK / 4))
    )
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    shares = [1.0] * FIRST_STEPS + [0.25] * (STEPS - FIRST_STEPS)
    assert rates == pytest.approx([share * PEAK * (STEPS - step) / STEPS for step, share in enumerate(shares)])
    assert trainer.args.learning_rate == PEAK


@pytest.mark.parametrize("first", ["lora", "full"])
def test_mixed_precision_evaluation_and_export(first, tmp_path):
    trainer = trainer_for(full_size(first), tmp_path, bf16=True, eval_strategy="steps", eval_steps=2)
    with_callback(trainer).train()
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == STEPS // 2
    export_compressed(trainer.model, tmp_path / "compressed", progress_bar=False)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compressed")
    trained_in_float32 = trainer.model.get_base_model()  # the trainer's mixed precision is around it
    torch.testing.assert_close(logits_of(loaded), logits_of(trained_in_float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["lora", "full"])
def test_the_saved_adapter_loads_with_what_other_layers_have_learned(first, tmp_path):
    trainer = trained(full_size(first), tmp_path)
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model), rtol=0, atol=0)


def test_the_model_of_the_script_is_the_compressed_one(tmp_path):
    model = full_size("lora")
    trainer = trained(model, tmp_path)
    assert trainer.model is model
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded.base_model, JactusModel)


def test_a_run_that_ends_early_says_that_nothing_was_compressed(tmp_path, caplog):
    trainer = with_callback(trainer_for(full_size("lora"), tmp_path), after=0.9)
    trainer.add_callback(StopAfter())
    trainer.train()
    assert "ended after 6 steps. The model is at full size: it was to be compressed after 9." in caplog.text
    assert not isinstance(trainer.model.base_model, JactusModel)


@pytest.mark.parametrize("first", ["lora", "full"])
def test_a_run_that_fails_while_it_compresses_goes_on_from_the_last_checkpoint(first, tmp_path, monkeypatch):
    """The checkpoint of the last step at full size is the newest then."""
    options = {"save_strategy": "steps", "save_steps": FIRST_STEPS}
    expected = trained(full_size(first), tmp_path / "whole", **options).model

    callback = {"statistics_file": tmp_path / "statistics.safetensors"}
    monkeypatch.setattr(callbacks, "get_peft_model", lambda *args: 1 / 0)
    trainer = with_callback(trainer_for(full_size(first), tmp_path / "run", **options), **callback)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")  # with all that it has learned
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "merged")
    torch.testing.assert_close(logits_of(saved), logits_of(merged), rtol=0, atol=0)

    monkeypatch.undo()
    trainer = with_callback(trainer_for(full_size(first), tmp_path / "run", **options), **callback)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    torch.testing.assert_close(logits_of(trainer.model), logits_of(expected), rtol=0, atol=0)


@pytest.mark.parametrize(("step", "folder"), [(4, "merged"), (8, "merged"), (8, "elsewhere")])
def test_a_run_that_resumes_gives_what_one_run_gives(step, folder, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "warmup_steps": 2}
    callback = {} if folder == "merged" else {"merged_model_dir": tmp_path / folder}
    expected = trained(full_size("hira"), tmp_path, callback=callback, **options).model
    checkpoint = tmp_path / f"checkpoint-{step}"
    model = full_size("hira")
    if step > FIRST_STEPS:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        model = PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    trainer = with_callback(trainer_for(model, tmp_path, **options), **callback)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == STEPS
    torch.testing.assert_close(logits_of(trainer.model), logits_of(expected), rtol=0, atol=0)


class LaterIsWorse(Trainer):
    """Evaluates to the number of steps, so that the first checkpoint is the best."""

    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs) | {"eval_loss": self.state.global_step}


def test_the_best_model_is_one_that_is_compressed(tmp_path):
    options = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True,
    }  # fmt: skip
    trainer = trainer_for(full_size("lora"), tmp_path, trainer_class=LaterIsWorse, **options)
    with_callback(trainer).train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    saved = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    torch.testing.assert_close(logits_of(trainer.model), logits_of(saved), rtol=0, atol=0)


def fails(error, message, trainer, **options):
    """Check that it fails before any step, and leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(error, match=re.escape(message)):
        with_callback(trainer, **options).train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert not any(module._forward_hooks for module in trainer.model.modules())
    return trainer


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"after": 1.0}, ValueError, "`after` must be a share"),
        ({"after": 0}, ValueError, "`after` must be a share"),
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` must be positive"),
        ({"max_batch": 1}, TypeError, "max_batch"),
        ({"batches": iter([])}, TypeError, "`batches` is an iterator"),
        ({"loss_fn": lambda model, batch: None}, ValueError, "`loss_fn` returned no scalar"),
        ({"config": JactusConfig(target_modules=["nothing"])}, ValueError, "nothing"),
        ({"max_batches": 0}, ValueError, "`max_batches` must be at least 1"),
        ({"save_every": 0}, ValueError, "`save_every` must be at least 1"),
        ({"head_warmup_steps": -1}, ValueError, "`head_warmup_steps` must be at least 0"),
        ({"head_warmup_steps": 1, "config": JactusConfig(target_modules=["query"])}, ValueError, "needs a head"),
        ({"max_statistics_memory": "1KB"}, ValueError, "max_statistics_memory"),
        ({"config": jactus_config(retained_ratio=0.8, model_ratio=0.01)}, ValueError, "cannot be reached"),
        ({"config": jactus_config(retained_ratio=0.8, max_model_size="10KB")}, ValueError, "cannot be reached"),
        ({"statistics_file": "."}, ValueError, "is a directory"),
    ],
)
def test_bad_arguments_fail_before_the_first_step(options, error, message, tmp_path):
    fails(error, message, trainer_for(full_size("lora"), tmp_path), **options)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("`auto_find_batch_size=True`", {"auto_find_batch_size": True}),
        ("`lr_scheduler_type=", {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}),
    ],
)
def test_settings_that_do_not_go_with_it_fail_before_the_first_step(message, options, tmp_path):
    fails(ValueError, message, trainer_for(full_size("lora"), tmp_path, **options))


def test_one_step_cannot_be_divided(tmp_path):
    fails(ValueError, "needs one on each side", trainer_for(full_size("lora"), tmp_path, max_steps=1))


@pytest.mark.parametrize("limit", [None, "40KB"])
def test_statistics_of_an_earlier_run_fail_before_the_first_step(limit, tmp_path):
    options = {"statistics_file": tmp_path / "statistics.safetensors", "max_statistics_memory": limit}
    trained(full_size("lora"), tmp_path / "first", callback=options)
    fails(ValueError, "is there already", trainer_for(full_size("lora"), tmp_path / "second"), **options)


def test_parts_of_statistics_that_an_interrupted_run_left_fail_before_the_first_step(tmp_path):
    file = tmp_path / "statistics.safetensors"
    options = {"statistics_file": file, "max_statistics_memory": "40KB"}
    trained(full_size("lora"), tmp_path / "first", callback=options)
    (tmp_path / "statistics.safetensors.index.json").unlink()
    assert not file.exists()
    fails(ValueError, "is there already", trainer_for(full_size("lora"), tmp_path / "second"), **options)


def test_an_optimizer_that_was_given_cannot_be_made_anew(tmp_path):
    trainer = trainer_for(full_size("lora"), tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    fails(ValueError, "override `Trainer.create_optimizer`", trainer)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_wrapped_model_cannot_be_compressed_in_mid_run(tmp_path):
    fails(ValueError, "The model is sharded or compiled", trainer_for(full_size("lora"), tmp_path, torch_compile=True))


def test_prompts_cannot_be_merged(tmp_path):
    model = get_peft_model(tiny_bert(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    fails(TypeError, "cannot be merged", trainer_for(model, tmp_path))


def test_the_merged_model_must_have_a_way_to_be_saved(tmp_path):
    fails(TypeError, "Linear has no `save_pretrained`", trainer_for(torch.nn.Linear(2, 2), tmp_path))


def test_a_folder_that_is_not_empty_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    trainer = trainer_for(full_size("lora"), tmp_path)
    fails(ValueError, "`merged_model_dir`", trainer, merged_model_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_the_folder_of_the_model_that_is_trained_is_not_replaced(tmp_path):
    """As of a second run that goes on from what the first one has merged."""
    tiny_bert().save_pretrained(tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    fails(ValueError, "is the model that is trained", trainer_for(model, tmp_path))
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_model_that_is_compressed_already_needs_no_callback(tmp_path):
    config = jactus_config()
    model = tiny_bert()
    calibrate(model, config, calibration_batches(), progress_bar=False)
    fails(ValueError, "compressed already", trainer_for(get_peft_model(model, config), tmp_path))


def test_a_run_that_resumes_late_with_the_model_of_the_beginning_fails(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    trained(full_size("hira"), tmp_path, **options)
    trainer = with_callback(trainer_for(full_size("hira"), tmp_path, **options))
    with pytest.raises(ValueError, match=re.escape("put the checkpoint on it with `PeftModel.from_pretrained(")):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_compression_that_is_interrupted_leaves_the_merged_model(tmp_path, monkeypatch):
    trainer = with_callback(trainer_for(full_size("lora"), tmp_path))
    plain = trainer_for(full_size("lora"), tmp_path, max_steps=STEPS)
    plain.add_callback(StopAfter())
    plain.train()
    expected = logits_of(plain.model.merge_and_unload())

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(callbacks, "get_peft_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=0)


class StopAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == FIRST_STEPS


@pytest.mark.parametrize(
    ("build", "config", "options"),
    [
        (tiny_llama, LoraConfig(target_modules="all-linear"), {"activation_checkpointing": True}),
        (tiny_t5, LoraConfig(target_modules="all-linear"), {}),
        (tiny_vit, LoraConfig(target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]), {}),
        (tiny_gpt2, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), {"optim": "adafactor"}),
    ],
    ids=["llama", "t5", "vit", "gpt2"],
)
def test_other_models(build, config, options, tmp_path):
    model = build()
    batches = batches_for(model)
    rows = [{key: values[0] for key, values in batch.items()} for batch in batches]
    ours = model_config(model, retained_ratio=0.5)
    args = arguments(tmp_path, **options)
    trainer = Trainer(get_peft_model(model, copy.deepcopy(config)), args, train_dataset=rows)
    with_callback(trainer, config=ours, batches=batches).train()
    assert rank_summary(trainer.model).retained_ratio == pytest.approx(0.5, abs=0.02)
    export_compressed(trainer.model, tmp_path / "compressed", progress_bar=False)
    loaded = type(model).from_pretrained(tmp_path / "compressed")
    torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model.eval()), rtol=1e-4, atol=1e-5)


def test_steps_of_several_batches(tmp_path):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    model = trained(full_size("lora"), tmp_path, **options).model
    torch.testing.assert_close(
        logits_of(model), logits_of(train_by_hand("lora", jactus_config())), rtol=1e-3, atol=1e-4
    )
