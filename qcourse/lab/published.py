"""Measurements that others have published, kept once for all the lessons that draw them.

Source of INT4_ON_H100: read off the plots of the gemlite project's benchmark, two decimals.

How it differs from ``claims.py``: that holds statements that lessons test.
"""

# tokens per forward pass
INT4_BATCHES = (1, 8, 16, 64, 256)

# speedup over fp16 at each batch size: an 8192 x 8192 layer, groups of 128
INT4_ON_H100 = {
    "Marlin": (2.20, 2.19, 2.21, 1.48, 0.63),
    "tinygemm": (2.26, 1.24, 0.76, 0.20, 0.06),
    "BitBLAS": (2.05, 0.44, 0.23, 0.21, 0.24),
    "gemlite": (1.78, 1.30, 1.29, 0.73, 0.41),
}
