"""What tests share: models, the oracle, captures, tolerances, operands of kernels."""
