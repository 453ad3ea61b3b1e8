"""Eight-bit files: calibration, which layers stay in float, and what that costs."""
