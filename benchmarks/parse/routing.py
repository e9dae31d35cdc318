"""PARSE on a Llama: perplexity with ranks chosen for each prompt, against static ranks at equal active share.

    python -m benchmarks.pretrain.language ...    # once: both commands that its docstring shows
    python -m benchmarks.parse.routing run        # stop it and run it again: finished cases are skipped
    python -m benchmarks.parse.routing report     # results/parse/routing.md and plots

    python -m benchmarks.pretrain.smollm2 --out outputs/smollm2    # once; then a real one, routing-smollm2.*
    python -m benchmarks.parse.routing run --subject smollm2 --decompositions svd-llm jactus --seeds 0 \
        --kinds static router --main-only --test-blocks 8 --blocks 192 --initial-blocks 64
    python -m benchmarks.parse.routing run --subject smollm2 --decompositions jactus --seeds 0 \
        --kinds router --routers linear --corpus "all kinds" --test-blocks 8 --blocks 192 --initial-blocks 64
    python -m benchmarks.parse.routing run --subject smollm2 --decompositions jactus --seeds 0 \
        --kinds router --routers linear "first block" --corpus "all kinds" --test-blocks 8 --blocks 576 \
        --initial-blocks 192    # more of it; and with this router, patterns and multiple choice:
    python -m benchmarks.parse.routing run --subject smollm2 --decompositions jactus --seeds 0 \
        --kinds patterns accuracy --routers "first block" --corpus "all kinds" --test-blocks 8 --blocks 576 \
        --initial-blocks 192 --oracle-steps 0
    python -m benchmarks.parse.routing run --subject smollm2 --decompositions jactus --seeds 0 --kinds router \
        --routers "first block" --corpus "all kinds" --test-blocks 24 --blocks 576 --initial-blocks 192 --length 128 \
        --out benchmarks/results/parse/more-prompts    # on rows of half the length; report with --blocks 192 --out ...
    python -m benchmarks.parse.routing report --subject smollm2 --blocks 192

A block is 256 tokens: the router sees the first half, the second half is scored. The factors of the small Llama are
calibrated on novels. Its routers are trained on novels, Penn Treebank, news and school mathematics ("broad"), which
the dense model knows, or on novels alone; nobody has seen WikiText-2. Those of the real one are in `Subject`.
"""

import argparse
import functools
import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.harness.arguments import add_data_dir
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS
from benchmarks.parse.models import (
    DECOMPOSITIONS,
    LENGTH,
    SUBJECTS,
    choices,
    compressed,
    load_corpora,
    load_dense,
    losses,
    optimized_choices,
    overlap_while_decoding,
    prompt_similarity,
    routed_model,
    router_corpus,
    statistics_for,
    train_router,
)
from benchmarks.parse.tables import results_of, write_report
from benchmarks.tasks.commonsense.scoring import evaluate
from peft_jactus import CalibrationStatistics
from peft_jactus.parse import RouterConfig, initialize_router_

RATIOS = (0.8, 0.6, 0.4)
SEEDS = (0, 1, 2)
# Share of the dense parameters that the stored ranks have, counted as pivoted layers: a router chooses from nearly all
# ranks. A static JACTUS model keeps whole layers dense, so 0.95 is too little for a router to do the same.
POOL_RATIO = {"jactus": 0.99}
DEFAULT_POOL_RATIO = 0.95
# Of cases: static models, trained routers, what their choices look like, and how many questions they answer.
KINDS = ("static", "router", "patterns", "accuracy")
# What the last two look at.
STUDIED = ("svd-llm", "jactus")
ROUTERS = {"linear": {}, "mlp": {"router_kind": "mlp"}, "first block": {"router_input": "first_block"}}


@dataclass(frozen=True)
class Case:
    """One trained router.

    Attributes:
        decomposition: Of the factors.
        router: ``"linear"`` or ``"mlp"``; or ``"first block"``, a linear one that reads its output.
        corpus: One of the subject's `routed_on`.
        blocks: Of 256 tokens, that the router is trained on, once.
        seed: Of the corpus, its order, the labels drawn and the budgets.
        pool: Ratio of the ranks that are there.
        length: Tokens in a row of the training, if not a block: as many tokens in all, of more prompts.
    """

    decomposition: str
    blocks: int
    router: str = "linear"
    corpus: str = "broad"
    seed: int = 0
    pool: float = DEFAULT_POOL_RATIO
    length: int | None = None

    @property
    def fields(self):
        """What a result says of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def cases(blocks, subject, length=None):
    """Return all cases: the table first, then what it is compared with."""
    table = [main_case(name, blocks, seed) for seed in SEEDS for name in DECOMPOSITIONS]
    corpora = [{"corpus": name} for name in list(subject.routed_on)[1:]]
    first_block = [{"router": "first block", "corpus": name} for name in subject.routed_on]
    changes = ({"router": "mlp"}, *corpora, *first_block, {"blocks": blocks // 4}, {"blocks": blocks // 2})
    studies = [replace(main_case(subject.studied, blocks, seed), **change) for seed in SEEDS for change in changes]
    return [replace(case, length=length) for case in table + studies]


def main_case(decomposition, blocks, seed):
    """Return the case of the main table."""
    return Case(decomposition, blocks, seed=seed, pool=POOL_RATIO.get(decomposition, DEFAULT_POOL_RATIO))


class Setting:
    """What all cases share: the dense model, its statistics, and the test blocks with its predictions."""

    def __init__(self, args):
        self.args, self.subject = args, args.subject
        self.dense = load_dense(self.subject)
        self.calibration, self.test = load_corpora(self.subject, args.data_dir, num_test=args.test_blocks)
        file = Path(self.subject.path) / "routing_statistics.safetensors"
        if not file.exists():
            statistics_for(self.dense, self.calibration).save(file)
        self.statistics = CalibrationStatistics.load(file)
        scored = {name: losses(self.dense, blocks) for name, blocks in self.test.items()}
        self.dense_losses = {name: figures for name, (figures, _) in scored.items()}
        self.expected = {name: logits for name, (_, logits) in scored.items()}

    def score(self, model, selected=None):
        """Return the figures of each corpus; ``selected`` by corpus for a routed model."""
        return {
            name: losses(model, blocks, self.expected[name], None if selected is None else selected[name])[0]
            for name, blocks in self.test.items()
        }

    def routed(self, case):
        config = RouterConfig(active_ratio=0.6, expert_size=self.subject.expert_size, **ROUTERS[case.router])
        return routed_model(self.dense, self.statistics, case.decomposition, case.pool, config)

    def choices(self, routed, ratio, kind):
        return {name: choices(routed, blocks, ratio, kind) for name, blocks in self.test.items()}

    def trained(self, case):
        """Return the routed model of a case, and figures of its training, which is not done twice."""
        torch.manual_seed(case.seed)
        routed = self.routed(case)
        names = ("learning_rate", "temperature", "initial_blocks", "test_blocks")
        settings = {name: getattr(self.args, name) for name in names}
        described = json.dumps(case.fields | settings)
        name = hashlib.sha256(described.encode()).hexdigest()[:16]
        file = Path(self.subject.path) / "routers" / f"{name}.safetensors"
        if not file.exists():
            figures = {**self.train(routed, case), "trained_by": environment()["commit"]}
            file.parent.mkdir(exist_ok=True)
            partial = file.with_suffix(".partial")
            state = routed.rank_router.state_dict()
            save_file(state, partial, metadata={"case": described, "figures": json.dumps(figures)})
            partial.replace(file)
        routed.rank_router.load_state_dict(load_file(file))
        with safe_open(file, "pt") as contents:
            return routed, json.loads(contents.metadata()["figures"])

    def train(self, routed, case):
        """Train the router of a case; return figures of it."""
        names, length = self.subject.routed_on[case.corpus], case.length or LENGTH
        rows = LENGTH // length  # of a block
        options = {"calibration": self.calibration, "seed": case.seed, "length": length}
        blocks = router_corpus(self.subject, self.args.data_dir, names, case.blocks * rows, **options)
        batch_size = self.subject.batch_size * rows
        started = time.perf_counter()
        batches = [{"input_ids": ids} for ids in blocks[: self.args.initial_blocks * rows].split(batch_size)]
        initialize_router_(routed, batches, seed=case.seed, progress_bar=False)
        initialized = time.perf_counter()
        untrained = {str(ratio): self.score(routed, self.choices(routed, ratio, "average")) for ratio in RATIOS}
        training = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            log = train_router(
                routed,
                self.dense,
                blocks,
                folder,
                batch_size=batch_size,
                seed=case.seed,
                learning_rate=self.args.learning_rate,
                active_ratios=(0.35, 0.85),
                prompt_tokens=(32, length),
                temperature=self.args.temperature,
                initial_batches=0,
            )
        return {
            "initialization_seconds": initialized - started,
            "training_seconds": time.perf_counter() - training,
            "training_log": [entry["loss"] for entry in log if "loss" in entry],
            "second_order": untrained,
        }


def run_static(setting, name):
    """Return the figures of static models of one decomposition."""
    return {
        allocation: {
            str(ratio): setting.score(
                compressed(setting.dense, setting.statistics, name, ratio, allocation=allocation)
            )
            for ratio in RATIOS
        }
        for allocation in ("uniform", "global")
    }


def run_case(setting, case):
    """Return the figures of a trained router: of its average choice, and of its choice for each prompt."""
    routed, figures = setting.trained(case)
    for kind in ("average", "routed"):
        figures[kind] = {str(ratio): setting.score(routed, setting.choices(routed, ratio, kind)) for ratio in RATIOS}
    router = routed.rank_router
    figures["num_experts"] = len(router.table)
    figures["router_parameters"] = sum(parameter.numel() for parameter in router.parameters())
    return figures


def run_patterns(setting, case):
    """Return what the patterns of a trained router look like, and how much there is to gain."""
    routed, _ = setting.trained(case)
    ratios = (0.6, 0.4)
    return {
        "gain": gain(setting, routed, ratios) if setting.args.oracle_steps else {},
        "decoding": {str(ratio): overlap_while_decoding(routed, setting.test, ratio) for ratio in ratios},
        "similarity": {str(ratio): prompt_similarity(routed, setting.test, ratio) for ratio in ratios},
    }


def gain(setting, routed, ratios):
    """Return the figures of average, routed and optimised choices on a batch of each corpus."""
    blocks = {name: blocks[:16] for name, blocks in setting.test.items()}
    expected = {name: logits[:1] for name, logits in setting.expected.items()}
    rows = {}
    for ratio in ratios:
        rows[str(ratio)] = {}
        for corpus, ids in blocks.items():
            choice = {
                "average": choices(routed, ids, ratio, "average"),
                "routed": choices(routed, ids, ratio, "routed"),
                "optimized": optimized_choices(
                    routed, ids, ratio, expected[corpus][0], steps=setting.args.oracle_steps
                ),
            }
            rows[str(ratio)][corpus] = {
                kind: losses(routed, ids, expected[corpus], selected)[0] for kind, selected in choice.items()
            }
    return rows


def run_accuracy(setting, case):
    """Return how many questions of the commonsense sets are answered right: by `evaluate`."""
    from benchmarks.parse.multiple_choice import RoutedByQuestion

    routed, _ = setting.trained(case)
    tokenizer = AutoTokenizer.from_pretrained(setting.subject.path)
    score = functools.partial(
        evaluate, tokenizer=tokenizer, data_dir=setting.args.data_dir, num_questions=setting.args.questions
    )
    found = {"dense": score(setting.dense)}
    for ratio in setting.args.accuracy_ratios:
        static = compressed(setting.dense, setting.statistics, case.decomposition, ratio, allocation="global")
        found[str(ratio)] = {"static global": score(static)}
        for kind in ("average", "routed"):
            found[str(ratio)][kind] = score(RoutedByQuestion(routed, tokenizer, ratio, kind))
    return {"questions": setting.args.questions, "accuracy": found}


def runs(args):
    """Yield (fields of a case, function from the setting to its figures) of all that is asked for."""
    for name in args.decompositions if "static" in args.kinds else ():
        yield {"kind": "static", "decomposition": name}, functools.partial(run_static, name=name)
    wanted = [case for case in cases(args.blocks, args.subject, args.length) if is_wanted(case, args)]
    # Main cases, or those of a corpus that was asked for.
    looked_at = [
        case
        for case in wanted
        if (args.corpus or is_main(case, args)) and case.blocks == args.blocks and case.decomposition in STUDIED
    ]
    kinds = {
        "router": (wanted, run_case),
        "patterns": ([case for case in looked_at if case.seed == 0], run_patterns),
        "accuracy": (looked_at, run_accuracy),
    }
    for kind in args.kinds:
        for case in kinds[kind][0] if kind in kinds else ():
            yield {"kind": kind, **case.fields}, functools.partial(kinds[kind][1], case=case)


def is_wanted(case, args):
    """Whether a case is one of those that were asked for."""
    return (
        case.decomposition in args.decompositions
        and case.seed in args.seeds
        and args.corpus in (None, case.corpus)
        and case.router in args.routers
        and (is_main(case, args) or not args.main_only)
    )


def is_main(case, args):
    return replace(case, length=None) == main_case(case.decomposition, args.blocks, case.seed)


def run(args):
    started_at = environment()  # the code that runs, whatever becomes of the files meanwhile
    setting = Setting(args)
    settings = {
        name: str(value)
        for name, value in vars(args).items()
        if name
        not in ("command", "subject", "name", "model", "data_dir", "out", "corpus", "routers", "kinds", "length")
    }
    table = results_of(args.out, args.name)
    for fields, make in runs(args):
        if table.contains(fields):
            continue
        print(time.strftime("%H:%M:%S"), *(f"{name}={value}" for name, value in fields.items()), flush=True)
        started = time.perf_counter()
        figures = make(setting)
        table.add({
            **fields,
            "settings": settings,
            "dense": setting.dense_losses,
            "seconds": time.perf_counter() - started,
            **figures,
            "environment": started_at,
        })


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--subject", choices=SUBJECTS, default="small", help="whose study it is")
    parser.add_argument("--model", help="its folder; default: where benchmarks.pretrain writes it")
    add_data_dir(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "parse")
    parser.add_argument("--decompositions", nargs="+", default=list(DECOMPOSITIONS), choices=DECOMPOSITIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--test-blocks", type=int, default=32, help="of each corpus")
    parser.add_argument("--blocks", type=int, default=768, help="of 256 tokens, that a router is trained on")
    parser.add_argument("--initial-blocks", type=int, default=128, help="of these, to start the router on")
    parser.add_argument("--length", type=int, choices=(32, 64, 128), help="of rows that a block is cut into for it")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS[:3]), choices=KINDS)
    parser.add_argument("--main-only", action="store_true", help="no other kinds of routers and corpora")
    parser.add_argument("--corpus", help="only routers that are trained on this one; default: all")
    parser.add_argument("--routers", nargs="+", default=list(ROUTERS), choices=ROUTERS, help="only these")
    parser.add_argument("--learning-rate", type=float, default=2e-2)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--oracle-steps", type=int, default=30, help="of each choice that is optimised; 0: none")
    parser.add_argument("--questions", type=int, default=100, help="of each commonsense set, for the accuracy")
    parser.add_argument("--accuracy-ratios", type=float, nargs="+", default=[0.6], help="active shares for it")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.name, args.subject = args.subject, SUBJECTS[args.subject]
    if args.model is not None:
        args.subject = replace(args.subject, path=args.model)
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.command == "run":
        run(args)
    else:
        write_report(args.out, args.name, args.subject.title, args.blocks)


if __name__ == "__main__":
    main()
