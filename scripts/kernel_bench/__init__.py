"""The parts of `scripts/bench_kernels.py`."""
