"""The studies of a real Llama (benchmarks/), in miniature: rows, scores, the study right after compression."""

import functools
import json
import math
import random
import sys

import pytest
import torch
import transformers
from datasets import Dataset, Features, List, Value

from benchmarks.compare import __main__ as compare
from benchmarks.compression import llama
from benchmarks.tasks.commonsense import scoring, training
from benchmarks.tasks.commonsense.rows import SPLITS, load
from tests.support.compressed_models import tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
NUM_ROWS = 40
CHOICES = Features(question=Value("string"), choices=List(Value("string")), label=Value("int64"))
YES_OR_NO = Features(question=Value("string"), label=Value("int64"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    choose = random.Random(0)

    def words(count):
        return " ".join(f"w{choose.randrange(2, 96)}" for _ in range(count))

    def row(name, number):
        if name == "boolq":
            return {"question": f"{words(3)}?", "label": number % 2}
        question = f"{words(3)} _ {words(2)}" if name == "winogrande" else words(5)
        num_choices = 2 if name in ("winogrande", "piqa") else 4
        return {"question": question, "choices": [words(2) for _ in range(num_choices)], "label": number % num_choices}

    for name, splits in SPLITS.items():
        for split in splits:
            rows = [row(name, number) for number in range(NUM_ROWS)]
            write(folder / name / f"{split}.parquet", rows, YES_OR_NO if name == "boolq" else CHOICES)
    for name, column in {"wikitext2": "text", "ptb": "sentence"}.items():
        for split in ("train", "validation", "test"):
            texts = [{column: words(256)} for _ in range(4)]
            write(folder / name / f"{split}.parquet", texts, Features({column: Value("string")}))
    return folder


def write(path, rows, features):
    path.parent.mkdir(exist_ok=True)
    Dataset.from_list(rows, features).to_parquet(path)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_tokenizer().save_pretrained(folder)
    model = tiny_llama()
    model.config.max_position_embeddings = 256
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def verbosity():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


def log_likelihood(model, tokenizer, context, ending):
    start, ids = (tokenizer(text).input_ids for text in (context, f"{context} {ending}"))
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, len(start) - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, torch.tensor(ids[len(start) :])[:, None]).sum())


@pytest.fixture(scope="module")
def model(model_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir).eval()


@pytest.fixture(scope="module")
def evaluated(data_dir, model):
    return scoring.evaluate(model, tiny_tokenizer(), data_dir, num_questions=6)["sets"]


@pytest.mark.parametrize("name", SPLITS)
def test_accuracy_is_that_of_the_likeliest_ending(name, data_dir, model, evaluated):
    found = evaluated[name]
    right = []
    for row in load(name, data_dir)["test"].take(6):
        scores = [
            log_likelihood(model, tiny_tokenizer(), context, ending)
            / (1 if name in scoring.WITHOUT_LENGTHS else len(ending))
            for context, ending in zip(row["contexts"], row["endings"], strict=True)
        ]
        right.append(scores.index(max(scores)) == row["label"])
    assert found["right"] == "".join(str(int(each)) for each in right)
    assert found["accuracy"] == pytest.approx(100 * sum(right) / 6)


@pytest.mark.parametrize("name", [name for name, splits in SPLITS.items() if len(splits) == 1])
def test_a_single_split_is_cut_into_rows_to_train_on_and_others_to_score_on(name, data_dir):
    found = load(name, data_dir)
    assert [len(found[split]) for split in ("train", "test")] == [NUM_ROWS * 4 // 5, NUM_ROWS // 5]
    train, test = ({json.dumps(row) for row in found[split]} for split in ("train", "test"))
    assert not train & test


def test_the_loss_is_that_of_the_right_ending(data_dir, model_dir, monkeypatch):
    monkeypatch.setattr(training, "SMOLLM2", str(model_dir))
    workload = training.load_workload(data_dir, "commonsense", num_rows=20, scored_on="test")
    endings = {row["endings"][row["label"]] for name in SPLITS for row in load(name, data_dir)["train"]}
    assert len(workload.train) == 20
    for row in workload.train:
        labels = [label for label in row["labels"] if label != -100]
        assert row["input_ids"][-len(labels) :] == labels
        assert tiny_tokenizer().decode(labels) in {
            tiny_tokenizer().decode(tiny_tokenizer()(e).input_ids) for e in endings
        }


def test_methods_are_trained_jointly_and_scored_on_every_set(data_dir, model_dir, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "SMOLLM2", str(model_dir))
    monkeypatch.setattr(training, "NUM_QUESTIONS", 4)
    rates = dict.fromkeys(["dora", "jactus-retained", "svd-llm+lora"], 1e-3)
    (tmp_path / "commonsense-learning_rates.json").write_text(json.dumps({"learning_rates": {"others": rates}}))
    methods = ["dora", "jactus-retained pivoted 0.6", "svd-llm+lora 0.4"]
    options = ["--data-dir", data_dir, "--out", tmp_path]
    run(monkeypatch, compare, "run", "commonsense", *options, "--seeds", 0, "--rows", 32, "--methods", *methods)
    results = [json.loads(line) for line in (tmp_path / "commonsense.jsonl").read_text().splitlines()]
    assert {result["label"] for result in results} == set(methods)
    for result in results:
        assert set(result["sets"]) == set(SPLITS)
        assert 0 <= result["accuracy"] <= 1
        assert all(len(one["right"]) == 4 for one in result["sets"].values())
    assert len(list(model_dir.glob("commonsense-*.safetensors"))) == 1  # one calibration for all that compress
    run(monkeypatch, compare, "report", "commonsense", "--out", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    dora, jactus, _ = (
        [line for line in lines if line.startswith(f"| {method} |")][-1].split("|") for method in methods
    )
    assert float(dora[2]) == pytest.approx(results[methods.index("dora")]["loss"], abs=6e-4)
    assert float(dora[-4].strip(" *")) == pytest.approx(100 * results[methods.index("dora")]["accuracy"], abs=0.06)
    assert dora[-3].strip() == ""
    assert "±" in jactus[-3]


def test_the_standard_error_is_that_of_independent_questions_that_two_models_answer():
    first = {name: {"right": "1100"} for name in SPLITS}
    second = {name: {"right": "1010"} for name in SPLITS}
    # Differences 0, 1, -1, 0 have the variance 2/3, their mean a quarter of it, the mean of seven sets 1/7 of that.
    assert scoring.standard_error([first], [second]) == pytest.approx(100 * math.sqrt(2 / 3 / 4 / 7))
    assert scoring.standard_error([first, second], [second, first]) == 0  # on average both answer alike


def run(monkeypatch, study, *arguments):
    monkeypatch.setattr(sys, "argv", [study.__name__, *map(str, arguments)])
    study.main()


def test_a_llama_right_after_compression(data_dir, model_dir, monkeypatch, tmp_path):
    names = ("jactus", "svd-llm")
    monkeypatch.setattr(llama, "CALIBRATIONS", (256, 512))
    monkeypatch.setattr(llama, "TOKENS", 512)
    monkeypatch.setattr(llama, "RATIOS", (0.8,))
    monkeypatch.setitem(llama.STUDIES, "as used", ([functools.partial(llama.as_used, tokens=512)], names))
    options = ["--model", model_dir, "--data-dir", data_dir, "--out", tmp_path]
    run(monkeypatch, llama, "calibrate", *options)
    run(monkeypatch, llama, "run", *options, "--studies", "as used", "--blocks", 2, "--questions", 2)
    path = tmp_path / "llama.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(record["decomposition"], record["score"]) for record in records} == {
        (name, score) for name in ("dense", *names) for score in llama.SCORES
    }
    perplexities = {record["perplexity"]["ptb"] for record in records if record["score"] == "perplexity"}
    assert all(math.isfinite(value) and value > 1 for value in perplexities)
    assert len(perplexities) == 1 + len(names)
    before = path.read_text()
    run(monkeypatch, llama, "run", *options, "--studies", "as used", "--blocks", 2, "--questions", 2)
    assert path.read_text() == before  # nothing was computed again
    run(monkeypatch, llama, "report", "--out", tmp_path)
    text = (tmp_path / "llama.md").read_text()
    assert all(f"| 80 % | {name} |" in text for name in names)
    assert (tmp_path / "llama.png").read_bytes()[:4] == b"\x89PNG"


def test_a_deployed_model_is_what_the_package_exports(data_dir, model_dir, monkeypatch):
    """Beside the one whose truncated weights are written back dense: the same, up to its storage's rounding."""
    monkeypatch.setattr(llama, "CALIBRATIONS", (256,))
    run(monkeypatch, llama, "calibrate", "--model", model_dir, "--data-dir", data_dir)
    made = llama.Factorizations(model_dir)
    ids = torch.randint(2, 96, (2, 32))
    with torch.no_grad():
        dense, deployed = (
            made.compressed(llama.as_used("jactus", 0.6, tokens=256, dtype="float32", is_deployed=deployed))(
                ids
            ).logits
            for deployed in (False, True)
        )
    torch.testing.assert_close(deployed, dense, rtol=1e-3, atol=1e-4)
