"""Which branch is computed at which step: rows, selectors, files, coefficients of forecasts. No torch."""
