"""Training of the routing systems and of networks of one's own, and their losses."""

from fastroute.training.logs import CsvLog, TensorBoardLog
from fastroute.training.trainer import Recipe, Stage, StepResult, Trainer
from fastroute.training.validation import Validation

__all__ = ["CsvLog", "Recipe", "Stage", "StepResult", "TensorBoardLog", "Trainer", "Validation"]
