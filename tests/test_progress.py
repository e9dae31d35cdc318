"""Progress bars: transformers' switch is for all of them, and each call has one of its own."""

import pytest
import transformers
from peft import get_peft_model

from peft_jactus import calibrate, export_compressed, plan_ranks
from peft_jactus.parse import RouterConfig, initialize_router_, routed_copy
from tests.support.compressed_models import batches_for, jactus_config, perturb_cores_, tiny_llama

BARS = [
    "Warming up the head",
    "Calibrating",
    "Ranking directions",
    "Factorizing",
    "Folding",
    "Ordering ranks",
    "Weighing experts",
]


def do_everything(folder, **options):
    """Call all that shows a bar, and return the routed model."""
    model = tiny_llama()
    batches = batches_for(model)
    config = jactus_config(model, modules_to_save=["norm"], storage="factored")
    statistics = calibrate(model, config, batches, head_warmup_steps=2, **options)
    plan_ranks(model, config, statistics, **options)
    model = get_peft_model(model, config).eval()
    perturb_cores_(model)
    export_compressed(model, folder, **options)
    compressed = transformers.AutoModelForCausalLM.from_pretrained(folder)
    routed = routed_copy(compressed, RouterConfig(active_ratio=0.6, expert_size=2), **options)
    initialize_router_(routed, batches, **options)


@pytest.fixture
def transformers_switch():
    yield transformers.logging
    transformers.logging.enable_progress_bar()


def test_one_switch_is_for_all_bars(transformers_switch, tmp_path, capfd):
    do_everything(tmp_path / "shown")
    shown = capfd.readouterr().err
    assert [name for name in BARS if name not in shown] == []
    transformers_switch.disable_progress_bar()
    do_everything(tmp_path / "hidden")
    assert "%" not in capfd.readouterr().err


def test_each_call_can_go_without(tmp_path, capfd):
    do_everything(tmp_path / "hidden", progress_bar=False)
    shown = capfd.readouterr().err
    # `get_peft_model` has no such argument: it is PEFT's.
    assert [name for name in BARS if name in shown] == ["Ranking directions", "Factorizing"]
