"""Tables of benchmark results: nothing is lost, nothing is torn, nothing is run twice."""

import json
import multiprocessing
from pathlib import Path

import pytest

from benchmarks.harness.records import Table

KEY = ("task", "method", "seed")


def record(task, seed=0, **fields):
    return {"task": task, "method": "lora", "seed": seed, **fields}


def add_many(path, task, start):
    start.wait()
    for seed in range(25):
        Table(path, KEY).add(record(task, seed, loss=seed / 7))


def test_two_processes_that_add_at_once_lose_nothing(tmp_path):
    path = tmp_path / "table.jsonl"
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    workers = [context.Process(target=add_many, args=(path, task, start)) for task in ("mr", "trec")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    expected = [record(task, seed, loss=seed / 7) for task in ("mr", "trec") for seed in range(25)]
    assert Table(path, KEY).read() == expected
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_an_interrupted_write_leaves_the_old_file(step, tmp_path, monkeypatch):
    table = Table(tmp_path / "table.jsonl", KEY)
    table.add(record("mr"))
    before = table.path.read_bytes()
    write_text = Path.write_text

    def interrupted(path, *arguments):
        if step == "write_text":
            write_text(path, arguments[0][:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            table.add(record("trec"))
    assert table.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [table.path]
    assert table.add(record("trec"))  # the lock is free again


def test_a_case_that_is_there_is_not_added_again(tmp_path):
    table = Table(tmp_path / "table.jsonl", KEY)
    assert not table.contains(record("mr"))
    assert table.add(record("mr", loss=1.0))
    assert table.contains(record("mr", learning_rate=1e-3))  # no field of the key
    assert not table.contains(record("mr", seed=1))
    assert not table.add(record("mr", loss=2.0))
    assert table.find(record("mr")) == record("mr", loss=1.0)


def test_lines_are_sorted_by_the_key_whatever_order_they_came_in(tmp_path):
    records = [record(task, seed) for task in ("mr", "trec") for seed in (0, 2, 10)]
    texts = set()
    for order in (records, records[::-1]):
        table = Table(tmp_path / f"{len(texts)}.jsonl", KEY)
        for each in order:
            table.add(each)
        texts.add(table.path.read_text())
    assert texts == {"".join(json.dumps(each) + "\n" for each in records)}


def test_a_record_may_lack_fields_of_the_key(tmp_path):
    table = Table(tmp_path / "table.jsonl", KEY)
    table.add(record("mr"))
    table.add({"task": "mr", "method": "lora"})
    assert table.read() == [{"task": "mr", "method": "lora"}, record("mr")]
    assert table.contains({"task": "mr", "method": "lora", "seed": None})
