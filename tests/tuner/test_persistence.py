"""Saving, loading and interruption: what comes back is what was there, or an error."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import peft_jactus
from peft_jactus import CalibrationStatistics
from peft_jactus.deployment.export import compressed_copy
from peft_jactus.tuner.adapter_format import READABLE_FORMATS
from tests.support.compressed_models import (
    batches_for,
    compressed,
    logits_of,
    perturb_cores_,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)

ROOT = Path(peft_jactus.__file__).parents[1]
WEIGHTS = "adapter_model.safetensors"


def in_fresh_process(code, *arguments, **popen):
    """Start Python on ``code`` with this repository importable and no trace of the running process's state."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def saved_adapter(folder, build, dtype=torch.float32, **fields):
    """Save a base model, a trained adapter for it, and the logits it gives; return the live model."""
    build(dtype=dtype).save_pretrained(folder / "base")
    # Loaded, not cast: `.to(bfloat16)` would round rotary frequencies, which loading keeps in float32.
    base = type(build()).from_pretrained(folder / "base", dtype=dtype)
    model = compressed(base, **fields)
    perturb_cores_(model)
    model.save_pretrained(folder / "adapter")
    save_file({"logits": logits_of(model)}, folder / "logits.safetensors")
    return model


LOAD_IN_FRESH_PROCESS = """
    import sys
    from pathlib import Path
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
    import peft_jactus
    from peft_jactus.numerics import approximation
    from tests.support.compressed_models import logits_of

    def forbidden(*args, **kwargs):
        raise AssertionError("loading must not decompose")

    torch.linalg.svd = torch.linalg.eigh = torch.linalg.qr = forbidden
    for folder in map(Path, sys.argv[1:]):
        expected = load_file(folder / "logits.safetensors")["logits"]
        is_bert = "bert" in folder.name
        auto = AutoModelForSequenceClassification if is_bert else AutoModelForCausalLM
        auto_peft = AutoPeftModelForSequenceClassification if is_bert else AutoPeftModelForCausalLM
        kwargs = {"dtype": expected.dtype} | ({"num_labels": 3} if is_bert else {})

        def base():
            return auto.from_pretrained(folder / "base", **kwargs)

        native = base()
        native.load_adapter(str(folder / "adapter"))
        loaded = {
            "PeftModel": PeftModel.from_pretrained(base(), folder / "adapter"),
            "low_cpu_mem_usage": PeftModel.from_pretrained(base(), folder / "adapter", low_cpu_mem_usage=True),
            "AutoPeftModel": auto_peft.from_pretrained(folder / "adapter", **kwargs),
            "transformers load_adapter": native,
        }
        for way, model in loaded.items():
            print(folder.name, way, torch.equal(logits_of(model.eval()), expected))
"""


def test_reload_in_a_fresh_process_is_bit_equal(tmp_path):
    folders = []
    for build in (tiny_bert, tiny_llama, tiny_gpt2):
        for dtype in (torch.float32, torch.bfloat16):
            folder = tmp_path / f"{build.__name__}-{str(dtype)[6:]}"
            folder.mkdir()
            saved_adapter(folder, build, dtype)
            folders.append(folder)
    for bits in (8, 4):
        folder = tmp_path / f"tiny_llama-in-{bits}"
        folder.mkdir()
        saved_adapter(folder, tiny_llama, torch.bfloat16, frozen_bits=bits)
        folders.append(folder)
    lines = [
        line for line in finish(in_fresh_process(LOAD_IN_FRESH_PROCESS, *folders)).splitlines() if "tiny_" in line
    ]
    assert len(lines) == 4 * len(folders)
    assert [line for line in lines if not line.endswith("True")] == []


def test_checkpoint_does_not_depend_on_the_base_weights_of_targeted_layers(tmp_path):
    expected = logits_of(saved_adapter(tmp_path, tiny_llama))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, module in base.named_modules():
            if config["layer_ranks"].get(name) is not None:
                module.weight.fill_(torch.nan)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)


def test_an_adapter_made_after_lora_was_merged_loads_onto_the_original_base(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2, init_lora_weights=False)
    merged = get_peft_model(BertForSequenceClassification.from_pretrained(tmp_path / "base"), config)
    merged = merged.merge_and_unload()
    dense = logits_of(merged)
    assert not torch.allclose(dense, logits_of(tiny_bert()), atol=1e-2)  # LoRA changed something
    model = compressed(merged, retained_ratio=1.0)
    torch.testing.assert_close(logits_of(model), dense, rtol=1e-4, atol=1e-5)
    perturb_cores_(model)
    model.save_pretrained(tmp_path / "adapter")

    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits_of(model))


def test_saved_config_says_how_to_load(tmp_path):
    saved_adapter(tmp_path, tiny_llama)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "JACTUS"
    assert config["init_weights"] == "empty"
    assert config["peft_jactus_version"] == peft_jactus.__version__
    assert any(config["layer_ranks"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(k for k in t if "jactus_frozen_factor" in k)), r"must hold \['jactus_"),
        (
            lambda t: [t.pop(k) for k in list(t) if ".layers.0.mlp.down_proj." in k],
            r"disagree on the layers.*down_proj",
        ),
        (
            lambda t: t.update({k: v[:-1].clone() for k, v in t.items() if "jactus_left" in k}),
            r"`jactus_left` must have",
        ),
        (
            lambda t: t.update({k: v[:-1].clone() for k, v in t.items() if "jactus_adapt_up" in k}),
            r"`jactus_adapt_up` must",
        ),
    ],
    ids=["missing tensor", "missing layer", "misshapen basis", "misshapen adaptation"],
)
def test_missing_or_misshapen_tensors_are_errors(tmp_path, change, message):
    saved_adapter(tmp_path, tiny_llama)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["jactus_right", "jactus_left_order", "jactus_adapt_up"])
def test_a_tensor_that_transformers_does_not_fill_raises_where_it_is_needed(tmp_path, name):
    saved_adapter(tmp_path, tiny_llama)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    missing = next(key for key in tensors if key.endswith(name) and tensors[key].numel())
    del tensors[missing]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.load_adapter(str(tmp_path / "adapter"))
    with pytest.raises(RuntimeError, match=f"`{name}` of adapter 'default' was never filled"):
        logits_of(base)
    with pytest.raises((RuntimeError, ValueError), match=f"`{name}`"):
        compressed_copy(base)


def test_a_state_dict_that_is_refused_leaves_the_adapter_as_it_was():
    model = compressed(tiny_llama())
    expected = logits_of(model)
    others = get_peft_model_state_dict(compressed(tiny_llama(), retained_ratio=0.4))
    last = [key for key in others if key.endswith("jactus_adapt_up")][-1]
    others[last] = others[last][:-1]
    ranks = dict(model.peft_config["default"].layer_ranks)
    with pytest.raises(ValueError, match="`jactus_adapt_up` must have shape"):
        set_peft_model_state_dict(model, others)
    assert model.peft_config["default"].layer_ranks == ranks
    assert torch.equal(logits_of(model), expected)


def test_truncated_weights_and_torn_config_are_errors(tmp_path):
    saved_adapter(tmp_path, tiny_llama)
    for file, error in ((WEIGHTS, SafetensorError), ("adapter_config.json", json.JSONDecodeError)):
        torn = tmp_path / f"torn-{file}"
        shutil.copytree(tmp_path / "adapter", torn)
        content = (torn / file).read_bytes()
        (torn / file).write_bytes(content[: len(content) // 2])
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with pytest.raises(error):
            PeftModel.from_pretrained(base, torn)


def test_adapter_of_another_model_is_refused(tmp_path):
    saved_adapter(tmp_path, tiny_llama)
    with pytest.raises(ValueError, match="not found in the base model"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter")


def test_an_adapter_of_another_format_is_refused(tmp_path):
    saved_adapter(tmp_path, tiny_llama)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for other in (max(READABLE_FORMATS) + 1, None):
        path.write_text(json.dumps(config | {"adapter_format": other}))
        with pytest.raises(ValueError, match=f"has format {other} .*Load it with the version that wrote it"):
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_name_that_looks_like_one_of_our_tensors_is_a_name(tmp_path):
    model = compressed(tiny_bert(), adapter_name="jactus_v1")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "jactus_v1", adapter_name="jactus_v1")
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_an_adapter_that_needs_freed_weights_is_refused_when_it_is_loaded(tmp_path):
    base = tiny_bert()
    compressed(copy.deepcopy(base), target_modules=["query"]).save_pretrained(tmp_path)
    model = compressed(base, target_modules=["query", "key"])
    with pytest.raises(ValueError, match=r"leaves .*key.* as they were: the dense weights were freed"):
        model.load_adapter(tmp_path, adapter_name="second")
    assert list(model.peft_config) == ["default"]


def test_second_adapter_loads_from_disk_onto_freed_weights(tmp_path):
    expected = logits_of(saved_adapter(tmp_path, tiny_llama))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(logits_of(model), expected)


# -- Trainer ----------------------------------------------------------------------------------------------


def train(folder, *, resume_from=None, save_steps=4, **fields):
    set_seed(0)
    model = compressed(tiny_bert(), **fields)
    data = [
        {key: value[row] for key, value in batch.items()}
        for batch in batches_for(model.get_base_model(), num_batches=8, seed=1)
        for row in range(4)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        save_steps=save_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        seed=0,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=arguments, train_dataset=data).train(resume_from_checkpoint=resume_from)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("frozen_bits", [None, 4])
def test_resuming_the_trainer_equals_an_uninterrupted_run(tmp_path, frozen_bits):
    whole = train(tmp_path / "whole", frozen_bits=frozen_bits)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = train(tmp_path / "resumed", resume_from=checkpoint, frozen_bits=frozen_bits)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


# -- kill -9 ----------------------------------------------------------------------------------------------

CALIBRATE_FOREVER = """
    import itertools, sys
    from peft_jactus import calibrate
    from tests.support.compressed_models import batches_for, jactus_config, tiny_llama

    model = tiny_llama()
    batches = itertools.cycle(batches_for(model, num_batches=3))
    print("started", flush=True)
    calibrate(model, jactus_config(model), batches, statistics_file=sys.argv[1], save_every=1, progress_bar=False)
"""

INJECT_AND_SAVE_FOREVER = """
    import sys
    from pathlib import Path
    from tests.support.compressed_models import compressed, perturb_cores_, tiny_llama

    print("started", flush=True)
    for seed in range(10**6):
        model = compressed(tiny_llama(), rank_pattern={".*": 1 + seed % 20})
        model.save_pretrained(Path(sys.argv[1]))
"""


def kill_when(process, ready, delay):
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_statistics_survive_a_kill_during_calibration(tmp_path):
    file = tmp_path / "statistics.safetensors"
    for delay in (0.05, 0.2):
        process = in_fresh_process(CALIBRATE_FOREVER, file)
        kill_when(process, file.exists, delay)
        statistics = CalibrationStatistics.load(file)
        assert statistics.num_batches >= 1
        tokens = {layer.num_tokens for layer in statistics.values()}
        assert tokens == {48 * statistics.num_batches}


def test_a_kill_while_saving_leaves_a_whole_adapter_or_an_error(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    outcomes = set()
    for delay in (0.0, 0.05, 0.1):
        folder = tmp_path / f"adapter-{delay}"
        process = in_fresh_process(INJECT_AND_SAVE_FOREVER, folder)
        kill_when(process, (folder / WEIGHTS).exists, delay)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        try:
            model = PeftModel.from_pretrained(base, folder)
        except (ValueError, SafetensorError, OSError) as error:
            outcomes.add(type(error).__name__)
            continue
        outcomes.add("whole")
        ranks = {rank for rank in model.peft_config["default"].layer_ranks.values() if rank is not None}
        fresh = compressed(tiny_llama(), rank_pattern={".*": ranks.pop()})
        assert torch.equal(logits_of(model), logits_of(fresh))
    assert "whole" in outcomes
