"""What the calibration data says about the layers of a dense model, measured by hooks."""
