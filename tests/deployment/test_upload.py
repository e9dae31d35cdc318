"""Uploading: what a real `huggingface_hub` sends, and what arrives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import peft_jactus
from tests.support.compressed_models import logits_of, tiny_llama, trained
from tests.support.stand_in_hub import TOKEN, running_hub

ROOT = Path(peft_jactus.__file__).parents[1]
REPOSITORY = "user/compressed"
ALLOWED_KINDS = {".safetensors", ".json", ".png"}
ALLOWED_NAMES = {"README.md", ".gitattributes", "merges.txt", "vocab.txt"}
PNG = b"\x89PNG\r\n\x1a\n"

# huggingface_hub reads the Hub's address as it is imported, so that this runs in a process of its own.
UPLOAD = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from peft_jactus import export_compressed
from tests.support.compressed_models import perturb_cores_, tiny_llama, trained
from tests.support.tiny_tokenizer import tiny_tokenizer

folder, token = Path(sys.argv[1]), sys.argv[2]
model = trained(tiny_llama())
upload = {"push_to_hub": True, "token": token, "processor": tiny_tokenizer(), "progress_bar": False}
export_compressed(model, folder / "local", repo_id="user/compressed", max_shard_size="30KB", **upload)
export_compressed(model, folder / "named-after-its-folder", **upload)
loaded = AutoModelForCausalLM.from_pretrained(folder / "local")
loaded.push_to_hub("user/pushed", token=token)
model.push_to_hub("user/adapter", token=token)
try:
    export_compressed(model, folder / "kept", repo_id="user/failing", **upload)
except Exception as error:
    print("failed with", type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """Everything is uploaded once, by one process; the tests look at what is left."""
    folder = tmp_path_factory.mktemp("uploads")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with running_hub() as hub:
        hub.failing.add("user/failing")
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        result = subprocess.run(
            [sys.executable, "-c", UPLOAD, folder, TOKEN],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert result.returncode == 0, f"{result.stderr}\n{hub.requests}"
    return SimpleNamespace(hub=hub, folder=folder, output=result.stdout)


def bytes_by_name(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(files, folder):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def expected_logits():
    return logits_of(trained(tiny_llama()))


def test_what_arrives_is_what_was_written(uploads):
    assert uploads.hub.files[REPOSITORY] == bytes_by_name(uploads.folder / "local")


@pytest.mark.parametrize("repository", [REPOSITORY, "user/pushed", "somebody/named-after-its-folder"])
def test_only_safetensors_json_text_and_pictures_arrive(uploads, repository):
    files = uploads.hub.files[repository]
    assert {"README.md", "config.json"} < set(files)
    for name, content in files.items():
        assert Path(name).suffix in ALLOWED_KINDS or name in ALLOWED_NAMES, name
        assert "/" not in name
        if name.endswith(".json"):
            json.loads(content)
        elif name.endswith(".png"):
            assert content.startswith(PNG)
        elif not name.endswith(".safetensors"):
            content.decode("utf-8")


def test_weights_go_through_lfs_and_nothing_else_does(uploads):
    files = uploads.hub.files[REPOSITORY]
    weights = {name for name in files if name.endswith(".safetensors")}
    assert len(weights) > 1, "there should be several files, so that the index is uploaded, too"
    assert uploads.hub.lfs_files[REPOSITORY] == weights
    assert "model.safetensors.index.json" in files


def test_tokenizer_is_uploaded_beside_the_model(uploads):
    assert {"tokenizer.json", "tokenizer_config.json"} < set(uploads.hub.files[REPOSITORY])


def test_repository_is_named_after_the_directory_where_no_name_is_given(uploads):
    local = bytes_by_name(uploads.folder / "named-after-its-folder")
    assert uploads.hub.files["somebody/named-after-its-folder"] == local


def test_the_token_goes_with_every_request_to_write(uploads):
    assert f"POST /api/models/{REPOSITORY}/commit/main" in uploads.hub.requests
    assert uploads.hub.unauthorized == []


@pytest.mark.parametrize("repository", [REPOSITORY, "user/pushed"])
def test_a_download_of_what_arrived_gives_the_model(uploads, repository, tmp_path):
    write(uploads.hub.files[repository], tmp_path)
    with peft_jactus.loading_options(verify=True):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded), expected_logits(), rtol=1e-4, atol=1e-5)


def test_a_loaded_model_can_be_pushed(uploads):
    pushed = uploads.hub.files["user/pushed"]
    original = json.loads(uploads.hub.files[REPOSITORY]["config.json"])
    assert json.loads(pushed["config.json"])["quantization_config"] == original["quantization_config"]
    assert uploads.hub.lfs_files["user/pushed"] == {"model.safetensors"}


def test_an_adapter_that_is_pushed_says_how_to_load_it(uploads):
    card = uploads.hub.files["user/adapter"]["README.md"].decode()
    assert "import peft_jactus" in card
    assert "library_name: peft" in card


def test_a_failing_hub_is_an_error_and_leaves_the_directory_whole(uploads, tmp_path):
    assert "failed with HfHubHTTPError" in uploads.output
    assert "500" in uploads.output
    assert uploads.hub.files["user/failing"] == {}
    kept = uploads.folder / "kept"
    assert set(bytes_by_name(kept)) == set(bytes_by_name(uploads.folder / "named-after-its-folder"))
    with peft_jactus.loading_options(verify=True):
        loaded = AutoModelForCausalLM.from_pretrained(kept)
    torch.testing.assert_close(logits_of(loaded), expected_logits(), rtol=1e-4, atol=1e-5)


def test_no_unfinished_directory_is_left(uploads):
    assert [path.name for path in uploads.folder.iterdir() if path.name.startswith(".")] == []
