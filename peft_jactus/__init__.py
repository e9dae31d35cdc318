"""Fine-tune a pretrained transformer with PEFT and get a smaller model.

Importing this package registers the tuner type ``JACTUS`` with PEFT, and compressed checkpoints with transformers.

The rooms; each imports only those above it:

- `numerics`: the mathematics of the method, on tensors only.
- `tuner`: what PEFT uses: config, layer and model; and the plan of the ranks.
- `calibration`: computes statistics from a model and a few batches.
- `deployment`: writes, loads and inspects compressed checkpoints.
- `callbacks`: compresses in mid-run of a `transformers.Trainer`.
- `parse`: ranks chosen for each prompt. It is only imported if you use it.
- `cli`: the command ``peft-jactus``.
"""

from peft_jactus._registration import register as _register
from peft_jactus._version import __version__ as __version__
from peft_jactus.calibration import CalibrationStatistics, calibrate
from peft_jactus.callbacks import CompressionCallback
from peft_jactus.deployment import (
    LowRankLinear,
    PivotedLinear,
    compressed_copy,
    export_compressed,
    export_remote_code,
    loading_options,
    plot_plan,
    plot_ranks,
    rank_summary,
)
from peft_jactus.errors import BaseWeightsFreedError, DamagedCheckpointError, NumericalWarning, RoutingWarning
from peft_jactus.tuner import JactusConfig, JactusModel, RankPlan, RankSummary, plan_ranks

__all__ = [  # noqa: RUF022  # grouped
    # Configure, calibrate, plan
    "JactusConfig",
    "CalibrationStatistics",
    "RankPlan",
    "calibrate",
    "plan_ranks",
    "plot_plan",
    # Train at full size first
    "CompressionCallback",
    # Look at what was decided
    "RankSummary",
    "plot_ranks",
    "rank_summary",
    # Ship
    "compressed_copy",
    "export_compressed",
    "export_remote_code",
    "loading_options",
    # Classes that are met on the way
    "BaseWeightsFreedError",
    "DamagedCheckpointError",
    "JactusModel",
    "LowRankLinear",
    "NumericalWarning",
    "PivotedLinear",
    "RoutingWarning",
]

_register()
