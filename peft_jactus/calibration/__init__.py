"""From a model and a few batches to `CalibrationStatistics`.

A subpackage because each concern has rules of its own: which positions count (`position_masks`), what the loss is
summed over (`summed_loss`), how the model is left as it was (`restoring`), and what hooks collect (`collector`).
"""

from peft_jactus.calibration.driver import calibrate, check_statistics

__all__ = ["calibrate", "check_statistics"]
