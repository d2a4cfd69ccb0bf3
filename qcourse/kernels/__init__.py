"""Products of codes: integer and packed kernels, each next to the exact arithmetic it must match."""
