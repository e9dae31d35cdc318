"""From a model and a few batches to `CalibrationStatistics`.

Inside: the call itself (`passes`), batches and where they go (`batches`), which positions count (`position_masks`)
and whose they are (`origins`), what the loss is summed over (`summed_loss`), how the model is left as it was
(`model_state`), what hooks collect (`collector`), of which layers at a time (`memory_groups`), and where the sums are
stored meanwhile (`resume`).
"""

from peft_jactus.calibration.passes import calibrate
from peft_jactus.calibration.statistics import CalibrationStatistics

__all__ = ["CalibrationStatistics", "calibrate"]
