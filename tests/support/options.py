"""Options of the numerical part, which has no defaults: those of `JactusConfig`, but two factors and a core."""

import dataclasses

from peft_jactus import JactusConfig

_DEFAULTS = JactusConfig(storage="factored", adaptation_rank=0).factorization_options()


def decomposition_options(decomposition="jactus", **changes):
    return dataclasses.replace(_DEFAULTS.decomposition, decomposition=decomposition, **changes)


def factorization_options(decomposition=None, **changes):
    decomposition = _DEFAULTS.decomposition if decomposition is None else decomposition
    return dataclasses.replace(_DEFAULTS, decomposition=decomposition, **changes)
