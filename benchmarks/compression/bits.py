"""What the studies of few bits share: arguments, calibration, rows to score on, the table."""

import warnings
from pathlib import Path

import transformers
from datasets import disable_progress_bars
from torch.utils.data import Subset

from benchmarks.compression.loss import MAX_TEST_ROWS
from benchmarks.harness.arguments import add_data_dir, study_parser
from benchmarks.harness.records import RESULTS, Table
from benchmarks.tasks import language
from peft_jactus import JactusConfig, calibrate


def bits_parser(doc, name, *, ratios):
    """Return a parser with the arguments that all of these studies have; results go to ``name.jsonl``."""
    parser = study_parser(doc)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("kind", nargs="?", choices=["text", "language"])
    add_data_dir(parser)
    parser.add_argument("--task")
    parser.add_argument("--retained-ratio", type=float, nargs="+", default=ratios)
    parser.add_argument("--calibration-rows", type=int, help="default: as the comparison has it")
    parser.add_argument("--test-rows", type=int, help="default: as for the loss right after compression")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression" / f"{name}.jsonl")
    return parser


def parse(parser):
    """Return the arguments; a run needs a kind and a task. Be quiet from now on."""
    args = parser.parse_args()
    if args.command == "run" and not (args.kind and args.task):
        parser.error("run needs a kind and a --task")
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    warnings.simplefilter("ignore", UserWarning)  # an export without training says so
    return args


def model_name(kind):
    return "MiniLM" if kind == "text" else Path(language.LLAMA).name


def table_of(args):
    return Table(args.out, key=("model", "task", "seed"))


def calibration(model, workload, num_rows):
    """Return statistics of the first batches of the training rows, of ``num_rows`` at least if given."""
    config = JactusConfig(
        task_type=workload.task_type, target_modules="all-linear", modules_to_save=workload.modules_to_save
    )
    batches = workload.calibration_batches()
    if num_rows:
        batches = batches[: -(-num_rows // len(batches[0]["labels"]))]
    return calibrate(model, config, batches, progress_bar=False)


def test_rows(args, workload):
    """Return the rows to score on."""
    return Subset(workload.test, range(min(args.test_rows or MAX_TEST_ROWS[args.kind], len(workload.test))))
