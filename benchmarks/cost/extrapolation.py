"""What calibration, factorization and training of a Llama take, counted: floating-point operations and bytes."""

from dataclasses import dataclass

FLOAT32 = 4
BFLOAT16 = 2
GROUP_SIZE = 64  # numbers that share a scale, in 8 and 4 bits
# Of the longer side, in operations per number of a factor: two QR and an LU decomposition, two solutions.
FACTORS_OF_FACTORS = 8
# A symmetric eigendecomposition with vectors (Demmel, "Applied numerical linear algebra", 1997, section 5.3.2).
EIGENDECOMPOSITION = 9


@dataclass(frozen=True)
class Llama:
    """Shapes of a model."""

    name: str
    hidden: int
    intermediate: int
    key_value: int
    blocks: int
    vocabulary: int = 0

    @property
    def layers(self):
        """``(out, in)`` of the seven layers of a block."""
        return [
            (self.hidden, self.hidden),
            (self.key_value, self.hidden),
            (self.key_value, self.hidden),
            (self.hidden, self.hidden),
            (self.intermediate, self.hidden),
            (self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]

    @property
    def parameters(self):
        """Of the blocks."""
        return self.blocks * sum(out_features * in_features for out_features, in_features in self.layers)

    @property
    def embedding_parameters(self):
        """Of the embeddings and the output layer, which stay as they are."""
        return 2 * self.vocabulary * self.hidden

    def adapter_parameters(self, rank):
        """Of adapters of one rank on all layers."""
        return self.blocks * sum(rank * (out_features + in_features) for out_features, in_features in self.layers)

    def training_bytes(self, retained_ratio, adapter_rank, *, inside=False, frozen_bits=16):
        """Count weights in 16 bits, and of what trains four float32 numbers each: weight, gradient, Adam's two states.

        ``inside``: the adapter is part of what is kept (adaptation ranks), and not on top (LoRA). ``frozen_bits``: of
        what is frozen of the blocks; in less than 16, 64 numbers share a scale in bfloat16.
        """
        trained = self.adapter_parameters(adapter_rank)
        frozen = retained_ratio * self.parameters - (trained if inside else 0)
        per_number = BFLOAT16 if frozen_bits == 16 else frozen_bits / 8 + BFLOAT16 / GROUP_SIZE
        return per_number * frozen + BFLOAT16 * self.embedding_parameters + 4 * FLOAT32 * trained

    @property
    def covariances(self):
        """Numbers in all covariances; q, k and v share one input, gate and up another."""
        inputs = 3 * self.hidden**2 + self.intermediate**2
        return self.blocks * (inputs + sum(out_features**2 for out_features, _ in self.layers))

    def statistics_bytes(self):
        return FLOAT32 * self.covariances

    def model_flops(self, tokens):
        """Of one pass forward and backward without gradients of weights."""
        return 4 * tokens * self.parameters

    def covariance_flops(self, tokens):
        return 2 * tokens * self.covariances

    def factorization_flops(self, retained_ratio):
        return self.blocks * sum(layer_flops(*layer, retained_ratio) for layer in self.layers)


LLAMAS = (
    Llama("Llama-2-7B", hidden=4096, intermediate=11008, key_value=4096, blocks=32, vocabulary=32000),
    Llama("Llama-3-70B", hidden=8192, intermediate=28672, key_value=1024, blocks=80, vocabulary=128256),
)


def layer_flops(out_features, in_features, retained_ratio):
    """Count the factorization of one layer: root, whitening, product with the longer metric, spectrum, factors."""
    short, long = sorted((out_features, in_features))
    rank = retained_ratio * short * long / (short + long)
    spectrum = (
        short**3 / 3 + short**2 * long + 2 * short * long**2 + 2 * short**2 * long + EIGENDECOMPOSITION * short**3
    )
    factors = short**2 * rank + 2 * short * long * rank + FACTORS_OF_FACTORS * (short + long) * rank**2
    return spectrum + factors
