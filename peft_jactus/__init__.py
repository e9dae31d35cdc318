"""Fine-tune a pretrained transformer with PEFT and come out with a smaller model.

Importing this package registers the tuner type ``JACTUS`` with PEFT.
"""

from peft_jactus._registration import register as _register
from peft_jactus._version import __version__ as __version__
from peft_jactus.calibration import calibrate
from peft_jactus.config import JactusConfig
from peft_jactus.linalg import NumericalWarning
from peft_jactus.model import JactusModel
from peft_jactus.statistics import CalibrationStatistics
from peft_jactus.summary import RankSummary, plot_ranks, rank_summary

__all__ = [
    "CalibrationStatistics",
    "JactusConfig",
    "JactusModel",
    "NumericalWarning",
    "RankSummary",
    "calibrate",
    "plot_ranks",
    "rank_summary",
]

_register()
