"""Fine-tune a pretrained transformer with PEFT and come out with a smaller model.

Importing this package registers the tuner type ``JACTUS`` with PEFT.
"""

from peft_jactus._registration import register as _register
from peft_jactus._version import __version__ as __version__
from peft_jactus.calibration import calibrate
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.deployment.export import export_compressed
from peft_jactus.deployment.integrity import DamagedCheckpointError
from peft_jactus.numerics.linalg import NumericalWarning
from peft_jactus.deployment.quantizer import loading_options
from peft_jactus.deployment.layers import LowRankLinear, PivotedLinear
from peft_jactus.tuner.model import JactusModel
from peft_jactus.calibration.statistics import CalibrationStatistics
from peft_jactus.deployment.ranks import RankSummary, plot_ranks, rank_summary

__all__ = [
    "CalibrationStatistics",
    "DamagedCheckpointError",
    "JactusConfig",
    "JactusModel",
    "LowRankLinear",
    "NumericalWarning",
    "PivotedLinear",
    "RankSummary",
    "calibrate",
    "export_compressed",
    "loading_options",
    "plot_ranks",
    "rank_summary",
]

_register()
