"""What runs a sampler to learn from it: calibrate, measure_sensitivity, choose."""
