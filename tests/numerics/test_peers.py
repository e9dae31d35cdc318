"""Each peer against the formula its authors published, and through the public API."""

import copy

import pytest
import torch
import torch.utils.checkpoint
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from peft_jactus import CalibrationStatistics, JactusConfig, calibrate, plan_ranks, rank_summary
from peft_jactus.numerics.allocation import LayerGains, allocate
from peft_jactus.numerics.approximation import project_weight
from peft_jactus.numerics.moments import LayerStatistics
from tests.support import oracles
from tests.support.compressed_models import VOCABULARY, batches_for, logits_of, tiny_bert, tiny_gpt2, tiny_llama
from tests.support.options import decomposition_options
from tests.support.strategies import moment_from, randn, seeds

PEERS = ("svd", "fwsvd", "asvd", "svd-llm", "kfac")
# Float64, and matrices whose condition numbers are at most about 1e4.
ROUNDING = 1e-8
TOKENS = 60

shapes = st.tuples(st.integers(2, 12), st.integers(2, 12))


def layer(seed, shape):
    """A weight, inputs and gradients; inputs have directions of very different variance."""
    out_features, in_features = shape
    scales = torch.logspace(0, -2, in_features, dtype=torch.float64)
    inputs = randn(seed, TOKENS, in_features) * scales
    gradients = randn(seed + 1, TOKENS, out_features) * torch.logspace(0, -1, out_features, dtype=torch.float64)
    return randn(seed + 2, out_features, in_features), inputs, gradients


def approximation(name, weight, statistics, rank, **options):
    options = {"shrinkage": 0.0, "damping": 0.0, **options}
    projected = project_weight(weight, statistics, decomposition_options(decomposition=name, **options))
    return projected.truncate(rank).dense()


def truncated(matrix, rank):
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vh[:rank]


def close(found, expected):
    return torch.linalg.norm(found - expected) <= ROUNDING * torch.linalg.norm(expected)


# -- published formulas -----------------------------------------------------------------------------------


@given(seeds, shapes, st.integers(1, 5))
def test_svd_llm_whitens_with_the_cholesky_factor_of_the_inputs(seed, shape, rank):
    weight, inputs, gradients = layer(seed, shape)
    statistics = LayerStatistics(moment_from(inputs), moment_from(gradients))
    whitener = torch.linalg.cholesky(inputs.T @ inputs)  # Wang et al., algorithm 1
    expected = truncated(weight @ whitener, rank) @ torch.linalg.inv(whitener)
    assert close(approximation("svd-llm", weight, statistics, min(rank, *shape)), expected)


@given(seeds, shapes, st.integers(1, 5))
def test_asvd_scales_columns_by_the_root_of_the_mean_absolute_activation(seed, shape, rank):
    weight, inputs, gradients = layer(seed, shape)
    statistics = LayerStatistics(moment_from(inputs), moment_from(gradients))
    scales = torch.diag(inputs.abs().mean(0) ** 0.5 + 1e-6)
    expected = truncated(weight @ scales, rank) @ torch.linalg.inv(scales)
    assert close(approximation("asvd", weight, statistics, min(rank, *shape)), expected)


@given(seeds, shapes, st.integers(1, 5))
def test_fwsvd_scales_rows_by_the_root_of_their_fisher_information(seed, shape, rank):
    weight, inputs, gradients = layer(seed, shape)
    fisher = randn(seed + 3, *shape).square()
    statistics = LayerStatistics(moment_from(inputs), moment_from(gradients), fisher.sum(1))
    scales = torch.diag(fisher.sum(1).sqrt())
    expected = torch.linalg.inv(scales) @ truncated(scales @ weight, rank)
    assert close(approximation("fwsvd", weight, statistics, min(rank, *shape)), expected)


@given(seeds, shapes, st.integers(1, 5))
def test_kfac_minimises_the_two_sided_loss(seed, shape, rank):
    weight, inputs, gradients = layer(seed, shape)
    statistics = LayerStatistics(moment_from(inputs), moment_from(gradients))
    left, right = (torch.linalg.cholesky(vectors.T @ vectors) for vectors in (gradients, inputs))
    expected = torch.linalg.inv(left).T @ truncated(left.T @ weight @ right, rank) @ torch.linalg.inv(right)
    assert close(approximation("kfac", weight, statistics, min(rank, *shape)), expected)


@given(seeds, shapes)
def test_jactus_without_a_restriction_is_kfac(seed, shape):
    weight, inputs, gradients = layer(seed, shape)
    statistics = LayerStatistics(moment_from(inputs), moment_from(gradients))
    whole = {"weight_energy": 1.0, "input_energy": 1.0, "gradient_energy": 1.0}
    kfac = approximation("kfac", weight, statistics, 1)
    assert torch.linalg.norm(approximation("jactus", weight, statistics, 1, **whole) - kfac) < 1e-6 * kfac.norm()


# -- statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_gpt2])
def test_the_fisher_information_of_rows_is_that_of_autograd_example_by_example(make):
    model = make(dtype=torch.float64)
    check_fisher_information(model, batches_for(model, num_batches=2))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 3, 5]])
def test_the_fisher_information_is_by_example_where_positions_come_before_rows(lengths, checkpointing):
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=24, num_labels=3)
    model = transformers.XLNetForSequenceClassification(config).double().eval()
    if checkpointing:
        model.transformer.layer[1].ff.forward = checkpointed(model.transformer.layer[1].ff.forward)
    mask = torch.tensor([[0] * (6 - length) + [1] * length for length in lengths])
    ids = torch.randint(2, VOCABULARY, mask.shape)
    check_fisher_information(model, [{"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}])


def checkpointed(function):
    return lambda *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)


def check_fisher_information(model, batches):
    config = JactusConfig(target_modules="all-linear", decomposition="fwsvd")
    statistics = calibrate(model, config, batches, progress_bar=False)
    expected = dict.fromkeys(statistics, 0.0)
    for batch in batches:
        for i in range(len(batch["labels"])):
            example = {key: value[i : i + 1] for key, value in batch.items()}
            num_terms = (example["labels"][:, 1:] != -100).sum() if example["labels"].dim() == 2 else 1
            model.zero_grad()
            (model(**example).loss * num_terms).backward()
            for name in statistics:
                gradient = model.get_submodule(name).weight.grad
                if type(model.get_submodule(name)).__name__ == "Conv1D":
                    gradient = gradient.mT
                expected[name] = expected[name] + gradient.square().sum(1)
    for name, layer_statistics in statistics.items():
        # transformers computes the loss of causal models in float32
        torch.testing.assert_close(layer_statistics.row_fisher, expected[name], rtol=1e-4, atol=1e-9)


def test_fisher_information_survives_saving_and_adds_up(tmp_path):
    model = tiny_bert()
    config = JactusConfig(target_modules="all-linear", decomposition="fwsvd")
    batches = batches_for(model, num_batches=2)
    first, second, both = (
        calibrate(model, config, part, progress_bar=False) for part in (batches[:1], batches[1:], batches)
    )
    first.merge(second).save(tmp_path / "statistics.safetensors")
    loaded = CalibrationStatistics.load(tmp_path / "statistics.safetensors")
    for name in both:
        torch.testing.assert_close(loaded[name].row_fisher, both[name].row_fisher, rtol=1e-4, atol=0)
        torch.testing.assert_close(loaded[name].input.absolute_sum, both[name].input.absolute_sum)


def test_only_fwsvd_collects_fisher_information():
    model = tiny_bert()
    config = JactusConfig(target_modules="all-linear", decomposition="svd-llm")
    statistics = calibrate(model, config, batches_for(model, num_batches=1), progress_bar=False)
    assert all(layer.row_fisher is None for layer in statistics.values())
    fwsvd = JactusConfig(target_modules="all-linear", decomposition="fwsvd")
    fwsvd.statistics = statistics
    with pytest.raises(ValueError, match=r'no Fisher information of bert\.encoder.*Calibrate for "fwsvd"'):
        get_peft_model(model, fwsvd)


# -- ranks ------------------------------------------------------------------------------------------------


class Pooled(torch.nn.Module):
    """One layer sees all 24 tokens of an example, the other one just their mean."""

    def __init__(self):
        super().__init__()
        self.encoder, self.pooler, self.head = (torch.nn.Linear(12, dim, bias=False) for dim in (12, 12, 2))

    def forward(self, x, labels=None):
        logits = self.head(self.pooler(self.encoder(x).tanh().mean(1)).tanh())
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def pooled_and_batches():
    torch.manual_seed(0)
    model = Pooled().double()
    model.pooler.weight.data.mul_(3)
    return model, [{"x": randn(seed, 20, 24, 12), "labels": torch.arange(20) % 2} for seed in range(2)]


def examples_of(batch):
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["labels"]))]


def ranks_by_peer(decomposition, adaptation_init="gradient"):
    model, batches = pooled_and_batches()
    config = JactusConfig(
        target_modules=["encoder", "pooler"],
        decomposition=decomposition,
        retained_ratio=0.5,
        adaptation_rank=2,
        adaptation_init=adaptation_init,
        shrinkage=0.0,
        damping=1e-12,
    )
    return plan_ranks(model, config, calibrate(model, config, batches, progress_bar=False), progress_bar=False).ranks


def summed_errors(decomposition, weight, inputs, gradients):
    """Return a matrix of the weight whose squared singular values are errors, summed over all that a layer saw.

    Vectors are ``(examples, positions, dim)``.
    """
    fisher = torch.einsum("npi,npj->nij", gradients, inputs).square().sum((0, 2))  # of examples, rows
    inputs, gradients = inputs.flatten(0, 1), gradients.flatten(0, 1)
    if decomposition == "fwsvd":
        return fisher.sqrt()[:, None] * weight
    if decomposition == "asvd":
        return weight * inputs.abs().sum(0).sqrt()
    left, right = (torch.linalg.cholesky(vectors.T @ vectors) for vectors in (gradients, inputs))
    if decomposition == "svd-llm":
        return weight @ right
    return weight if decomposition == "svd" else left.T @ weight @ right / len(inputs) ** 0.5


@pytest.mark.parametrize("decomposition", PEERS)
def test_ranks_go_where_the_summed_error_of_the_peer_is_most(decomposition):
    model, batches = pooled_and_batches()
    names, examples = ("encoder", "pooler"), [example for batch in batches for example in examples_of(batch)]
    tokens = oracles.calibration_tokens(model, names, examples, lambda model, example: model(**example)["loss"])
    gains = {}
    for name in names:
        found = (tokens[name].inputs, tokens[name].gradients)
        vectors = [torch.stack(each).reshape(len(examples), -1, 12) for each in found]
        weight = model.get_submodule(name).weight.detach()
        energies = torch.linalg.svdvals(summed_errors(decomposition, weight, *vectors)).square()
        gains[name] = LayerGains(12, 12, energies, float(energies.sum())).with_adaptation(2)
    fields = JactusConfig().factorization_options()
    options = {field: getattr(fields, field) for field in ("storage", "rank_floor", "rank_multiple")}
    expected = allocate(gains, retained_ratio=0.5, strategy="global", fixed_ranks={}, **options).ranks
    assert ranks_by_peer(decomposition) == expected


@pytest.mark.parametrize("adaptation_init", ["gradient", "inputs"])
def test_ranks_of_svd_do_not_depend_on_statistics_for_something_else(adaptation_init):
    assert ranks_by_peer("svd", adaptation_init) == ranks_by_peer("svd", "random")


# -- through the public API -------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("decomposition", PEERS)
def test_each_peer_compresses_a_model_to_its_budget(decomposition, allocation):
    model = tiny_llama()
    batches = batches_for(model)
    dense = logits_of(model, batches[0])
    config = JactusConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        decomposition=decomposition,
        allocation=allocation,
        retained_ratio=0.6,
    )
    calibrate(model, config, batches, progress_bar=False)
    model = get_peft_model(copy.deepcopy(model), config).eval()
    summary = rank_summary(model)
    assert 0.5 < summary.retained_ratio <= 0.6
    difference = torch.linalg.norm(logits_of(model, batches[0]) - dense) / torch.linalg.norm(dense)
    assert 1e-4 < difference < 1
