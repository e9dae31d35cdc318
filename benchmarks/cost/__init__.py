"""Time and memory of training, calibration and inference."""
