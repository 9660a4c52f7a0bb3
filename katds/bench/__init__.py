"""Benchmarks: what a step costs, where the time goes, and against whom. `launch/bench.py` is the command."""
