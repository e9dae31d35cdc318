"""Which form of a layer 16-bit models should have: their distance from the float32 dense model, at equal bytes.

    python -m benchmarks.compression.sixteen_bits run text --task trec
    JACTUS_LLAMA=outputs/llama-novels python -m benchmarks.compression.sixteen_bits run language --task novels
    JACTUS_LLAMA=outputs/smollm2 python -m benchmarks.compression.sixteen_bits run language --task wikitext2 \\
        --calibration-rows 64 --test-rows 16
    python -m benchmarks.compression.sixteen_bits report

A form is what the weights are rounded to, and what computes. Forms of one ratio take the same bytes, but for
"float32 columns", which takes a little more. "pivoted" chooses rows one by one and rounds plainly. "pairs" is what the
package exports: rows are chosen two by two, which takes a third of the time to put in order. The others are ways to
lose less by rounding:

- float16 parts: eightfold finer, as this package had it once; slow on CPUs, and overflows at 65,504;
- feedback: a coefficient's rounding error is made up for by the coefficients after it, as GPTQ does it
  (Frantar et al., arXiv:2210.17323), to rows that are rounded first;
- QR pivots: the rows that LAPACK's QR with column pivoting chooses, instead of the largest volume's;
- float32 columns: of the coefficients, the 16 columns whose rounding changes the weight most.
"""

import copy
import json
import statistics

import scipy.linalg
import torch
from peft import get_peft_model

from benchmarks.compare.cases import RATIOS
from benchmarks.compression.bits import bits_parser, calibration, model_name, parse, table_of, test_rows
from benchmarks.compression.loss import ROWS, Scorer, pretrained
from benchmarks.harness.environment import environment
from benchmarks.harness.reporting import markdown_table, write_markdown
from benchmarks.tasks.loading import load_workload
from peft_jactus import JactusConfig
from peft_jactus.deployment.export import compressed_copy
from peft_jactus.deployment.layers import FactorizedLinear, LowRankLinear, RowPivotedLinear
from peft_jactus.numerics.interpolation import interpolate_rows

NUM_FLOAT32_COLUMNS = 16
FORMS = ("factored", "pivoted", "pairs", "float16 parts", "feedback", "QR pivots", "float32 columns")


def parse_arguments():
    parser = bits_parser(__doc__, "sixteen_bits", ratios=RATIOS)
    parser.add_argument("--seed", type=int, default=0)
    return parse(parser)


# -- forms ------------------------------------------------------------------------------------------------


def with_feedback(coefficients, rows):
    """Round coefficients ``(others, rank)`` to bfloat16 so that their product with ``rows`` changes little."""
    gram = rows @ rows.mT
    gram.diagonal().add_(1e-8 * gram.diagonal().mean())
    order = gram.diagonal().argsort(descending=True)
    left, rounded = coefficients[:, order].clone(), torch.empty_like(coefficients)
    factor = torch.linalg.cholesky(torch.linalg.inv(gram[order][:, order]), upper=True)
    for j, column in enumerate(order.tolist()):
        rounded[:, column] = narrowed(left[:, j])
        left[:, j:] -= torch.outer((left[:, j] - rounded[:, column]) / factor[j, j], factor[j, j:])
    return rounded


def narrowed(tensor, dtype=torch.bfloat16):
    return tensor.to(dtype).to(tensor.dtype)


def parts_of(layer):
    """Return a pivoted weight's chosen rows, its coefficients, and all rows, in float64; transposed for columns."""
    weight = layer.dense_weight().double()
    if isinstance(layer, RowPivotedLinear):
        return layer.rows.weight.double(), layer.others.weight.double(), weight, layer.row_index.argsort()
    return layer.columns.weight.double().mT, layer.others.weight.double().mT, weight.mT, layer.column_index.long()


def qr_pivots(basis):
    rank = basis.shape[1]
    pivots = torch.from_numpy(scipy.linalg.qr(basis.mT.numpy(), mode="r", pivoting=True)[1]).long()
    return torch.cat([pivots[:rank], pivots[rank:].sort().values])


def rounded_weight(layer, form):
    """Return the weight ``(out, in)`` of a pivoted layer in float32, as a form rounds it."""
    rows, coefficients, weight, order = parts_of(layer)
    rank = layer.rank
    if form != "pairs":
        # Of the weight's rank leading left singular vectors, as the package's own choice.
        basis = torch.linalg.svd(weight, full_matrices=False).U[:, :rank]
        order = qr_pivots(basis) if form == "QR pivots" else interpolate_rows(basis).order
        rows = weight[order[:rank]]
        coefficients = torch.linalg.solve(basis[order[:rank]], basis[order[rank:]], left=False)
    if form == "feedback":
        rows = narrowed(rows)
        fitted = torch.linalg.lstsq(rows.mT, weight[order[rank:]].mT).solution.mT
        coefficients = with_feedback(fitted, rows)
    elif form == "float32 columns":
        error = (narrowed(coefficients) - coefficients).norm(dim=0) * rows.norm(dim=1)
        kept = error.argsort(descending=True)[:NUM_FLOAT32_COLUMNS]
        exact = coefficients[:, kept]
        rows, coefficients = narrowed(rows), narrowed(coefficients)
        coefficients[:, kept] = exact
    else:
        dtype = torch.float16 if form == "float16 parts" else torch.bfloat16
        rows, coefficients = narrowed(rows, dtype), narrowed(coefficients, dtype)
    whole = torch.cat([rows, coefficients @ rows])[order.argsort()]
    return whole if isinstance(layer, RowPivotedLinear) else whole.mT


@torch.no_grad()
def rounded(model, form):
    """Return a float32 model whose low-rank weights alone are rounded, and the mean relative change of a weight."""
    model, errors = copy.deepcopy(model), []
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, FactorizedLinear):
            continue
        weight = layer.dense_weight().double()
        if isinstance(layer, LowRankLinear):
            other = narrowed(layer.up.weight.double()) @ narrowed(layer.down.weight.double())
        else:
            other = rounded_weight(layer, form)
        errors.append(float((other - weight).norm() / weight.norm()))
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight.copy_(other)
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
        model.set_submodule(name, dense)
    return model, statistics.mean(errors)


def computed_in_bfloat16(model):
    """Return the model with all numbers, and all products, in bfloat16, as a checkpoint of that dtype has them."""
    return copy.deepcopy(model).to(torch.bfloat16)


# -- measuring --------------------------------------------------------------------------------------------


def rows_of(model, found, scorer, workload, ratios):
    """Return a row for each ratio and form; each has the divergence from the dense float32 model."""
    yield {"form": "dense", "retained_ratio": 1.0, "bfloat16": scorer.score(computed_in_bfloat16(model))}
    for ratio in ratios:
        for storage in ("factored", "pivoted"):
            config = JactusConfig(
                task_type=workload.task_type,
                target_modules="all-linear",
                modules_to_save=workload.modules_to_save,
                retained_ratio=ratio,
                storage=storage,
                adaptation_rank=0,
            )
            config.statistics = found
            exact = compressed_copy(get_peft_model(copy.deepcopy(model), config)).eval()
            of_storage = {"retained_ratio": ratio, "storage": storage, "float32": scorer.score(exact)}
            for form in FORMS[:1] if storage == "factored" else FORMS[1:]:
                with_rounded_weights, error = rounded(exact, form)
                row = {"form": form, **of_storage, "weight_error": error}
                row["weights_rounded"] = scorer.score(with_rounded_weights)
                if form in ("factored", "pairs"):  # what the package exports
                    row["bfloat16"] = scorer.score(computed_in_bfloat16(exact))
                print(json.dumps(row), flush=True)
                yield row


def run(args):
    workload = load_workload(args.kind, args.data_dir, args.task, num_rows=ROWS, scored_on="test")
    tuning = workload
    if workload.head is not None:
        tuning = load_workload(args.kind, args.data_dir, args.task, num_rows=ROWS, scored_on="held-out")
    model = pretrained(tuning, args.seed)
    found = calibration(model, workload, args.calibration_rows)
    scorer = Scorer(model, test_rows(args, workload), workload.collator)
    return list(rows_of(model, found, scorer, workload, args.retained_ratio))


def report(table):
    lines = [line for record in table.read() for line in table_lines(record)]
    head = ["model", "kept", "form", "change of a weight, 1e-3", "KL in float32, 1e-3"]
    text = markdown_table([*head, "with rounded weights", "all in bfloat16"], lines)
    write_markdown(table.path.with_suffix(".md"), text)


def table_lines(record):
    for row in record["rows"]:
        divergences = [
            f"{1e3 * row[key]['divergence']:.2f}" if key in row else ""
            for key in ("float32", "weights_rounded", "bfloat16")
        ]
        error = f"{1e3 * row['weight_error']:.2f}" if "weight_error" in row else ""
        yield [record["model"], f"{row['retained_ratio']:g}", row["form"], error, *divergences]


def main():
    args = parse_arguments()
    table = table_of(args)
    if args.command == "report":
        report(table)
        return
    case = {"model": model_name(args.kind), "task": args.task, "seed": args.seed}
    if not table.contains(case):
        started_at = environment()
        settings = {"calibration_rows": args.calibration_rows, "test_rows": args.test_rows}
        table.add({**case, **settings, "rows": run(args), "environment": started_at})


if __name__ == "__main__":
    main()
