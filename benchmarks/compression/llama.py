"""A real Llama right after compression, by every decomposition: perplexity and multiple choice.

    python -m benchmarks.pretrain.smollm2 --out outputs/smollm2     # once
    python -m benchmarks.compression.llama calibrate                # once; outputs/smollm2/calibration-*.safetensors
    python -m benchmarks.compression.llama run                      # llama.jsonl; stop and resume
    python -m benchmarks.compression.llama report                   # llama.md and llama.png
    python -m benchmarks.compression.llama run --studies "as used" --decompositions jactus kfac svd-llm asvd \
        --ratios 0.4 --scores "multiple choice" --questions 300 --out benchmarks/results/compression/more-questions

JACTUS is as it is by default, peers are as published. Calibrated on blocks of 256 tokens of wikitext2's validation
split; scored on the test splits of wikitext2 and ptb, and by lm-evaluation-harness on seven commonsense sets
(`benchmarks.tasks.commonsense`). The rows are bfloat16, as people ship models, but for those that say float32.
Weights are written back dense, in the model's dtype, so that no storage's rounding is in a row; "deployed" rows are
what the package exports.
"""

import copy
import functools
import itertools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.compare.adapting import rank_multiple
from benchmarks.compare.cases import RATIOS
from benchmarks.compression.llama_tables import results_of, write_report
from benchmarks.compression.loss import compress_
from benchmarks.compression.loss_tables import AS_USED, DECOMPOSITIONS
from benchmarks.harness.arguments import add_data_dir, study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS
from benchmarks.tasks.commonsense.scoring import evaluate
from benchmarks.tasks.language import LENGTH, SMOLLM2, load_blocks
from peft_jactus import CalibrationStatistics, JactusConfig, calibrate
from peft_jactus.deployment.export import compressed_copy
from peft_jactus.numerics.allocation import allocate
from peft_jactus.numerics.factorization import layer_gains

CORPORA = ("wikitext2", "ptb")
# Tokens of a calibration; the table's is TOKENS.
CALIBRATIONS = (2**14, 2**16, 2**18)
TOKENS = 2**16
BATCH_SIZE = 8


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("command", choices=["calibrate", "run", "report"])
    parser.add_argument("--model", type=Path, default=Path(SMOLLM2))
    add_data_dir(parser)
    parser.add_argument("--scores", nargs="+", choices=list(SCORES), default=list(SCORES))
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--decompositions", nargs="+", choices=DECOMPOSITIONS, default=list(DECOMPOSITIONS))
    parser.add_argument("--ratios", nargs="+", type=float, choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--blocks", type=int, default=48, help=f"of {LENGTH} tokens, to score on, of each corpus")
    parser.add_argument("--questions", type=int, default=100, help="of each commonsense set")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression", help="folder of the table")
    return parser.parse_args()


# -- cases ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One compressed model.

    Attributes:
        decomposition: One of `DECOMPOSITIONS`, or ``"dense"``.
        retained_ratio: Of the parameters of the targeted layers, 1 if it is dense.
        storage: Which counts the parameters.
        allocation: Of the ranks.
        tokens: Of the calibration; none of the dense model.
        dtype: Of the model, in calibration and in scoring.
        is_deployed: Whether it is what the package exports, with its storage's rounding.
    """

    decomposition: str
    retained_ratio: float = 1.0
    storage: str = "factored"
    allocation: str = "uniform"
    tokens: int = 0
    dtype: str = "bfloat16"
    is_deployed: bool = False

    @property
    def factorization(self):
        """What cases with the same factors have in common."""
        return self.decomposition, self.tokens, self.dtype


def as_used(decomposition, ratio, **changes):
    """Return JACTUS by its defaults, and a peer as published."""
    storage, allocation = AS_USED[decomposition]
    return Case(decomposition, ratio, **{"storage": storage, "allocation": allocation, "tokens": TOKENS, **changes})


def other_allocation(decomposition, ratio):
    case = as_used(decomposition, ratio)
    return as_used(decomposition, ratio, allocation="uniform" if case.allocation == "global" else "global")


# By study: functions from decomposition and ratio to a case, and the decompositions.
STUDIES = {
    "as used": ([as_used], DECOMPOSITIONS),
    "allocation": ([other_allocation], DECOMPOSITIONS),
    "same storage": ([functools.partial(as_used, storage="factored", allocation="uniform")], ["jactus"]),
    "deployed": ([functools.partial(as_used, is_deployed=True)], ["jactus"]),
    "calibration": (
        [functools.partial(as_used, tokens=tokens) for tokens in CALIBRATIONS if tokens != TOKENS],
        ["jactus", "svd-llm"],
    ),
    "float32": ([functools.partial(as_used, tokens=min(CALIBRATIONS), dtype="float32")], ["jactus", "svd-llm"]),
}


def cases_of(studies, wanted=DECOMPOSITIONS, ratios=RATIOS):
    """Return the cases of some decompositions and ratios, those with the same factors together."""
    found = [Case("dense")]
    if "float32" in studies:
        found.append(Case("dense", dtype="float32"))
    for study in studies:
        ways, decompositions = STUDIES[study]
        some = [name for name in decompositions if name in wanted]
        found += [way(*case) for way in ways for case in itertools.product(some, ratios)]
    groups = {}
    for case in found:
        groups.setdefault(case.factorization, []).append(case)
    return list(itertools.chain.from_iterable(groups.values()))


# -- calibration ------------------------------------------------------------------------------------------


def load_model(path, dtype):
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def statistics_file(path, tokens, dtype):
    return path / f"calibration-{tokens}-{dtype}.safetensors"


def calibrate_all(args):
    """Write statistics that serve every decomposition; those of more tokens go on from those of fewer."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    blocks = load_blocks(args.data_dir, "wikitext2", "validation", tokenizer, length=LENGTH, seed=0)
    config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", decomposition="fwsvd", adaptation_rank=0)
    for dtype, sizes in {"bfloat16": CALIBRATIONS, "float32": CALIBRATIONS[:1]}.items():
        model, found, done = load_model(args.model, dtype), None, 0
        for tokens in sizes:
            file, count = statistics_file(args.model, tokens, dtype), tokens // LENGTH
            if not file.exists():
                batches = [{"input_ids": ids, "labels": ids} for ids in blocks[done:count].split(BATCH_SIZE)]
                further = calibrate(model, config, batches)
                (further if found is None else found.merge(further)).save(file)
            found, done = CalibrationStatistics.load(file), count


# -- compression ------------------------------------------------------------------------------------------


class Factorizations:
    """Compressed models of one Llama; the factors of the last case are kept for the next one."""

    def __init__(self, path):
        self.path = path
        self.model = functools.lru_cache(maxsize=1)(functools.partial(load_model, path))
        self.factors = functools.lru_cache(maxsize=1)(self._factors)

    def statistics(self, tokens, dtype):
        return CalibrationStatistics.load(statistics_file(self.path, tokens, dtype))

    def _factors(self, decomposition, tokens, dtype):
        """Return gains and projected approximations by layer."""
        model, found = self.model(dtype), self.statistics(tokens, dtype)
        options = JactusConfig(decomposition=decomposition).factorization_options().decomposition
        gains, projected = {}, {}
        for name in tqdm(found, desc=f"{decomposition}, {tokens} tokens"):
            gains[name], projected[name] = layer_gains(
                name,
                model.get_submodule(name).weight,
                found[name] if options.needs_statistics else None,
                options,
                centred=False,
                adaptation_rank=0,
            )
        return gains, projected

    @torch.no_grad()
    def compressed(self, case):
        """Return the model of a case."""
        dense = self.model(case.dtype)
        if case.decomposition == "dense":
            return dense
        if case.is_deployed:
            return self.deployed(case)
        gains, projected = self.factors(*case.factorization)
        allocated = allocate(
            gains,
            retained_ratio=case.retained_ratio,
            strategy=case.allocation,
            storage=case.storage,
            rank_floor=JactusConfig().factorization_options().rank_floor,
            rank_multiple=rank_multiple(case.decomposition),
            fixed_ranks={},
        )
        model = copy.deepcopy(dense)
        layers = {name: dense.get_submodule(name) for name in projected}
        compress_(model, layers, projected, allocated.ranks, {}, case.decomposition)  # no statistics: there is no bias
        return model

    def deployed(self, case):
        config = JactusConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            retained_ratio=case.retained_ratio,
            storage=case.storage,
            allocation=case.allocation,
            adaptation_rank=0,
        )
        config.statistics = self.statistics(case.tokens, case.dtype)
        return compressed_copy(get_peft_model(copy.deepcopy(self.model(case.dtype)), config)).eval()


# -- scores -----------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model, tokenizer, args):
    """Return the perplexity of each corpus."""
    found = {}
    for corpus in CORPORA:
        blocks = load_blocks(args.data_dir, corpus, "test", tokenizer, length=LENGTH, max_blocks=args.blocks, seed=0)
        losses = [float(model(ids, labels=ids).loss) * len(ids) for ids in blocks.split(BATCH_SIZE)]
        found[corpus] = math.exp(sum(losses) / len(blocks))
    return {"blocks": args.blocks, "perplexity": found}


def multiple_choice(model, tokenizer, args):
    found = evaluate(model, tokenizer, args.data_dir, num_questions=args.questions)
    return {"questions": args.questions, **found}


SCORES = {"perplexity": perplexity, "multiple choice": multiple_choice}


def run(args):
    started_at = environment()  # the code that runs, whatever becomes of the files meanwhile
    table = results_of(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    factorizations = Factorizations(args.model)
    for case in cases_of(args.studies, args.decompositions, args.ratios):
        key = {"model": args.model.name, **asdict(case)}
        scores = [name for name in args.scores if not table.contains({**key, "score": name})]
        model = factorizations.compressed(case) if scores else None
        for name in scores:
            figures = SCORES[name](model, tokenizer, args)
            table.add({**key, "score": name, **figures, "environment": started_at})
            tqdm.write(f"{case}: {figures.get('perplexity') or figures['accuracy']}")


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    if args.command == "calibrate":
        calibrate_all(args)
    elif args.command == "run":
        run(args)
    else:
        write_report(args.out, TOKENS)


if __name__ == "__main__":
    main()
