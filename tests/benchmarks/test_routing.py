"""The benchmark of routed models (benchmarks/), in miniature: so that the harness can't rot."""

import json
import random
import re
import statistics

import pytest
import torch
from datasets import Dataset

from benchmarks.parse import routing, tables
from benchmarks.pretrain import language as pretraining
from tests.support.compressed_models import tiny_llama
from tests.support.routed_models import cache_of, prompts, routed, with_cache
from tests.support.tiny_tokenizer import tiny_tokenizer

COLUMNS = {"novels": "text", "ptb": "sentence", "wikitext2": "text", "ag_news": "text", "gsm8k": "question"}


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    words = random.Random(0)
    for corpus, column in COLUMNS.items():
        (folder / corpus).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = [
                {column: " ".join(words.choices(["one", "two", "three", "four", corpus], k=400))} for _ in range(40)
            ]
            Dataset.from_list(rows).to_parquet(folder / corpus / f"{split}.parquet")
    return folder


def test_a_router_is_trained_on_a_pretrained_model_and_reported(run_study, data_dir, tmp_path):
    model, out = tmp_path / "model", tmp_path / "routing"
    sizes = {"hidden-size": 64, "intermediate-size": 96, "layers": 1, "vocab-size": 300, "sequences": 16}
    options = ["--data-dir", data_dir, "--threads", 1]
    run_study(pretraining, "--out", model, *options, *(f"--{name}={value}" for name, value in sizes.items()))
    assert json.loads((model / "pretraining.json").read_text())["num_tokens"] == 16 * 256
    assert "holds a model already" in run_study(pretraining, "--out", model, *options)

    options += ["--model", model, "--out", out, "--decompositions", "jactus", "--seeds", 0]
    options += ["--test-blocks", 2, "--blocks", 32, "--oracle-steps", 1]
    run_study(routing, "run", *options)
    patterns, result, static = map(json.loads, (out / "routing.jsonl").read_text().splitlines())
    assert [record["kind"] for record in (patterns, result, static)] == ["patterns", "router", "static"]
    assert (result["decomposition"], result["blocks"], result["pool"], result["seed"]) == ("jactus", 32, 0.99, 0)
    divergences = [figures["divergence"] for by_text in result["routed"].values() for figures in by_text.values()]
    assert len(divergences) == 3 * 3
    assert all(0 < divergence < 1 for divergence in divergences), divergences
    table = run_study(routing, "report", "--out", out, "--blocks", 32)
    assert table.count("| jactus | static") == 2 * 2  # a table of divergence, and one of perplexity
    assert table.count("| jactus | routed |") == 2
    assert len(re.findall(r"[+-]\d+\.\d ± \d+\.\d", table.partition("What the prompt adds")[2])) == 3 * 3
    assert (out / "routing.md").read_text() == table
    assert (out / "routing.png").read_bytes()[:4] == b"\x89PNG"

    options += ["--out", tmp_path / "shorter", "--kinds", "router", "--main-only", "--length", 64]
    run_study(routing, "run", *options)
    (shorter,) = map(json.loads, (tmp_path / "shorter" / "routing.jsonl").read_text().splitlines())
    assert shorter["length"] == 64
    assert shorter["dense"] == result["dense"]  # the same test blocks
    assert shorter["routed"] != result["routed"]
    table = run_study(routing, "report", "--out", tmp_path / "shorter", "--blocks", 32)
    assert table.count("| jactus | linear, broad, 32 blocks in rows of 64 tokens |") == 1


def test_the_change_by_prompt_has_the_standard_error_of_a_quotient():
    draw = random.Random(0)
    average = [draw.uniform(1, 2) for _ in range(4000)]
    routed = [0.9 * value + draw.gauss(0, 0.3) for value in average]

    def change(first, last):
        kinds = {"routed": routed[first:last], "average": average[first:last]}
        figures = {
            kind: {"0.6": {"ptb": {"divergence": statistics.mean(values), "divergence_by_block": values}}}
            for kind, values in kinds.items()
        }
        found, error = tables.change_by_prompt([figures], "0.6", "ptb").split(" ± ")
        return float(found), float(error)

    figures = {"0.6": {"ptb": {"divergence": 1.0, "divergence_by_block": [1.0]}}}
    assert tables.change_by_prompt([{"routed": figures, "average": figures}], "0.6", "ptb") == "+0.0"
    samples = [change(first, first + 20) for first in range(0, 4000, 20)]
    changes, errors = zip(*samples, strict=True)
    assert statistics.mean(changes) == pytest.approx(-10, abs=1)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(changes), rel=0.1)


@torch.no_grad()
def log_likelihood_as_served(model, question, ending):
    """Route the question, then run the ending on its key-value cache."""
    output = model(input_ids=torch.tensor([question]))
    following = model(input_ids=torch.tensor([ending]), **with_cache(model, cache_of(output)))
    predicted = torch.cat([output.logits[0, -1:], following.logits[0, :-1]]).log_softmax(-1)
    return float(predicted.gather(1, torch.tensor(ending).unsqueeze(1)).sum())


@pytest.mark.parametrize("router_input", ["embeddings", "first_block"])
def test_endings_are_scored_with_the_ranks_of_their_question(router_input):
    multiple_choice = pytest.importorskip("benchmarks.parse.multiple_choice", reason="lm_eval is not installed")
    model = routed(tiny_llama(), router_input=router_input, reroute_continuations=False)
    rows = [row.tolist() for row in prompts(12)]
    requests = [(("", ""), row, ending) for row in rows[:6] for ending in (rows[6][:3], rows[7][:2])]
    scored = multiple_choice.RoutedByQuestion(model, tiny_tokenizer(), 0.5, "routed", batch_size=5)
    found = scored._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = [log_likelihood_as_served(model, question, ending) for _, question, ending in requests]
    assert [score for score, _ in found] == pytest.approx(expected, abs=1e-4)
    average = multiple_choice.RoutedByQuestion(model, tiny_tokenizer(), 0.5, "average", batch_size=5)
    assert found != average._loglikelihood_tokens(requests, disable_tqdm=True)
