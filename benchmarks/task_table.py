"""TASKS: every task that `benchmarks.tasks` measures; a new one is a row in one of the tables it is made of."""

from __future__ import annotations

from benchmarks.language_tasks import LANGUAGE
from benchmarks.task import Task
from benchmarks.vision_tasks import VISION

TASKS: dict[str, Task] = {task.name: task for task in (*VISION, *LANGUAGE)}
