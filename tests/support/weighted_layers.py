"""Small layers with vectors that are known one by one, so that an oracle can weigh their errors."""

from peft_jactus.numerics.moments import LayerStatistics
from tests.support.options import decomposition_options, factorization_options
from tests.support.strategies import moment_from, randn

NUM_TOKENS = 40
SHAPES = {"query": (6, 8), "up": (12, 8), "down": (8, 12)}
# Statistics as they are, so that the oracle's metric is the package's.
EXACT = decomposition_options(shrinkage=0.0, damping=0.0)
OPTIONS = factorization_options(decomposition=EXACT, retained_ratio=0.6)


def vectors_and_statistics(seed, shape, *, num_tokens=NUM_TOKENS):
    out_features, in_features = shape
    inputs = randn(seed, num_tokens, in_features) + 1.0  # a mean that is not zero
    gradients = randn(seed + 1, num_tokens, out_features)
    return inputs, gradients, LayerStatistics(moment_from(inputs), moment_from(gradients))


def some_weights():
    return {name: randn(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}


def their_statistics():
    return {name: vectors_and_statistics(10 * seed, shape)[2] for seed, (name, shape) in enumerate(SHAPES.items())}
