"""What others have measured and published, kept once for all the lessons that draw it.

Source of INT4_ON_H100: the plots of the gemlite project's benchmark, read off, with two decimals.

How it differs from ``claims.py``: those are statements that lessons judge; these are measurements that they show.
"""

INT4_BATCHES = (1, 8, 16, 64, 256)  # tokens at a time
INT4_ON_H100 = {  # times as fast as fp16 at each of them: 8192 x 8192, groups of 128
    "Marlin": (2.20, 2.19, 2.21, 1.48, 0.63),
    "tinygemm": (2.26, 1.24, 0.76, 0.20, 0.06),
    "BitBLAS": (2.05, 0.44, 0.23, 0.21, 0.24),
    "gemlite": (1.78, 1.30, 1.29, 0.73, 0.41),
}
