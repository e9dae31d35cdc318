"""Sketches of a weight's gradient, which is as large as the weight and is never formed.

Over the calibration positions, the gradient of the summed loss with respect to a weight is ``G = sum_t g_t x_t^T``.
Two products with fixed random matrices, ``Y = G Omega`` and ``Z = G^T Psi``, are sums over positions like all
statistics, a few numbers a layer, and hold the leading directions of ``G`` on both sides.

References:
    Tropp, Yurtsever, Udell & Cevher, "Practical sketching algorithms for low-rank matrix approximation", SIAM J.
    Matrix Anal. Appl. 38, 2017, algorithms 1, 4 and 7.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peft_jactus.numerics.linalg import to_decomposition_dtype

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = ("left", "right")
# Columns of a sketch beyond the directions that are asked for. A flat spectrum needs them: of 16 directions of squares
# that fall with 1 / i they hold 0.89 of what the best ones do, with 8 more columns 0.85, with 32 more 0.94.
OVERSAMPLING = 16


@functools.lru_cache(maxsize=16)  # layers of a model have few different sides
def sketching_matrix(dim: int, size: int, *, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Return the matrix ``(dim, size)`` of random signs that vectors of dimension ``dim`` are sketched with.

    Sketches only add up if they were made with the same one. So the signs are those of a hash (splitmix64) of their
    place, which is the same on every machine and in every version of PyTorch.
    """
    # Products and sums of int64 wrap around, as splitmix64 has it.
    x = torch.arange(dim * size, dtype=torch.int64) + (dim << 32) - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    signs = 1 - 2 * ((x >> 31) & 1)
    return signs.view(dim, size).to(device=device, dtype=dtype)


@dataclass
class GradientSketch:
    """Sums that hold the leading directions of a weight's gradient ``G`` ``(out, in)``.

    Attributes:
        left: ``(out, size)``, ``G Omega``.
        right: ``(in, 2 size + 1)``, ``G^T Psi``; it is wider, as the least-squares problem of `leading` asks for.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def zeros(
        cls,
        out_features: int,
        in_features: int,
        num_directions: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> GradientSketch:
        """Return the sketch of no gradient, to hold ``num_directions`` well."""
        size = min(num_directions + OVERSAMPLING, out_features, in_features)
        return cls(
            torch.zeros(out_features, size, dtype=dtype, device=device),
            torch.zeros(in_features, 2 * size + 1, dtype=dtype, device=device),
        )

    @staticmethod
    def num_bytes(out_features: int, in_features: int, num_directions: int, dtype: torch.dtype) -> int:
        """Return what the sums of `zeros` take."""
        size = min(num_directions + OVERSAMPLING, out_features, in_features)
        return (out_features * size + in_features * (2 * size + 1)) * dtype.itemsize

    @property
    def size(self) -> int:
        """How many directions it can tell apart, at most."""
        return self.left.shape[1]

    def update_(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add ``sum_t g_t x_t^T`` for inputs ``(num_vectors, in)`` and gradients ``(num_vectors, out)``."""
        inputs, gradients = inputs.detach().to(self.right.dtype), gradients.detach().to(self.left.dtype)
        self.left.addmm_(gradients.mT, inputs @ self._matrix(self.right.shape[0], self.left))
        self.right.addmm_(inputs.mT, gradients @ self._matrix(self.left.shape[0], self.right))

    @staticmethod
    def _matrix(dim: int, sketch: Tensor) -> Tensor:
        return sketching_matrix(dim, sketch.shape[1], dtype=sketch.dtype, device=sketch.device)

    def merge_(self, other: GradientSketch) -> None:
        """Add the sketch of other positions; a `ValueError` says if it is of another size."""
        if other.left.shape != self.left.shape or other.right.shape != self.right.shape:
            raise ValueError(
                f"`other` must be of the same size; got {tuple(other.left.shape)} and {tuple(self.left.shape)}."
            )
        self.left.add_(other.left.to(self.left))
        self.right.add_(other.right.to(self.right))

    def to(self, device: torch.device) -> GradientSketch:
        """Return the sketch on ``device``."""
        return GradientSketch(self.left.to(device), self.right.to(device))

    def clone(self) -> GradientSketch:
        """Return an independent copy."""
        return GradientSketch(self.left.clone(), self.right.clone())

    def is_finite(self) -> bool:
        """Whether no sum has overflowed or met a NaN."""
        return bool(torch.isfinite(self.left).all()) and bool(torch.isfinite(self.right).all())

    def leading(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leading singular vectors and values of the gradient, largest first.

        With ``Q`` an orthonormal basis of ``Y``, ``G`` is close to ``Q X``, and ``Psi^T Q X = Psi^T G = Z^T`` gives
        ``X``. The vectors are exact up to rounding if ``G`` has a rank of at most `size`.

        Args:
            count: Of directions; at most `size` are returned.

        Returns:
            ``left`` ``(out, count)`` and ``right`` ``(in, count)`` with orthonormal columns, and the singular values
            ``(count,)``; all float64.
        """
        basis = torch.linalg.qr(to_decomposition_dtype(self.left)).Q  # (out, size)
        psi = self._matrix(self.left.shape[0], self.right).to(basis)
        solution = torch.linalg.pinv(psi.mT @ basis) @ to_decomposition_dtype(self.right).mT  # (size, in)
        left, values, right = torch.linalg.svd(solution, full_matrices=False)
        return basis @ left[:, :count], right[:count].mT, values[:count]
