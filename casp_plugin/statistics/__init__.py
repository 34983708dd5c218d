"""Statistics of the calibration data at the layers of a dense model, collected by hooks."""
