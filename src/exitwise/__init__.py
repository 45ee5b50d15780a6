"""At which layer may this vision-language model stop looking at the image, and still be safe?

The public API. Names are loaded when first used, so that `import exitwise` and `exitwise --help` stay quick.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .align_config import AlignConfig
    from .audit import audit
    from .compare import compare_runs
    from .config import AuditConfig, RewardConfig, SlimConfig
    from .costs import exit_costs
    from .errors import UserError
    from .exit_names import parse_exits
    from .exits import encode, exit_at, exit_features
    from .inspection import inspect_checkpoint
    from .judges import judge_run
    from .judges.vqa_v2 import vqa_accuracy
    from .metrics import compute_metrics
    from .records import Completion, Sample, Score, Verdict
    from .report import write_report
    from .reward_training import train_reward
    from .rewards import load_reward
    from .score_metrics import mean_score, score_table
    from .scorers import make_scorer, score_run
    from .slim import slim
    from .vlm import Vlm, describe, load_vlm

_HOME = {
    "AlignConfig": "align_config",
    "AuditConfig": "config",
    "RewardConfig": "config",
    "SlimConfig": "config",
    "audit": "audit",
    "compare_runs": "compare",
    "UserError": "errors",
    "exit_costs": "costs",
    "encode": "exits",
    "exit_at": "exits",
    "exit_features": "exits",
    "parse_exits": "exit_names",
    "inspect_checkpoint": "inspection",
    "judge_run": "judges",
    "compute_metrics": "metrics",
    "Completion": "records",
    "Sample": "records",
    "Score": "records",
    "Verdict": "records",
    "write_report": "report",
    "make_scorer": "scorers",
    "score_run": "scorers",
    "mean_score": "score_metrics",
    "score_table": "score_metrics",
    "vqa_accuracy": "judges.vqa_v2",
    "slim": "slim",
    "train_reward": "reward_training",
    "load_reward": "rewards",
    "Vlm": "vlm",
    "describe": "vlm",
    "load_vlm": "vlm",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'exitwise' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `exitwise.audit` the function: importing the module of that name would put itself in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
