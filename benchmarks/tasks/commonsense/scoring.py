"""Accuracy on seven commonsense sets, by lm-evaluation-harness over local files.

The same by its own command, on a folder that is not compressed, or was exported with ``--dense``:

    JACTUS_DATA=../shared/data python -m lm_eval run --model hf --include_path benchmarks/tasks/commonsense \
        --tasks jactus_arc_easy,jactus_piqa \
        --model_args pretrained=outputs/smollm2,dtype=bfloat16,softmax_dtype=float32
"""

import logging
import math
import statistics
from pathlib import Path

from benchmarks.tasks.commonsense.rows import SPLITS

FOLDER = Path(__file__).parent
# Endings are as long as their choice here, so there is nothing to normalise by length; as in the harness's own tasks.
WITHOUT_LENGTHS = ("boolq", "winogrande")


def evaluate(model, tokenizer, data_dir, *, num_questions, batch_size=32):
    """Return the mean accuracy, in percent, and by set the accuracy and which questions are answered right.

    Args:
        model: A causal language model, plain or compressed; or one that is wrapped for the harness.
        tokenizer: Its tokenizer.
        data_dir: Folder of the sets.
        num_questions: Of each set; fewer where there are fewer.
        batch_size: Choices at a time.

    Returns:
        ``{"accuracy": mean over the sets, "sets": {name: {"accuracy": ..., "right": "0110..."}}}``.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # In bfloat16, log-probabilities of long endings are too coarse to tell choices apart.
    wrapped = model
    if not isinstance(model, LM):
        wrapped = HFLM(model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    manager = TaskManager(
        include_path=str(FOLDER), include_defaults=False, metadata={"data_dir": str(Path(data_dir).resolve())}
    )
    found = simple_evaluate(
        wrapped,
        tasks=[f"jactus_{name}" for name in SPLITS],
        task_manager=manager,
        limit=num_questions,
        bootstrap_iters=0,
    )
    sets = {}
    for name in SPLITS:
        metric = "acc" if name in WITHOUT_LENGTHS else "acc_norm"
        samples = sorted(found["samples"][f"jactus_{name}"], key=lambda sample: sample["doc_id"])
        right = [int(sample[metric]) for sample in samples]
        sets[name] = {"accuracy": 100 * statistics.mean(right), "right": "".join(map(str, right))}
    return {"accuracy": statistics.mean(one["accuracy"] for one in sets.values()), "sets": sets}


def standard_error(first, second):
    """Return that of the difference of two mean accuracies, in percent, from its spread over questions.

    Args:
        first: Of each run of one model, by set, which questions it answers right; see `evaluate`.
        second: The same of another model. All runs have the same questions.
    """
    variances = []
    for name in SPLITS:
        mine, theirs = (_shares_right(runs, name) for runs in (first, second))
        differences = [a - b for a, b in zip(mine, theirs, strict=True)]
        variances.append(statistics.variance(differences) / len(differences))
    return 100 * math.sqrt(sum(variances)) / len(variances)


def _shares_right(runs, name):
    """Return for each question of a set how many of the runs answer it right, from 0 to 1."""
    return [
        statistics.mean(map(int, question)) for question in zip(*(run[name]["right"] for run in runs), strict=True)
    ]
