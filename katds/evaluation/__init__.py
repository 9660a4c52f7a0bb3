"""Measure models: avg@k and pass@k through the rollout engine. Never imports katds.train."""
