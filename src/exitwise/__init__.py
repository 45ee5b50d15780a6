"""At which layer may this vision-language model stop looking at the image, and still be safe?

The public API. Names are loaded when first used, so that `import exitwise` and `exitwise --help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .alignment.adapter import Adapter
    from .alignment.config import AlignConfig
    from .alignment.loop import align
    from .auditing.audit import audit
    from .auditing.config import AuditConfig
    from .auditing.judging import judge
    from .auditing.report import write_report
    from .comparison import Comparison, compare
    from .errors import UserError
    from .measure.calibration import calibrate
    from .measure.metrics import compute_metrics
    from .measure.scores import mean_score, score_table
    from .model.costs import exit_costs
    from .model.exit_names import parse_exits
    from .model.exits import encode, exit_at, exit_features
    from .model.loading import load_vlm
    from .model.vlm import Vlm, describe
    from .report.paper import tables
    from .rewards.config import RewardConfig
    from .rewards.evaluation import evaluate_reward
    from .rewards.loading import load_reward
    from .rewards.training import train_reward
    from .run.exit import Exit
    from .run.records import Completion, Sample, Score, Verdict
    from .run.run import Run
    from .scorers import make_scorer, score
    from .scorers.vqa_v2 import vqa_accuracy
    from .shipping.config import SlimConfig
    from .shipping.runtimes import inspect_checkpoint
    from .shipping.slim import slim

_MODULES = {
    "Adapter": "alignment.adapter",
    "AlignConfig": "alignment.config",
    "align": "alignment.loop",
    "audit": "auditing.audit",
    "AuditConfig": "auditing.config",
    "Comparison": "comparison",
    "compare": "comparison",
    "UserError": "errors",
    "judge": "auditing.judging",
    "calibrate": "measure.calibration",
    "compute_metrics": "measure.metrics",
    "mean_score": "measure.scores",
    "score_table": "measure.scores",
    "exit_costs": "model.costs",
    "parse_exits": "model.exit_names",
    "encode": "model.exits",
    "exit_at": "model.exits",
    "exit_features": "model.exits",
    "Vlm": "model.vlm",
    "describe": "model.vlm",
    "load_vlm": "model.loading",
    "write_report": "auditing.report",
    "tables": "report.paper",
    "RewardConfig": "rewards.config",
    "evaluate_reward": "rewards.evaluation",
    "load_reward": "rewards.loading",
    "train_reward": "rewards.training",
    "Exit": "run.exit",
    "Completion": "run.records",
    "Sample": "run.records",
    "Score": "run.records",
    "Verdict": "run.records",
    "Run": "run.run",
    "make_scorer": "scorers",
    "score": "scorers",
    "vqa_accuracy": "scorers.vqa_v2",
    "SlimConfig": "shipping.config",
    "inspect_checkpoint": "shipping.runtimes",
    "slim": "shipping.slim",
}
__version__ = "0.1.0"
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'exitwise' has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, so that a notebook completes them before they are loaded."""
    return [*__all__, "__version__"]
