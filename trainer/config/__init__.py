"""What a run is asked to do: its sections (`schema`), and how they are read (`file`)."""

from trainer.config.checkpoint import CheckpointConfig
from trainer.config.data import DataConfig, PhaseConfig, SourceConfig, StageConfig, TextConfig
from trainer.config.evaluation import EvalConfig, ProbeConfig
from trainer.config.layers import LayersFromConfig
from trainer.config.objective import GeneratorConfig, MaskRatioStage, ObjectiveConfig, PairConfig, TeacherConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.rope_theta import RopeTheta
from trainer.config.schedule import ScheduleConfig
from trainer.config.schema import (
    AUTOTUNE,
    CUDA_GRAPHS,
    DEFAULTS,
    BatchConfig,
    Config,
    LoggingConfig,
    ModelConfig,
    ProfileConfig,
    ResilienceConfig,
    RunConfig,
    TrainConfig,
    WarmupConfig,
    WatchdogConfig,
    run_folder,
)

__all__ = [
    "AUTOTUNE",
    "CUDA_GRAPHS",
    "DEFAULTS",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GeneratorConfig",
    "LayersFromConfig",
    "LoggingConfig",
    "MaskRatioStage",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PairConfig",
    "PhaseConfig",
    "ProbeConfig",
    "ProfileConfig",
    "ResilienceConfig",
    "RopeTheta",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "TeacherConfig",
    "TextConfig",
    "TrainConfig",
    "WarmupConfig",
    "WatchdogConfig",
    "run_folder",
]
