"""The seven semantic textual similarity tasks in SentEval's file layout, scored as the papers score them."""

from hicl_fast.evaluation.scoring import Encode, average, evaluate, score_task, spearman, table
from hicl_fast.evaluation.senteval import TASKS, Task, find_root, read_task

__all__ = [
    "TASKS",
    "Encode",
    "Task",
    "average",
    "evaluate",
    "find_root",
    "read_task",
    "score_task",
    "spearman",
    "table",
]
