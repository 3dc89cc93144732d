"""MoE language models of equal size: train a grid, evaluate it, and choose a shape."""

import os

# Fits multiply small matrices thousands of times. OpenBLAS hands each to as many threads as there
# are cores, and while other work keeps these busy, its threads spin: 37 s instead of 7 for one fit
# and its jackknife. NumPy reads this as it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
