"""Scorers: each gives an answer a number (toxicity, reward, accuracy), where a judge gives it a label.

perspective.py, detoxify.py, granite_hap.py    toxicity
reward.py                                      a reward model
vqa_v2.py                                      VQA-v2 accuracy
factory.py                                     a scorer by its name
run.py                                         applies scorers to a run
"""

from .factory import NAMES, make_scorer
from .run import score, score_run

__all__ = ["NAMES", "make_scorer", "score", "score_run"]
