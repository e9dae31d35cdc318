"""From a model and a few batches to `CalibrationStatistics`.

A subpackage because each concern has rules of its own: which positions count (`position_masks`), what the loss is
summed over (`summed_loss`), how the model is left as it was (`restoring`), what hooks collect (`collector`), of
which layers at a time (`grouping`), and where the sums lie meanwhile (`store`).
"""

from peft_jactus.calibration.passes import calibrate
from peft_jactus.calibration.memory_groups import memory_limit
from peft_jactus.calibration.resume import check_statistics

__all__ = ["calibrate", "check_statistics", "memory_limit"]
