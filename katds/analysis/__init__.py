"""Measure rollouts that a run has saved. Never imports katds.train."""
