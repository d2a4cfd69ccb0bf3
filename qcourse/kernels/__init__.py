"""Products of codes: integer and packed kernels, next to the exact arithmetic they must match."""
