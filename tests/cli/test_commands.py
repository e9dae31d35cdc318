"""The command line: what each command prints, writes and refuses."""

import json
import random
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.main import get_command
from typer.testing import CliRunner

import peft_jactus
from peft_jactus import JactusConfig, calibrate, export_compressed, loading_options, rank_summary
from peft_jactus.cli import calibration, hub
from peft_jactus.cli import export as exporting
from peft_jactus.cli.data import DataOptions, make_batches, open_rows
from peft_jactus.deployment.ranks import summary_of_adapter
from peft_jactus.tuner.adapter_format import AdapterShape
from peft_jactus_cli import app
from tests.support.compressed_models import (
    VOCABULARY,
    batches_for,
    compressed,
    jactus_config,
    logits_of,
    perturb_cores_,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    trained,
)
from tests.support.quantized_models import save_gguf
from tests.support.tiny_tokenizer import tiny_tokenizer

# One adapter is exported in both forms.
pytestmark = pytest.mark.filterwarnings("ignore:The ranks were chosen for `storage`='pivoted'")

# As the options of the commands have it by default.
DATA = DataOptions(
    dataset=None,
    dataset_config=None,
    data_dir=None,
    split="train",
    text_columns=("text",),
    image_column="image",
    label_column="label",
    batch_size=8,
    max_length=None,
)
BUILDERS = {"bert": tiny_bert, "llama": tiny_llama, "gpt2": tiny_gpt2}
AUTO_CLASSES = {
    "bert": AutoModelForSequenceClassification,
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
}
COMMANDS = get_command(app).commands


def run(*arguments, fails=False):
    """Run a command; return what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == (1 if fails else 0), result.output
    return result.output


def refusal(*arguments):
    """Return the message of an expected error."""
    output = run(*arguments, fails=True)
    assert "Traceback" not in output
    return output[output.index("Error: ") :].replace("\n", " ")


def words(generator, number):
    return " ".join(f"w{generator.randrange(2, VOCABULARY)}" for _ in range(number))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Base models with a tokenizer, trained adapters, compressed checkpoints, and rows to calibrate on."""
    folder = tmp_path_factory.mktemp("models")
    for name, build in BUILDERS.items():
        build().save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        # 0.95 leaves some layers dense, and GPT-2 stores those transposed.
        fields = {"retained_ratio": 0.95} if name == "gpt2" else {}
        model = trained(type(build()).from_pretrained(folder / name), **fields)
        model.save_pretrained(folder / f"{name}-adapter")
        export_compressed(model, folder / f"{name}-pivoted", progress_bar=False)
        export_compressed(model, folder / f"{name}-factored", storage="factored", progress_bar=False)
    generator = random.Random(0)
    rows = [{"text": words(generator, 5 + i % 9), "topic": "LABEL_1", "label": i % 3} for i in range(48)]
    (folder / "rows").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows" / "train.parquet")
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Don't let `datasets` wait for its threads, which takes five seconds."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def nothing_expensive(monkeypatch):
    """Let the test fail as soon as a model is loaded."""

    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded before the options were checked")

    monkeypatch.setattr(calibration, "load_pretrained", forbidden)
    monkeypatch.setattr(exporting, "load_adapter", forbidden)


def loaded(name, folder):
    return AUTO_CLASSES[name].from_pretrained(folder)


# -- the command itself -----------------------------------------------------------------------------------


def test_help_names_every_command_and_python_m_runs_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peft-jactus", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("peft_jactus", run_name="__main__", alter_sys=True)
    output = capsys.readouterr().out
    assert all(name in output for name in ("inspect", "export", "compress", "bench"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for(name):
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert parameter.name == "help" or parameter.help, f"{name} {parameter.name}"


def test_version_is_that_of_the_package():
    assert run("--version").strip() == f"peft-jactus {peft_jactus.__version__}"


def test_traceback_is_shown_if_asked_for(tmp_path):
    result = CliRunner().invoke(app, ["--traceback", "inspect", str(tmp_path)])
    assert isinstance(result.exception, ValueError)
    assert "neither a compressed checkpoint" in str(result.exception)


# -- inspect ----------------------------------------------------------------------------------------------


def table_of(text):
    """Return the lines of a rank table, in no order: headers don't know that of the model."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layer  "))
    end = next(i for i, line in enumerate(lines) if " targeted layers keep " in line)
    return lines[start], set(lines[start + 1 : end]), lines[end]


@pytest.mark.parametrize("storage", ["pivoted", "factored"])
@pytest.mark.parametrize("name", BUILDERS)
def test_inspect_reads_off_the_headers_what_the_loaded_model_says(home, name, storage):
    folder = home / f"{name}-{storage}"
    output = run("inspect", folder)
    assert table_of(output) == table_of(str(rank_summary(loaded(name, folder))))
    size = (folder / "model.safetensors").stat().st_size
    assert re.search(rf"model\.safetensors +{size:,} bytes", output)
    assert "compressed checkpoint" in output
    assert "format version" in output


@pytest.mark.parametrize("name", BUILDERS)
def test_inspect_reads_off_an_adapter_what_the_loaded_one_says(home, name):
    folder = home / f"{name}-adapter"
    model = PeftModel.from_pretrained(loaded(name, home / name), folder)
    output = run("inspect", folder)
    assert table_of(output) == table_of(str(rank_summary(model)))
    assert str(home / name) in output, "the base model"


def test_inspect_says_how_many_ranks_adapt(tmp_path):
    model = compressed(tiny_llama(), adaptation_rank=3, retained_ratio=0.8)
    model.save_pretrained(tmp_path)
    output = run("inspect", tmp_path)
    assert re.search(
        r"adaptation +3 of each layer's ranks, half at most, or on top of a dense one; they train", output
    )
    assert table_of(output) == table_of(str(rank_summary(model)))


def test_blocks_are_in_the_order_of_their_numbers():
    names = [f"layers.{block}.{name}" for block in range(12) for name in ("a", "b")]
    config = JactusConfig(
        target_modules="all-linear", layer_ranks=dict.fromkeys(reversed(names), 2), adaptation_rank=0
    )
    shapes = {
        f"base_model.model.{name}.{tensor}": shape
        for name in names
        for tensor, shape in AdapterShape(2).tensors(8, 8, bias=False).items()
    }
    assert [row.name for row in summary_of_adapter(config, shapes).rows] == names


def overwrite_a_tensor(path, name):
    """Flip one bit in the middle of a tensor."""
    data = bytearray(path.read_bytes())
    header_length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + header_length])[name]["data_offsets"]
    data[8 + header_length + (start + end) // 2] ^= 1
    path.write_bytes(data)


def test_verify_names_a_tensor_with_a_flipped_bit_which_headers_do_not_show(home, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(home / "llama-pivoted", folder)
    run("inspect", folder, "--verify")
    overwrite_a_tensor(folder / "model.safetensors", "model.embed_tokens.weight")
    run("inspect", folder)
    message = refusal("inspect", folder, "--verify")
    assert "1 tensors" in message
    assert "model.embed_tokens.weight" in message


def test_verify_refuses_an_adapter(home):
    assert "an adapter carries no digests" in refusal("inspect", home / "bert-adapter", "--verify")


def test_inspect_refuses_a_checkpoint_that_lacks_a_described_layer(home, tmp_path):
    folder = tmp_path / "edited"
    shutil.copytree(home / "llama-factored", folder)
    config = json.loads((folder / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers["model.layers.7.mlp.up_proj"] = layers["model.layers.0.mlp.up_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "model.layers.7.mlp.up_proj: config.json describes a factored layer" in refusal("inspect", folder)


def test_inspect_refuses_an_adapter_whose_file_has_other_ranks(home, tmp_path):
    folder = tmp_path / "edited"
    shutil.copytree(home / "llama-adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    name = "model.layers.0.mlp.up_proj"
    config["layer_ranks"][name] += 1
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert f"{name}: adapter_config.json gives it rank {config['layer_ranks'][name]}" in refusal("inspect", folder)


def test_inspect_refuses_other_directories(home, tmp_path):
    assert "neither a compressed checkpoint" in refusal("inspect", home / "rows")
    assert "neither a compressed checkpoint" in refusal("inspect", home / "bert")
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert "LORA adapter, not a JACTUS one" in refusal("inspect", tmp_path / "lora")
    assert "neither a directory nor a name on the Hub" in refusal("inspect", tmp_path / "missing")


def test_plot_is_written(home, tmp_path):
    run("inspect", home / "llama-pivoted", "--plot", tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_of_a_hub_name_downloads_nothing_but_json_and_safetensors(home, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(home / "llama-pivoted")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert table_of(run("inspect", "user/name")) == table_of(run("inspect", home / "llama-pivoted"))
    assert asked == {"name": "user/name", "allow_patterns": ["*.json", "*.safetensors"]}


# -- export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_export_writes_what_export_compressed_writes(home, tmp_path, name):
    run("export", home / f"{name}-adapter", tmp_path / "out")
    expected = logits_of(loaded(name, home / f"{name}-pivoted"))
    torch.testing.assert_close(logits_of(loaded(name, tmp_path / "out")), expected, rtol=0, atol=0)


def test_export_takes_storage_and_dtype(home, tmp_path):
    out = tmp_path / "out"
    run("export", home / "llama-adapter", out, "--storage", "factored", "--dtype", "bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(out / "model.safetensors", "pt") as reader:
        assert "model.layers.0.mlp.up_proj.down.weight" in reader.keys()  # noqa: SIM118  # not a mapping


@pytest.mark.parametrize("bits", [8, 4])
def test_export_takes_bits_and_statistics(home, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    model = loaded("llama", home / "llama")
    file = tmp_path / "statistics.safetensors"
    calibrate(model, jactus_config(model), batches_for(model), statistics_file=file, progress_bar=False)
    run(
        "export",
        home / "llama-adapter",
        tmp_path / "out",
        "--bits",
        bits,
        *(["--statistics", file] if bits == 4 else []),
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {form["bits"] for form in config["quantization_config"]["layers"].values()} == {bits}
    expected = logits_of(loaded("llama", home / "llama-pivoted"))
    assert (logits_of(loaded("llama", tmp_path / "out")) - expected).norm() < 0.2 * expected.norm()
    assert "llama" in run("inspect", tmp_path / "out", "--verify")


@pytest.mark.usefixtures("nothing_expensive")
def test_export_refuses_bits_that_there_are_not(home, tmp_path):
    adapter, out = home / "llama-adapter", tmp_path / "out"
    (tmp_path / "statistics").touch()
    assert "`bits` must be one of (8, 4)" in refusal("export", adapter, out, "--bits", 3)
    assert "--statistics is only for --bits; leave it out" in refusal(
        "export", adapter, out, "--statistics", tmp_path / "statistics"
    )
    assert "leave out --storage, --bits" in refusal("export", adapter, out, "--dense", "--bits", 8)
    assert "`bits` must be one of (8, 4)" in refusal("compress", home / "llama", out, "--data-free", "--bits", 5)
    assert not out.exists()


def test_export_takes_the_tokenizer_beside_the_adapter_before_that_of_the_base_model(home, tmp_path):
    run("export", home / "llama-adapter", tmp_path / "without")
    assert AutoTokenizer.from_pretrained(tmp_path / "without").bos_token is None
    shutil.copytree(home / "llama-adapter", tmp_path / "adapter")
    tiny_tokenizer(bos_token="w2").save_pretrained(tmp_path / "adapter")
    run("export", tmp_path / "adapter", tmp_path / "with")
    assert AutoTokenizer.from_pretrained(tmp_path / "with").bos_token == "w2"


def test_export_restores_a_head_with_another_number_of_classes_than_the_base_model(tmp_path):
    base = tiny_bert().bert
    base.config.num_labels = 2
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = compressed(model)
    perturb_cores_(model)
    model.save_pretrained(tmp_path / "adapter")
    run("export", tmp_path / "adapter", tmp_path / "out")
    result = loaded("bert", tmp_path / "out")
    assert result.config.num_labels == 3
    torch.testing.assert_close(logits_of(result), logits_of(model), rtol=1e-4, atol=1e-5)


def test_export_loads_an_adapter_without_task_type_by_the_class_of_its_base_model(home, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(home / "bert")
    config = JactusConfig(target_modules=["query"], decomposition="svd", retained_ratio=0.5, adaptation_rank=0)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    run("export", tmp_path / "adapter", tmp_path / "out")
    result = loaded("bert", tmp_path / "out")
    torch.testing.assert_close(logits_of(result), logits_of(model.eval()), rtol=1e-4, atol=1e-5)


def test_export_needs_a_base_model_and_takes_another_one(home, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    shutil.copytree(home / "llama-adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert "give --base-model" in refusal("export", folder, tmp_path / "out")
    run("export", folder, tmp_path / "out", "--base-model", home / "llama")
    assert "llama" in run("inspect", tmp_path / "out")


def test_export_passes_the_upload_on(home, tmp_path, monkeypatch):
    passed = {}
    monkeypatch.setattr(exporting, "export_compressed", lambda model, out, **options: passed.update(options))
    run("export", home / "llama-adapter", tmp_path / "out", "--push-to-hub", "--repo-id", "user/name")
    assert passed["push_to_hub"] is True
    assert passed["repo_id"] == "user/name"


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("source", ["pivoted", "adapter"])
def test_export_dense_writes_plain_layers_that_load_without_this_package(home, tmp_path, name, source):
    out = tmp_path / "out"
    run("export", home / f"{name}-{source}", out, "--dense")
    code = """
        import sys
        sys.modules["peft_jactus"] = sys.modules["peft"] = None  # importing them is an error
        import transformers
        model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
        model.save_pretrained(sys.argv[1] + "-again")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), out, AUTO_CLASSES[name].__name__]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "MISMATCH" not in finished.stderr
    expected = logits_of(loaded(name, home / f"{name}-pivoted"))
    result = loaded(name, tmp_path / "out-again")
    torch.testing.assert_close(logits_of(result), expected, rtol=1e-4, atol=1e-5)
    assert [type(layer) for layer in result.modules()] == [
        type(layer) for layer in loaded(name, home / name).modules()
    ]
    assert not (out / "README.md").exists()  # that of the compressed checkpoint says otherwise


def test_export_dense_takes_dtype_and_what_lies_beside_the_weights(home, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = loaded("llama", home / "llama-pivoted")
    model.save_pretrained(source, max_shard_size="20KB")
    tiny_tokenizer(bos_token="w2").save_pretrained(source)
    (source / "1_Other").mkdir()
    for place in ("notes.txt", "1_Other/config.json", "1_Other/model.safetensors"):
        (source / place).write_text("{}")
    run("export", source, out, "--dense", "--dtype", "bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(out).bos_token == "w2"
    assert (out / "notes.txt").exists()
    assert {path.name for path in (out / "1_Other").iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


def test_export_dense_into_a_folder_of_the_checkpoint_does_not_copy_what_it_writes(home, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(home / "llama-pivoted", source)
    for _ in range(2):
        run("export", source, source / "dense", "--dense", "--overwrite")
    assert not [path.name for path in source.rglob("*dense*") if path != source / "dense"]
    assert loaded("llama", source / "dense")


@pytest.mark.usefixtures("nothing_expensive")
def test_export_dense_refuses_what_it_cannot_do(home, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert "is not compressed" in refusal("export", home / "llama", out, "--dense")
    assert "neither an adapter nor a checkpoint" in refusal("export", tmp_path / "empty", out, "--dense")
    for option in (["--storage", "factored"], ["--push-to-hub"], ["--repo-id", "a/b"], ["--bits", "0"]):
        assert "leave out --storage" in refusal("export", home / "llama-pivoted", out, "--dense", *option)
    assert not out.exists()


@pytest.mark.usefixtures("nothing_expensive")
def test_export_checks_before_it_loads(home, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert re.search(
        r"OUTPUT_DIR \S+ is not empty\. .*--overwrite", refusal("export", home / "llama-adapter", tmp_path / "full")
    )
    assert "is not an adapter" in refusal("export", home / "llama", tmp_path / "out")
    assert "also give --push-to-hub" in refusal("export", home / "llama-adapter", tmp_path / "out", "--repo-id", "a/b")
    for out, option, name in (("out", ["--repo-id", "a/b/c"], "a/b/c"), ("my--out", [], "my--out")):
        message = refusal("export", home / "llama-adapter", tmp_path / out, "--push-to-hub", *option)
        assert f"--repo-id: a repository cannot be called {name!r}" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["inspect"], ["export", "out"]], ids=lambda command: command[0])
def test_damaged_and_unknown_adapters_are_refused(home, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    command, *target = command
    for name in ("torn", "unknown"):
        shutil.copytree(home / "llama-adapter", tmp_path / name)
    weights, config = tmp_path / "torn" / SAFETENSORS_WEIGHTS_NAME, tmp_path / "unknown" / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-100])
    config.write_text(config.read_text().replace("JACTUS", "NEWEST"))
    assert f"{SAFETENSORS_WEIGHTS_NAME} cannot be read as safetensors" in refusal(command, "torn", *target)
    assert "a 'NEWEST' adapter, which this version of PEFT does not know" in refusal(command, "unknown", *target)
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_what_was_there(home, tmp_path):
    (tmp_path / "notes.txt").touch()
    run("export", home / "llama-adapter", tmp_path, "--overwrite")
    assert not (tmp_path / "notes.txt").exists()
    assert (tmp_path / "config.json").exists()


@pytest.fixture
def project(home, tmp_path):
    """A folder with all that the commands read, which each test may damage."""
    for name in ("llama", "rows", "llama-pivoted"):
        shutil.copytree(home / name, tmp_path / "run" / name)
    shutil.copytree(home / "llama-adapter", tmp_path / "adapter" / "inner")
    (tmp_path / "run" / "statistics").touch()
    (tmp_path / "run" / "llama" / "model.gguf").touch()
    (tmp_path / "here").mkdir()
    config = tmp_path / "adapter" / "inner" / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "run" / "llama")}
    config.write_text(json.dumps(fields))
    (tmp_path / "link").symlink_to(tmp_path / "adapter", target_is_directory=True)
    return tmp_path


# Of a folder that holds what the command reads: the command, and what the error says.
HOLDS_WHAT_IS_READ = {
    "the adapter itself": (("export", "adapter/inner", "adapter/inner"), "is ADAPTER_DIR ("),
    "a folder with the adapter": (("export", "adapter/inner", "adapter"), "contains ADAPTER_DIR ("),
    "a link to such a folder": (("export", "adapter/inner", "link"), "contains ADAPTER_DIR ("),
    "a longer way to it": (("export", "link/inner", "run/../adapter"), "contains ADAPTER_DIR ("),
    "its base model": (("export", "adapter/inner", "run/llama"), "is the adapter's base model ("),
    "--base-model": (("export", "adapter/inner", "run", "--base-model", "run/llama"), "contains --base-model ("),
    "--statistics": (
        ("export", "adapter/inner", "run", "--statistics", "run/statistics", "--bits", "8", "--base-model", "a/b"),
        "contains --statistics (",
    ),
    "the adapter, dense": (("export", "adapter/inner", "adapter", "--dense"), "contains ADAPTER_DIR ("),
    "its base model, dense": (("export", "adapter/inner", "run", "--dense"), "contains the adapter's base model ("),
    "a compressed checkpoint": (("export", "run/llama-pivoted", "run", "--dense"), "contains ADAPTER_DIR ("),
    "a model": (("compress", "run/llama", "run/llama", "--data-free"), "is MODEL ("),
    "a model in a file": (("compress", "run/llama/model.gguf", "run", "--data-free"), "contains MODEL ("),
    "--data-dir": (("compress", "a/b", "run", "--data-dir", "run/rows"), "contains --data-dir ("),
    "--dataset": (("compress", "a/b", "run", "--dataset", "run/rows"), "contains --dataset ("),
    "the current directory": (("export", "../adapter/inner", "."), "is the current directory ("),
    "one above it": (("compress", "a/b", "..", "--data-free"), "contains the current directory ("),
}


@pytest.mark.usefixtures("nothing_expensive")
@pytest.mark.parametrize("case", HOLDS_WHAT_IS_READ)
def test_overwrite_deletes_nothing_that_is_read(project, monkeypatch, case):
    (command, source, out, *options), message = HOLDS_WHAT_IS_READ[case]
    before = sorted(project.rglob("*"))
    monkeypatch.chdir(project / "here" if "current" in message else project)
    output = refusal(command, source, out, *options, "--overwrite")
    assert f"OUTPUT_DIR {out} {message}" in output
    assert "which would be deleted. Give another directory." in output
    assert sorted(project.rglob("*")) == before


def test_a_folder_in_the_adapter_and_one_beside_it_can_be_written(project, monkeypatch):
    monkeypatch.chdir(project)
    for out in ("adapter/inner/compressed", "adapter-compressed"):
        for _ in range(2):
            run("export", "adapter/inner", out, "--overwrite")
        assert (project / out / "config.json").exists()
    assert (project / "adapter" / "inner" / "adapter_config.json").exists()


# -- compress ---------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(monkeypatch):
    """Record the batches that `calibrate` gets."""
    record = SimpleNamespace(batches=[], options={})

    def recording(model, config, batches, **options):
        record.batches = list(batches)
        record.options = options
        record.blocks_checkpoint = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        return calibrate(model, config, record.batches, **options)

    monkeypatch.setattr(calibration, "calibrate", recording)
    return record


@pytest.mark.parametrize("bits", [[], ["--bits", "4"]], ids=["plain", "4 bits"])
def test_a_gguf_file_is_compressed_in_one_command(home, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    save_gguf(tmp_path)
    out, rows = tmp_path / "out", tmp_path / "rows"
    rows.mkdir()
    datasets.Dataset.from_dict({"text": ["!\"#$%&'()*+,-./" * 4] * 8}).to_parquet(rows / "train.parquet")
    options = ["--data-dir", rows, "--max-length", 8, "--batch-size", 2, "--retained-ratio", 0.8, *bits]
    run("compress", tmp_path / "model.gguf", out, *options)
    model = AutoModelForCausalLM.from_pretrained(out)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        difference = model(ids).logits - expected(ids).logits
        assert difference.norm() < 0.9 * expected(ids).logits.norm()  # of another model: 1.4
    assert AutoTokenizer.from_pretrained(out)("!#")["input_ids"]
    layers = json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    assert {form.get("bits") for form in layers.values()} == ({4} if bits else {None})


def compress(home, name, out, *options):
    return run("compress", home / name, out, "--retained-ratio", "0.6", *options)


@pytest.mark.parametrize("name", BUILDERS)
def test_compress_writes_what_calibrating_and_exporting_by_hand_writes(home, tmp_path, name, calibrated):
    out = tmp_path / "out"
    compress(home, name, out, "--data-dir", home / "rows", "--max-length", "16", "--batch-size", "4")
    base = loaded(name, home / name)
    task_type = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    config = JactusConfig(task_type=task_type, target_modules="all-linear", retained_ratio=0.6, adaptation_rank=0)
    calibrate(base, config, calibrated.batches, max_batches=16, progress_bar=False)
    export_compressed(get_peft_model(base, config), tmp_path / "by-hand", progress_bar=False)
    result = loaded(name, out)
    assert rank_summary(result) == rank_summary(loaded(name, tmp_path / "by-hand"))
    torch.testing.assert_close(logits_of(result), logits_of(loaded(name, tmp_path / "by-hand")), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(out).vocab_size == VOCABULARY
    assert 0.5 < rank_summary(result).retained_ratio <= 0.6


def test_causal_batches_are_all_texts_in_blocks_and_their_labels_are_the_tokens(home):
    generator = random.Random(0)
    rows = [{"text": text} for text in ("", *(words(generator, number) for number in (3, 30, 1, 9)))]
    tokenizer = tiny_tokenizer()
    config = transformers.AutoConfig.from_pretrained(home / "llama")
    batches = list(make_batches(rows, "causal-lm", replace(DATA, batch_size=2, max_length=8), config, tokenizer))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 8), (2, 8), (1, 8)]
    tokens = [token for row in rows[1:] for token in (*tokenizer(row["text"])["input_ids"], 1)]
    assert torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist() == tokens[:40]
    for batch in batches:
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert bool((batch["attention_mask"] == 1).all())


def test_few_short_texts_are_one_short_block(home):
    config = transformers.AutoConfig.from_pretrained(home / "llama")
    (batch,) = make_batches([{"text": "w2 w3"}], "causal-lm", DATA, config, tiny_tokenizer())
    assert batch["input_ids"].tolist() == [[2, 3, 1]]


def test_classification_batches_are_padded_rows_with_their_labels(home):
    config = transformers.AutoConfig.from_pretrained(home / "bert")
    rows = [{"text": "w2 w3 w4 w5", "label": 2}, {"text": "w6", "label": "LABEL_1"}]
    options = replace(DATA, batch_size=2, max_length=3)
    (batch,) = make_batches(rows, "sequence-classification", options, config, tiny_tokenizer())
    assert batch["input_ids"].tolist() == [[2, 3, 4], [6, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 1]


def labelled_rows(folder, names, texts):
    """Write rows of both kinds of data, with the classes by number, and with their names."""
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
    numbers = [names.index(name) for name in texts]
    for kind, values, given in (("numbers", numbers, features), ("names", texts, None)):
        rows = {"text": [f"w{5 + i}" for i in range(len(texts))], "label": values}
        (folder / kind).mkdir()
        datasets.Dataset.from_dict(rows, features=given).to_parquet(folder / kind / "train.parquet")


def batch_of(folder, names):
    """Return the only batch that a command would calibrate a model with these classes on, in order."""
    config = transformers.BertConfig(
        num_labels=len(names), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    options = replace(DATA, data_dir=folder)
    rows = open_rows(options, "sequence-classification")
    (batch,) = make_batches(rows, "sequence-classification", options, config, tiny_tokenizer())
    order = batch["input_ids"][:, 0].argsort()
    return batch["labels"][order].tolist()


@pytest.mark.parametrize("of_model", [["neg", "neu", "pos"], ["Neg", "Neu", "POS"]], ids=str)
@pytest.mark.parametrize("of_data", [["neg", "neu", "pos"], ["neu", "pos", "neg"], ["pos", "neg"]], ids=str)
def test_classes_are_found_by_their_names_whatever_numbers_the_data_have(tmp_path, of_data, of_model):
    labelled_rows(tmp_path, of_data, ["pos", "neg", "neg", of_data[0]])
    expected = [["neg", "neu", "pos"].index(name) for name in ["pos", "neg", "neg", of_data[0]]]
    assert batch_of(tmp_path / "numbers", of_model) == expected
    assert batch_of(tmp_path / "names", of_model) == expected


@pytest.mark.parametrize(
    ("of_data", "of_model"),
    [
        (["neu", "pos", "neg"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["1", "2", "3"], ["0", "1", "2"]),
        (["class 1", "class 2", "class 3"], ["neu", "pos", "neg"]),
    ],
    ids=str,
)
def test_names_that_only_count_leave_the_numbers_as_they_are(tmp_path, of_data, of_model):
    labelled_rows(tmp_path, of_data, [of_data[2], of_data[0], of_data[1]])
    assert batch_of(tmp_path / "numbers", of_model) == [2, 0, 1]


def test_other_names_are_shown_in_a_warning_and_those_that_would_be_mixed_up_are_refused(tmp_path):
    labelled_rows(tmp_path, ["neg", "pos"], ["pos", "neg"])
    with pytest.warns(UserWarning, match=r"called \['neg', 'pos'\], those of the model \['BAD', 'GOOD'\]"):
        assert batch_of(tmp_path / "numbers", ["BAD", "GOOD"]) == [1, 0]
    with pytest.raises(ValueError, match=r"\['neg', 'pos'\].*\['POS', 'NEGATIVE'\].*not their numbers"):
        batch_of(tmp_path / "numbers", ["POS", "NEGATIVE"])


def test_pairs_of_texts_are_one_input(home):
    config = transformers.AutoConfig.from_pretrained(home / "bert")
    options = replace(DATA, text_columns=("text", "pair"))
    rows = [{"text": "w2", "pair": "w3 w4", "label": 0}]
    (batch,) = make_batches(rows, "sequence-classification", options, config, tiny_tokenizer())
    assert batch["input_ids"].tolist() == [[2, 3, 4]]


def test_regression_labels_are_numbers(home):
    config = transformers.AutoConfig.from_pretrained(home / "bert", num_labels=1)
    (batch,) = make_batches([{"text": "w2", "label": 2.5}], "sequence-classification", DATA, config, tiny_tokenizer())
    assert batch["labels"].tolist() == [2.5]


def test_image_batches_are_pixels_with_their_labels():
    class Processor:
        def __call__(self, images, return_tensors):
            assert return_tensors == "pt"
            return {"pixel_values": torch.stack([torch.full((3, 2, 2), image.value) for image in images])}

    class Image:
        def __init__(self, value):
            self.value = value

        def convert(self, mode):
            assert mode == "RGB"
            return self

    config = transformers.ViTConfig(num_labels=4)
    rows = [{"image": Image(0.5), "label": 3}, {"image": Image(1.5), "label": 0}]
    (batch,) = make_batches(rows, "image-classification", DATA, config, Processor())
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0.5, 1.5]
    assert batch["labels"].tolist() == [3, 0]


def test_compress_calibrates_on_as_many_batches_as_asked_for_in_shuffled_order(home, tmp_path, calibrated):
    options = (
        "--data-dir",
        home / "rows",
        "--batch-size",
        "3",
        "--max-batches",
        "5",
        "--max-statistics-memory",
        "1MB",
        "--gradient-checkpointing",
    )
    compress(home, "bert", tmp_path / "out", *options)
    assert calibrated.blocks_checkpoint
    assert calibrated.options["max_batches"] == 5
    assert calibrated.options["max_statistics_memory"] == "1MB"
    assert len(calibrated.batches[0]["labels"]) == 3
    labels = torch.cat([batch["labels"] for batch in calibrated.batches]).tolist()
    assert sorted(labels) == sorted([i % 3 for i in range(48)])
    assert labels != [i % 3 for i in range(48)]


def test_compress_without_data_is_a_truncated_svd_and_leaves_the_head_alone(home, tmp_path):
    compress(home, "bert", tmp_path / "out", "--data-free", "--storage", "factored", "--allocation", "uniform")
    result, base = loaded("bert", tmp_path / "out"), loaded("bert", home / "bert")
    assert torch.equal(result.classifier.weight, base.classifier.weight)
    summary = rank_summary(result)
    assert summary.storage == "factored"
    weight = base.bert.encoder.layer[0].attention.self.query.weight
    layer = result.bert.encoder.layer[0].attention.self.query
    vectors, values, covectors = torch.linalg.svd(weight.double())
    best = (vectors[:, : layer.rank] * values[: layer.rank]) @ covectors[: layer.rank]
    torch.testing.assert_close(layer.dense_weight().double(), best, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "targets"), [("llama", {"q_proj", "up_proj"}), ("bert", {"query"})])
def test_compress_targets_only_the_named_layers(home, tmp_path, name, targets):
    compress(home, name, tmp_path / "out", "--data-free", "--target-modules", ",".join(targets))
    names = {row.name.rpartition(".")[2] for row in rank_summary(loaded(name, tmp_path / "out")).rows}
    assert names == targets


@pytest.mark.parametrize("expression", [r".*\.(q|up)_proj", r"model\.layers\.[0-9]{1,2}\..*[qp]_proj(?<!o_proj)"])
def test_compress_targets_the_layers_whose_whole_name_a_regular_expression_matches(home, tmp_path, expression):
    compress(home, "llama", tmp_path / "out", "--data-free", "--target-modules", f" {expression} ")
    expected = [
        name
        for name, module in loaded("llama", home / "llama").named_modules()
        if re.fullmatch(expression, name) and isinstance(module, torch.nn.Linear)
    ]
    assert len(expected) >= 4
    assert {row.name for row in rank_summary(loaded("llama", tmp_path / "out")).rows} == set(expected)


def test_compress_takes_names_with_spaces_and_commas_around_them(home, tmp_path):
    compress(home, "llama", tmp_path / "out", "--data-free", "--target-modules", "q_proj, up_proj,")
    names = {row.name.rpartition(".")[2] for row in rank_summary(loaded("llama", tmp_path / "out")).rows}
    assert names == {"q_proj", "up_proj"}
    options = ([], ["--target-modules", " All-Linear "])
    default, named = (run("plan", home / "llama", "--data-free", *option) for option in options)
    end = default[default.index("The whole model keeps") :]
    assert named.endswith(end)


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_a_misspelt_target_is_refused_before_the_calibration(home, tmp_path, command, monkeypatch):
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: pytest.fail("the model was calibrated"))
    out = [tmp_path / "out"] if command == "compress" else []
    rows = ("--data-dir", home / "rows")
    message = refusal(command, home / "llama", *out, *rows, "--target-modules", "q_proj,v_porj")
    assert "--target-modules: LlamaForCausalLM has no modules with these names: 'v_porj' (similar: v_proj" in message
    message = refusal(command, home / "llama", *out, *rows, "--target-modules", "(q|v)_proj")
    assert "the regular expression '(q|v)_proj' matches no whole name of a module of LlamaForCausalLM" in message
    message = refusal(command, home / "llama", *out, *rows, "--target-modules", "*.q_proj")
    assert "--target-modules: '*.q_proj' is not a regular expression: nothing to repeat" in message
    message = refusal(command, home / "llama", *out, *rows, "--target-modules", " , ")
    assert "--target-modules names nothing; give names with commas between them, or all-linear." in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_plan_shows_what_compress_then_gives(home, tmp_path, name, calibrated):
    options = ("--data-dir", home / "rows", "--max-length", "16", "--batch-size", "4")
    picture = tmp_path / "plan.png"
    output = run("plan", home / name, "--retained-ratio", "0.6", *options, "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    compress(home, name, tmp_path / "out", *options)
    assert str(rank_summary(loaded(name, tmp_path / "out"))) in output
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    planned = re.search(r"The whole model keeps .*%, ([\d.]+) of [\d.]+ MB", output)
    assert float(planned[1]) == pytest.approx(written / 1e6, abs=0.06)
    lines = output[output.index("targeted layers  whole model") :].splitlines()[1:9]
    rises = [float(line.split()[-1]) for line in lines]
    assert rises == sorted(rises)
    assert rises[0] == 0


def test_plan_without_data_expects_no_loss(home):
    output = run("plan", home / "llama", "--data-free")
    assert "Expected rise" not in output
    assert "The whole model keeps" in output


@pytest.mark.parametrize(("option", "value"), [("--model-ratio", "0.8"), ("--max-size", "70KB")])
def test_the_budget_can_be_that_of_the_whole_model(home, tmp_path, option, value):
    out = tmp_path / "out"
    run("compress", home / "llama", out, "--data-free", option, value)
    small, dense = loaded("llama", out), loaded("llama", home / "llama")
    if option == "--model-ratio":
        assert 0.77 < small.num_parameters() / dense.num_parameters() <= 0.8
    else:
        assert 65_000 < sum(file.stat().st_size for file in out.glob("*.safetensors")) <= 70_000


def test_two_budgets_are_refused(home, tmp_path):
    message = refusal("compress", home / "llama", tmp_path / "out", "--retained-ratio", "0.6", "--max-size", "1MB")
    assert "Give one of --retained-ratio, --model-ratio and --max-size." in message


def test_compress_refuses_a_model_whose_head_was_never_trained(home, tmp_path):
    tiny_bert().bert.save_pretrained(tmp_path / "body")
    tiny_tokenizer().save_pretrained(tmp_path / "body")
    message = refusal(
        "compress",
        tmp_path / "body",
        tmp_path / "out",
        "--data-dir",
        home / "rows",
        "--task",
        "sequence-classification",
    )
    assert "classifier.weight" in message
    assert "Fine-tune it first" in message


REFUSED = {
    "no data": ((), "either --dataset or --data-dir; or set --data-free"),
    "two kinds of data": (("--data-dir", "{home}/rows", "--dataset", "a/b"), "either --dataset or --data-dir"),
    "data and data-free": (("--data-dir", "{home}/rows", "--data-free"), "--data-free excludes"),
    "directory without parquet": (("--data-dir", "{home}/bert"), r"has no \*\.parquet file"),
    "unknown text column": (("--data-dir", "{home}/rows", "--text-column", "body"), r"no columns \['body'\]"),
    "unknown label column": (("--data-dir", "{home}/rows", "--label-column", "x"), "it has .*'label'.*--label-column"),
    "unknown split": (("--data-dir", "{home}/rows", "--split", "test"), "split"),
    "ratio": (("--data-free", "--retained-ratio", "1.5"), "`retained_ratio` must be in"),
    "device": (("--data-free", "--device", "nonsense"), "--device nonsense cannot be used"),
    "columns and data-free": (
        (
            "--data-free",
            "--split",
            "test",
            "--text-column",
            "body",
            "--label-column",
            "topic",
            "--image-column",
            "img",
        ),
        "--data-free excludes --split, --text-column, --image-column, --label-column: nothing is calibrated",
    ),
    "batches and data-free": (
        ("--data-free", "--batch-size", "4", "--max-length", "16", "--max-batches", "2", "--gradient-checkpointing"),
        "--data-free excludes --batch-size, --max-length, --max-batches, --gradient-checkpointing: nothing",
    ),
    "memory and data-free": (("--data-free", "--max-statistics-memory", "8GiB"), "excludes --max-statistics-memory:"),
    "configuration and data-free": (
        ("--data-free", "--dataset-config", "x"),
        "--data-free excludes --dataset-config:",
    ),
    "configuration of a directory": (
        ("--data-dir", "{home}/rows", "--dataset-config", "x"),
        "--dataset-config is only for --dataset; leave it out",
    ),
    "three text columns": (("--data-dir", "{home}/rows", *(("--text-column", "text") * 3)), "--text-column must be"),
}


@pytest.mark.usefixtures("nothing_expensive")
@pytest.mark.parametrize("case", REFUSED)
def test_compress_checks_before_it_loads(home, tmp_path, case):
    options, message = REFUSED[case]
    options = [option.format(home=home) for option in options]
    assert re.search(message, refusal("compress", home / "bert", tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_expensive")
def test_compress_refuses_models_and_directories_before_it_loads(home, tmp_path):
    rows = ("--data-dir", home / "rows")
    message = refusal("compress", home / "bert", home / "rows", *rows)
    assert re.search(r"OUTPUT_DIR \S+ is not empty\. .*--overwrite", message)
    assert "already quantised or compressed" in refusal("compress", home / "bert-pivoted", tmp_path / "out", *rows)
    shutil.copytree(home / "bert", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    (tmp_path / "bare" / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in refusal("compress", tmp_path / "bare", tmp_path / "out", *rows)
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    config["architectures"] = ["BertModel"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    assert "Give --task" in refusal("compress", tmp_path / "bare", tmp_path / "out", *rows)


def test_compress_refuses_labels_that_the_model_does_not_have(home):
    config = transformers.AutoConfig.from_pretrained(home / "bert")
    for label in (3, -1, "LABEL_3"):
        batches = make_batches(
            [{"text": "w2", "label": label}], "sequence-classification", DATA, config, tiny_tokenizer()
        )
        with pytest.raises(ValueError, match=r"The model has 3 classes .*Set --label-column"):
            next(batches)


def test_compress_refuses_inputs_longer_than_the_model_takes(home):
    config = transformers.AutoConfig.from_pretrained(home / "llama")
    batches = make_batches([{"text": "w2"}], "causal-lm", replace(DATA, max_length=65), config, tiny_tokenizer())
    with pytest.raises(ValueError, match="--max-length must be at most 64"):
        next(batches)


def test_compress_refuses_to_pad_without_a_padding_token(home):
    config = transformers.AutoConfig.from_pretrained(home / "bert")
    tokenizer = tiny_tokenizer(pad_token=None)
    with pytest.raises(ValueError, match="use --batch-size 1"):
        make_batches([], "sequence-classification", DATA, config, tokenizer)


# -- bench ------------------------------------------------------------------------------------------------


def test_bench_prints_sizes_and_times_and_writes_them(home, tmp_path):
    file = tmp_path / "bench.json"
    sizes = ("--batch-size", "1", "--batch-size", "2", "--sequence-length", "8")
    output = run("bench", home / "llama-pivoted", *sizes, "--repeats", "2", "--device", "cpu", "--json", file)
    figures = json.loads(file.read_text())
    model = loaded("llama", home / "llama-pivoted")
    with loading_options(dense=True):
        dense = loaded("llama", home / "llama-pivoted")
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in (("dense", dense), ("compressed", model))}
    assert figures["num_parameters"] == counts
    assert f"{counts['compressed'] / counts['dense']:.3f}" in output
    cases = [f"{what} {size} x 8 tokens" for size in (1, 2) for what in ("prefill,", "decode a token, after")]
    assert [(t["case"], t["model"]) for t in figures["timings"]] == [
        (case, name) for case in cases for name in ("dense", "compressed")
    ]
    assert all(0 < t["min_seconds"] <= t["median_seconds"] < 1 for t in figures["timings"])
    assert all(case in output for case in cases)
    assert figures["machine"]["threads"] == 1


def test_bench_takes_a_dense_model(home, tmp_path):
    file = tmp_path / "bench.json"
    options = ("--batch-size", "1", "--sequence-length", "4", "--repeats", "1", "--json", file)
    output = run("bench", home / "bert-factored", "--dense", home / "bert", *options)
    assert "forward, 1 x 4 tokens" in output
    assert "decode" not in output
    assert json.loads(file.read_text())["num_parameters"]["dense"] == tiny_bert().num_parameters()


def test_bench_refuses_what_it_cannot_time(home):
    assert "is not a compressed checkpoint" in refusal("bench", home / "bert")
    # 64 positions, 16 of which are for the tokens that are decoded.
    assert "--sequence-length must be at most 48" in refusal(
        "bench", home / "llama-pivoted", "--sequence-length", "49", "--device", "cpu"
    )


# -- files that are written at the end -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "option"),
    [(["inspect"], "--plot"), (["plan", "--data-free"], "--plot"), (["bench"], "--json")],
    ids=str,
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(home, tmp_path, monkeypatch, command, option):
    for place in ("cli.inspect.inspect_folder", "cli.calibration.load_pretrained", "cli.bench.load_pair"):
        monkeypatch.setattr(f"peft_jactus.{place}", lambda *_, **__: pytest.fail("the work was begun"))
    command = [*command, home / ("llama" if command[0] == "plan" else "llama-pivoted")]
    missing = tmp_path / "missing"
    message = refusal(*command, option, missing / "file.png")
    assert f"{option} {missing / 'file.png'}: there is no directory {missing}. Make it first." in message
    if option == "--plot":
        for name in ("plot", "plot.doc"):
            message = refusal(*command, option, tmp_path / name)
            assert f"--plot {tmp_path / name}: the name must end in one of ." in message
            assert ".png, " in message
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write to everything
    assert "cannot be written: permission denied" in refusal(*command, option, tmp_path / "file.png")
    assert list(tmp_path.iterdir()) == []


# -- places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compress", "plan", "bench", "inspect", "export"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no/such/folder", "no/such/folder is neither a directory nor a name on the Hub"),
        ("./typo", "./typo is neither a directory nor a name on the Hub"),
        ("no/such", "There is no directory no/such here, and it was not found on the Hub"),
    ],
)
def test_a_path_with_a_mistake_in_it(command, place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    further = {"compress": ["out", "--data-free"], "plan": ["--data-free"], "export": ["out"]}
    assert message in refusal(command, place, *further.get(command, []))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compress", "plan", "bench"])
def test_an_adapter_in_the_place_of_a_model(command, home, tmp_path):
    further = {"compress": [tmp_path / "out", "--data-free"], "plan": ["--data-free"]}
    message = refusal(command, home / "llama-adapter", *further.get(command, []))
    assert (
        f"{home / 'llama-adapter'} is an adapter. `peft-jactus export {home / 'llama-adapter'} OUTPUT_DIR`" in message
    )


# -- start ------------------------------------------------------------------------------------------------


def test_options_are_shown_without_importing_what_takes_seconds():
    script = "import sys, peft_jactus_cli; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
