"""The comparison of methods (benchmarks/), in miniature for each kind of model: so that the harness can't rot."""

import argparse
import importlib
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from benchmarks.compare import __main__ as compare
from benchmarks.compare import adaptation, adapting, cases, learning_rates, tables, training
from benchmarks.compression import loss, plan
from benchmarks.tasks import language, text, vision
from benchmarks.tasks.workload import Workload, split_rows
from tests.support.compressed_models import VOCABULARY, tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
METHODS = ["full", "dora", "jactus pivoted 0.6", "svd-llm+lora 0.6"]
FURTHER_METHODS = {
    "text": [
        "jactus-4-bits pivoted 0.8",
        "lora+svd-llm+lora 0.4",
        "lora+jactus-cores pivoted 0.4",
        "eva",
        "rslora",
        "corda",
        "lora-ga",
        "hira",
    ],
    "vision": ["jactus+lora pivoted 0.4"],
    "language": [
        "full+svd-llm+lora 0.4",
        "jactus+full pivoted 0.4",
        "lora-embeddings",
        "jactus-embeddings pivoted 0.4",
    ],
}
TASKS = {"text": "trec", "vision": "flowers5", "language": "ptb"}
MODEL_NAMES = {"text": (text, "MINILM"), "vision": (vision, "VIT"), "language": (language, "LLAMA")}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in TASKS}
    tiny_tokenizer().save_pretrained(folders["text"])
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **SIZES)
    transformers.BertModel(config).save_pretrained(folders["text"])
    config = transformers.ViTConfig(image_size=32, patch_size=16, num_labels=3, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(folders["vision"])
    tiny_tokenizer().save_pretrained(folders["language"])
    tiny_llama().save_pretrained(folders["language"])
    return folders


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    label = ClassLabel(names=["even", "odd"])
    texts = [{"text": f"w{2 + i} w{95 - i} w{2 + i % 7}", "label": i % 2} for i in range(64)]
    write(folder / "trec", texts, Features({"text": Value("string"), "label": label}))
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    images = [{"image": PILImage.fromarray(image), "label": i % 2} for i, image in enumerate(pixels)]
    write(folder / "flowers5", images, Features({"image": Image(), "label": label}))
    words = random.integers(2, VOCABULARY, (400, 64))
    sentences = [{"sentence": " ".join(f"w{word}" for word in row)} for row in words]
    write(folder / "ptb", sentences, Features({"sentence": Value("string")}))
    return folder


def write(folder, rows, features):
    """Write a training split, and a quarter of it as the test split."""
    folder.mkdir()
    train = Dataset.from_list(rows, features)
    splits = DatasetDict(train=train, test=train.select(range(len(train) // 4)))
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")


@pytest.fixture
def run(model_dirs, monkeypatch, run_study):
    """Run a study on the tiny models; return what it printed."""
    for kind, (module, name) in MODEL_NAMES.items():
        monkeypatch.setattr(module, name, str(model_dirs[kind]))

    verbosity, progress_bars = transformers.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    yield run_study
    transformers.logging.set_verbosity(verbosity)
    if progress_bars:
        datasets.enable_progress_bars()


@pytest.mark.parametrize("kind", TASKS)
def test_methods_are_compared_on_the_same_rows_and_a_finished_case_is_skipped(kind, run, data_dir, tmp_path):
    names = [
        "full",
        "lora",
        "lora-embeddings",
        "dora",
        "eva",
        "rslora",
        "corda",
        "lora-ga",
        "hira",
        "jactus",
        "jactus+lora",
        "jactus+full",
        "jactus-embeddings",
    ]
    names += ["lora+jactus-cores", "full+jactus-cores", "svd-llm+lora", "lora+svd-llm+lora", "full+svd-llm+lora"]
    rates = dict.fromkeys(names, 1e-3)  # of others there are none yet
    (tmp_path / f"{kind}-learning_rates.json").write_text(json.dumps({"learning_rates": {"others": rates}}))
    options = ["--data-dir", data_dir, "--tasks", TASKS[kind], "--seeds", 0, "--rows", 48, "--out", tmp_path]
    methods = METHODS + FURTHER_METHODS[kind]
    ours = methods[2]
    run(compare, "run", kind, *options, "--methods", *methods)
    path = tmp_path / f"{kind}.jsonl"
    results = {result["label"]: result for result in map(json.loads, path.read_text().splitlines())}
    assert set(results) == set(methods)
    steps = [result["train_steps"] for result in results.values()]
    assert min(steps) > 0
    assert max(steps) - min(steps) <= 1  # two stages may share a step
    assert results[ours]["retained_ratio_reached"] == pytest.approx(0.6, abs=0.02)
    assert 0.56 < results["svd-llm+lora 0.6"]["retained_ratio_reached"] <= 0.6  # the next rank is above
    assert results["full"]["trainable_parameters"] > results[ours]["trainable_parameters"]

    kept = path.read_text().replace('"loss": ', '"loss": 0.123, "was": ')
    path.write_text(kept)
    run(compare, "run", kind, *options, "--methods", *methods)
    assert path.read_text() == kept
    with pytest.raises(SystemExit, match="there is no pissa, but full"):
        run(compare, "run", kind, *options, "--methods", "full", "pissa")
    table = run(compare, "report", kind, "--out", tmp_path)
    assert all(f"| {method} |" in table for method in methods)
    assert (tmp_path / f"{kind}.md").read_text() == table
    assert (tmp_path / f"{kind}.png").read_bytes()[:4] == b"\x89PNG"


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 4)
        self.classifier = torch.nn.Linear(4, 2)

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.cross_entropy(self.classifier(self.body(x)), labels)}


def workload_of_two_layers(**fields):
    rows = Dataset.from_list([{"x": [float(i)] * 4, "labels": i % 2} for i in range(32)])
    collator = transformers.default_data_collator
    return Workload(rows, rows, collator, TwoLayers, None, task_type=None, head="classifier", **fields)


def test_the_last_stage_starts_at_the_learning_rates_where_the_first_one_ended(tmp_path):
    workload = workload_of_two_layers()

    def stage(**shares):
        return training.make_trainer(TwoLayers(), workload, tmp_path, learning_rate=1e-3, epochs=4, seed=0, **shares)

    def rates(trainer):
        return [group["lr"] for group in trainer.optimizer.param_groups]

    first, last = stage(end_share=0.2), stage(start_share=0.2)
    first.train()
    assert rates(first) == pytest.approx([0.2 * training.HEAD_LEARNING_RATE, 0.2 * 1e-3])
    assert rates(last) == pytest.approx(rates(first))
    last.train()
    assert rates(last) == pytest.approx([0.0, 0.0], abs=1e-12)


def test_what_trains_whole_beside_an_adapter_has_the_learning_rate_of_a_head():
    workload = workload_of_two_layers()

    def rates(method):
        model = adapting.with_adapter(tiny_llama(), method, workload)
        groups = training.make_optimizer(model, None, 1e-3, 1.0).param_groups
        rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        return {name: rate_of[id(p)] for name, p in model.named_parameters() if p.requires_grad}

    adapters, all_of_them = rates("lora"), rates("lora-embeddings")
    assert adapters
    assert set(adapters.values()) == {1e-3}
    whole = {name: rate for name, rate in all_of_them.items() if name not in adapters}
    assert {name: all_of_them[name] for name in adapters} == adapters
    assert set(whole.values()) == {training.HEAD_LEARNING_RATE}
    assert any("embed_tokens" in name for name in whole)
    assert any("layernorm" in name for name in whole)


@pytest.mark.parametrize(("constant_loss", "rates"), [(1e9, [1e-3]), (1e-9, [1e-3, 5e-4])])
def test_a_run_that_learned_nothing_starts_again_at_half_the_rate(constant_loss, rates, monkeypatch, tmp_path):
    workload = workload_of_two_layers(constant_loss=constant_loss)
    tried = []

    def make_trainer(*arguments, learning_rate, **options):
        tried.append(learning_rate)
        return trainer(*arguments, learning_rate=learning_rate, **options)

    trainer = training.make_trainer
    monkeypatch.setattr(training, "make_trainer", make_trainer)
    stage = training.train_stage(lambda: (TwoLayers(), {}), workload, tmp_path, learning_rate=1e-3, epochs=1, seed=0)
    assert tried == rates
    assert stage.steps == 2


def test_learning_rates_are_the_best_means_over_a_groups_tasks_of_complete_grids(monkeypatch, tmp_path):
    args = argparse.Namespace(kind="text", out=tmp_path, tasks=None)
    base = {"trec": 0.9, "mr": 0.6, "clinc150": 0.5}
    methods = {method for method, *_ in cases.budgets("text")} - set(cases.SAME_LEARNING_RATE)
    best = {method: sorted(cases.grid("text", method))[2] for method in methods}
    best |= {"dora": 5e-3, "lora": 6e-5}  # outside the grid: nearest are 4e-3 and 6.25e-5
    missing = "pissa"
    factor = {"clinc150": 0.5}  # of the best rate

    def run(found, args):
        for case in found:
            if not (case.method == missing and case.task == "mr"):
                distance = abs(np.log(case.learning_rate / (best[case.method] * factor.get(case.task, 1))))
                figures = {"accuracy": base[case.task] - 0.01 * distance, "loss": 1.0}
                cases.results_of(tmp_path, "text").add(case.settings() | figures)

    monkeypatch.setattr(learning_rates, "run", run)
    chosen = learning_rates.choose_learning_rates(args)
    in_clinc150 = {method: rate / 2 for method, rate in best.items()} | {"dora": 2e-3, "lora": 3.125e-5}
    del best[missing]
    assert chosen == {"others": best | {"dora": 4e-3, "lora": 6.25e-5}, "clinc150": in_clinc150}
    written = json.loads((tmp_path / "text-learning_rates.json").read_text())
    assert written["learning_rates"] == chosen
    for group, rates in chosen.items():
        for method, rate in rates.items():
            tried = sorted(map(float, written["mean_score"][group][method]))
            assert tried[0] < rate < tried[-1], method


def test_a_grid_that_should_go_on_and_is_not_asked_for_ends_without_a_rate(monkeypatch, tmp_path):
    args = argparse.Namespace(kind="language", out=tmp_path, tasks=None)
    first = cases.grid("language", "lora")

    def run(found, args):
        for case in found:
            if case.method == "lora" and case.learning_rate in first:
                figures = {"loss": -case.learning_rate}  # best at the upper end
                cases.results_of(tmp_path, "language").add(case.settings() | figures)

    monkeypatch.setattr(learning_rates, "run", run)
    assert learning_rates.choose_learning_rates(args) == {"others": {}}


def test_a_grid_that_there_is_not_is_an_error_with_the_names_of_those_that_there_are(run):
    with pytest.raises(SystemExit, match=r"there is no jactus, but full, .*jactus pivoted 0\.6"):
        run(compare, "learning-rates", "text", "--methods", "full", "jactus")


def test_a_task_has_the_learning_rates_of_its_group(tmp_path):
    rates = {"others": {"lora": 1e-3}, "clinc150": {"lora": 2e-3}}
    (tmp_path / "text-learning_rates.json").write_text(json.dumps({"learning_rates": rates}))
    args = argparse.Namespace(kind="text", out=tmp_path, tasks=["mr", "clinc150"], seeds=[0], rows=None)
    found = {case.task: case.learning_rate for case in compare.table_cases(args)}
    assert found == {"mr": 1e-3, "clinc150": 2e-3}


def test_a_method_in_few_bits_has_the_learning_rate_of_the_one_that_it_is_compared_with(tmp_path):
    (tmp_path / "text-learning_rates.json").write_text(json.dumps({"learning_rates": {"others": {"jactus": 3e-3}}}))
    args = argparse.Namespace(kind="text", out=tmp_path, tasks=["trec"], seeds=[0], rows=None)
    found = {case.label: case.learning_rate for case in compare.table_cases(args)}
    rows = ["jactus pivoted 0.8", "jactus-8-bits pivoted 0.8", "jactus-4-bits pivoted 0.8"]
    assert [found[label] for label in rows] == [3e-3] * 3


@pytest.mark.parametrize("scored_on", ["test", "held-out"])
def test_no_row_is_both_trained_on_and_scored_on(scored_on):
    data = DatasetDict(
        train=Dataset.from_dict({"row": list(range(100))}), test=Dataset.from_dict({"row": list(range(100, 150))})
    )
    train, scored = split_rows(data, num_rows=90, scored_on=scored_on, max_test_rows=15)
    assert len(train) == {"test": 90, "held-out": 80}[scored_on]
    assert len(scored) == 15
    assert not set(train["row"]) & set(scored["row"])
    assert {row >= 100 for row in scored["row"]} == {scored_on == "test"}


def table_result(label, task, seed, accuracy, **fields):
    sizes = {"num_train_rows": 8, "num_test_rows": 8, "trainable_parameters": 2_000_000}
    return {"label": label, "task": task, "seed": seed, "accuracy": accuracy, **sizes, **fields}


def test_a_table_compares_the_same_seeds_only():
    of_dora = [table_result("dora", task, seed, 0.5 + 0.1 * seed) for task in ("mr", "trec") for seed in (0, 1)]
    of_lora = [table_result("lora", "mr", 0, 0.6), table_result("lora", "trec", 0, 0.7)]
    *_, dora, lora = tables.markdown(of_dora + of_lora).splitlines()
    assert dora == "| dora | 100 % | 2.00 | 55.0 ± 7.1 | 55.0 ± 7.1 | **55.0 ± 7.1** | 0.0 ± 0.0 | 2 of 2 |"
    assert lora == "| lora | 100 % | 2.00 | 60.0 | 70.0 |  | 15.0 | 1 of 1 |"


def test_results_that_do_not_belong_in_one_table_are_an_error():
    result = table_result("lora", "trec", 0, 0.9)
    with pytest.raises(ValueError, match="Two results of lora on trec with seed 0"):
        tables.by_seed([result, result])
    with pytest.raises(ValueError, match=r"dora on trec has \(8, 4\) rows"):
        tables.by_seed([result, table_result("dora", "trec", 0, 0.9, num_test_rows=4)])


@pytest.mark.parametrize("kind", TASKS)
def test_the_loss_right_after_compression_is_measured_for_each_decomposition(kind, run, data_dir, tmp_path):
    options = ["--data-dir", data_dir, "--tasks", TASKS[kind], "--seeds", 0, "--rows", 48, "--out", tmp_path]
    run(loss, "run", kind, *options)
    (line,) = (tmp_path / f"loss-{kind}.jsonl").read_text().splitlines()
    dense, *rows = json.loads(line)["rows"]
    assert len(rows) == 6 * 3 * 2 * 2
    assert dense["divergence"] == pytest.approx(0.0, abs=1e-12)
    assert all(row["divergence"] > 0 for row in rows)
    totals = {ratio: sum(row["divergence"] for row in rows if row["retained_ratio"] == ratio) for ratio in (0.8, 0.4)}
    assert totals[0.8] < totals[0.4]
    table = run(loss, "report", kind, "--out", tmp_path)
    assert table.count("| jactus |") == 2 * (1 + 3)  # loss and divergence: a column, and a row for each ratio


def test_the_plan_is_compared_with_what_comes_out(run, data_dir, tmp_path):
    options = ["--data-dir", data_dir, "--tasks", TASKS["text"], "--seeds", 0, "--rows", 48, "--out", tmp_path]
    run(plan, "run", *options)
    (line,) = (tmp_path / "plan-text.jsonl").read_text().splitlines()
    rows = json.loads(line)["rows"]
    assert [row["retained_ratio"] for row in rows] == 2 * list(plan.RATIOS)
    assert all(row["retained_ratio_reached"] <= row["retained_ratio"] for row in rows)
    for figure in ("expected_rise", "divergence"):
        assert 0 < rows[0][figure] < rows[len(plan.RATIOS) - 1][figure]
    table = run(plan, "report", "--out", tmp_path)
    assert table.count("| 0.6 | ") == 2
    assert (tmp_path / "plan-text.png").exists()


def test_ways_to_adapt_are_compared_on_held_out_rows_and_a_finished_case_is_skipped(run, data_dir, tmp_path):
    options = ["--data-dir", data_dir, "--tasks", TASKS["text"], "--rates", 1e-3, "--rows", 48, "--out", tmp_path]
    run(adaptation, "run", *options, "--variants", "lora", "core", "gradient 32", "gradient 16, warm head")
    rows = [json.loads(line) for line in (tmp_path / "adaptation-text.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in rows} == {"lora", "core", "gradient 32", "gradient 16, warm head"}
    assert all(row["retained_ratio_reached"] <= row["retained_ratio"] for row in rows)
    before = (tmp_path / "adaptation-text.jsonl").stat().st_mtime_ns
    run(adaptation, "run", *options, "--variants", "lora", "core")
    assert (tmp_path / "adaptation-text.jsonl").stat().st_mtime_ns == before
    table = run(adaptation, "report", "--out", tmp_path)
    assert "| gradient 32 |" in table


def names_of_modules():
    paths = (path.relative_to(BENCHMARKS.parent) for path in BENCHMARKS.rglob("*.py"))
    return sorted(".".join(path.with_suffix("").parts) for path in paths if path.name != "__init__.py")


@pytest.mark.parametrize("name", names_of_modules())
def test_every_module_imports(name):
    importlib.import_module(name)
