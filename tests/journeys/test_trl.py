"""trl's trainers on a compressed model, as its users write them."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from peft_jactus import CompressionCallback, JactusConfig, calibrate, export_compressed
from tests.support.compressed_models import batches_for, logits_of, tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
# trl's configs have a field by the name that transformers 5.23 replaced.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
ROWS = 8


def tuned(**options):
    model = tiny_llama()
    config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=0.6, **options)
    calibrate(model, config, batches_for(model), progress_bar=False)
    return model, config


def tuned_either_way(wrapped):
    """Return a model and its trainer's ``peft_config``: wrapped already, or for the trainer to wrap."""
    model, config = tuned(keep_base_weights=not wrapped)  # then the dense model is the reference
    return (get_peft_model(model, config), None) if wrapped else (model, config)


def arguments(config_class, folder, **options):
    return config_class(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, **options,
    )  # fmt: skip


def texts(*names):
    rows = [{name: f"w{5 + row} w{9 + row} w{20 + i}" for i, name in enumerate(names)} for row in range(ROWS)]
    return Dataset.from_list(rows)


def check_trained(trainer, model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses
    assert all(torch.isfinite(torch.tensor(losses)))
    after = dict(model.named_parameters())
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.isfinite(parameter).all() for parameter in after.values())


def test_sft(tmp_path):
    model = get_peft_model(*tuned())
    trainer = trl.SFTTrainer(
        model, args=arguments(trl.SFTConfig, tmp_path, max_length=16), train_dataset=texts("text"),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    check_trained(trainer, model)


def test_sft_with_lora_that_is_compressed_in_mid_run(tmp_path):
    model = tiny_llama()
    trainer = trl.SFTTrainer(
        model, args=arguments(trl.SFTConfig, tmp_path, max_length=16), train_dataset=texts("text"),
        processing_class=tiny_tokenizer(), peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )  # fmt: skip
    config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=0.6)
    batches = trainer.get_train_dataloader()
    trainer.add_callback(CompressionCallback(trainer, config, batches, after=0.5, progress_bar=False))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    export_compressed(trainer.model, tmp_path / "compressed", progress_bar=False)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "compressed")
    batch = batches_for(loaded)[0]
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(trainer.model, batch), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_the_batches_of_a_trainer_are_what_calibrate_takes(tmp_path):
    def trainer_of(model):
        return trl.SFTTrainer(
            model, args=arguments(trl.SFTConfig, tmp_path, max_length=16), train_dataset=texts("prompt", "completion"),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip

    model = tiny_llama()
    config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=0.6)
    statistics = calibrate(model, config, trainer_of(model).get_train_dataloader(), progress_bar=False)
    assert statistics.num_batches == ROWS // 2
    model = get_peft_model(model, config)
    check_trained(trainer_of(model), model)


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "peft_config"])
def test_dpo(tmp_path, wrapped):
    model, peft_config = tuned_either_way(wrapped)
    trainer = trl.DPOTrainer(
        model, args=arguments(trl.DPOConfig, tmp_path, max_length=16),
        train_dataset=texts("prompt", "chosen", "rejected"), processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip
    check_trained(trainer, trainer.model)


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "peft_config"])
def test_grpo_with_a_reference(tmp_path, wrapped):
    model, peft_config = tuned_either_way(wrapped)
    trainer = trl.GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [float(len(text)) + i for i, text in enumerate(completions)],
        args=arguments(trl.GRPOConfig, tmp_path, beta=0.1, num_generations=2, max_completion_length=4),
        train_dataset=texts("prompt"), processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip
    check_trained(trainer, trainer.model)


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "peft_config"])
def test_kto(tmp_path, wrapped):
    model, peft_config = tuned_either_way(wrapped)
    rows = texts("prompt", "completion").add_column("label", [row % 2 == 0 for row in range(ROWS)])
    trainer = trl.KTOTrainer(
        model, args=arguments(trl.KTOConfig, tmp_path, max_length=16), train_dataset=rows,
        processing_class=tiny_tokenizer(), peft_config=peft_config,
    )  # fmt: skip
    check_trained(trainer, trainer.model)


def test_reward(tmp_path):
    model = LlamaForSequenceClassification(tiny_llama().config).eval()
    model.config.num_labels = 1
    model.score = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    rows = texts("chosen", "rejected")

    def trainer_of(model):
        return trl.RewardTrainer(
            model, args=arguments(trl.RewardConfig, tmp_path, max_length=16), train_dataset=rows,
            processing_class=tiny_tokenizer(),
        )  # fmt: skip

    trainer = trainer_of(model)
    config = JactusConfig(task_type="SEQ_CLS", target_modules="all-linear", retained_ratio=0.6)
    calibrate(model, config, trainer.get_train_dataloader(), loss_fn=trainer.compute_loss, progress_bar=False)
    model = get_peft_model(model, config)
    check_trained(trainer_of(model), model)
