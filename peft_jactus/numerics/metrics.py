"""What the decompositions weigh an error with: regularized covariances, and the scales of rows and columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_jactus.numerics.linalg import to_decomposition_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from peft_jactus.numerics.moments import LayerStatistics, SecondMoment

# ASVD: exponent of the mean absolute activation, and what is added to it, as in the authors' code.
_ASVD_EXPONENT = 0.5
_ASVD_OFFSET = 1e-6


def regularized_covariance(
    moment: SecondMoment, *, shrinkage: float | str, damping: float, centred: bool = False
) -> Tensor:
    """Return ``(1 - rho) C + (rho + damping) tr(C) / dim I``.

    Args:
        moment: Sums of the vectors.
        shrinkage: ``rho`` in [0, 1], or ``"ledoit-wolf"`` for the estimate of that name.
        damping: Least share of the mean eigenvalue in every direction, dimensionless, >= 0.
        centred: Take the covariance around the mean.

    Returns:
        ``(dim, dim)``, float64, positive definite if ``rho + damping > 0``.

    Raises:
        ValueError: If all vectors were zero, which leaves no scale to regularize with.
    """
    rho = moment.ledoit_wolf_shrinkage() if isinstance(shrinkage, str) else shrinkage
    covariance = moment.centred_covariance if centred else moment.covariance
    mean_eigenvalue = float(covariance.diagonal().mean())
    if not mean_eigenvalue > 0:
        raise ValueError("`moment` must hold at least one non-zero vector; all that were counted are zero.")
    covariance = covariance * (1 - rho)
    covariance.diagonal().add_((rho + damping) * mean_eigenvalue)
    return covariance


def fisher_row_scales(statistics: LayerStatistics, damping: float) -> Tensor:
    """Return FWSVD's scale of each row: the root of the sum of its entries' empirical Fisher information.

    Args:
        statistics: Of one layer, with ``row_fisher``.
        damping: Least Fisher information of a row, as a share of the mean: a row without would have no scale.

    Returns:
        ``(out,)``, float64, positive.

    Raises:
        ValueError: If ``row_fisher`` was not collected, or is zero everywhere.

    References:
        Hsu et al., "Language model compression with weighted low-rank factorization", arXiv:2207.00112, equation 8.
    """
    if statistics.row_fisher is None:
        raise ValueError(
            "these statistics have no Fisher information of rows. Calibrate with "
            '`decomposition="fwsvd"` in the config, to another `statistics_file`.'
        )
    row_fisher = to_decomposition_dtype(statistics.row_fisher)
    mean = float(row_fisher.mean())
    if not mean > 0:
        raise ValueError("the Fisher information is zero in every row; the layer has no gradient.")
    return (row_fisher + damping * mean).sqrt()


def activation_scales(moment: SecondMoment) -> Tensor:
    """Return ASVD's scale of each column: ``mean |x_j| ^ 0.5 + 1e-6``.

    Args:
        moment: Sums of the layer's inputs.

    Returns:
        ``(in,)``, float64, positive.

    References:
        Yuan et al., "ASVD: Activation-aware singular value decomposition", arXiv:2312.05821, equations 6 and 8.
    """
    return moment.mean_absolute**_ASVD_EXPONENT + _ASVD_OFFSET
