"""The optimizer: studies, probes, surrogate, trials, front, certificate, plots, report, export."""

import os

# numpy's and scipy's products are small here, and their threads would wait for each other longer than they compute;
# read when those libraries are loaded, which is later
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
