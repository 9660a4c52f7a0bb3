"""katds: on-policy distillation that ends every rollout that has stopped teaching."""

__version__ = "0.1.0"
