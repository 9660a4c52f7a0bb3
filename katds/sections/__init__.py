"""The sections of a recipe that are the same whatever the method: models, data, rollouts, training, evaluation, the run.

Defaults are the published setting of KAT (arXiv 2606.09471) where the paper states one.
"""

from katds.sections.evaluation import (
    BenchmarkConfig,
    EvaluationConfig,
    GraderConfig,
    MatchGraderConfig,
    MathGraderConfig,
)
from katds.sections.learning import OptimizerConfig, RewardConfig, RolloutConfig, TrainConfig
from katds.sections.models import DataConfig, ModelConfig, TeacherConfig
from katds.sections.run import CheckpointConfig, RunConfig, WatchConfig

__all__ = [
    "BenchmarkConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "GraderConfig",
    "MatchGraderConfig",
    "MathGraderConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainConfig",
    "WatchConfig",
]
