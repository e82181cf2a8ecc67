"""Do mixed widths by KL or by the Hessian, per token, beat one width at equal bytes on language models?

`python -m benchmarks.recipes_language [task ...]`: the recipes `kl-lm` and `hessian-lm` against `uniform` and our
default on the Penn Treebank, at two budgets, with nearest rounding and with GPTQ. Perplexity is of the exported file in
ONNX Runtime, on text that nothing was tuned on. Finished recipes are kept in `build/recipes`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

import fxquant
from benchmarks.arguments import asked
from benchmarks.recipes import BITS, COMMON, FOLDER, GPTQ, OTHERS, OWN, Row, rejected, solutions
from benchmarks.report_table import write
from benchmarks.task import Task, file_answers, torch_answers
from benchmarks.task_table import TASKS
from fxquant.core.storage import read_json, write_json

NAMES = ("ptb_lstm", "ptb_transformer")
CONTESTANTS = ("uniform", "kl-lm", "hessian-lm", "default")
WORDS = 10_000
"""Words of the validation text that are read."""


def rows_of(task: Task, name: str, folder: Path) -> Iterator[Row]:
    """Yield the rows of one contestant: scored once, then solved and rounded for each budget."""
    own = OTHERS.get(name, {"bits": BITS, "recipe": name})
    began = time.process_time()
    options = {**COMMON, **own, **task.options}
    scored = fxquant.quantize(task.model(), task.calibration(), None, progress=False, options=options)
    spent = time.process_time() - began
    for rounding in (OWN, GPTQ):
        for bits, chain, solved, seconds in solutions(scored, rounding):
            path = folder / f"{name}-{rounding}-{bits}.onnx"
            row: Row = {"network": task.name, "recipe": name, "budget, bits": bits, "rounding": chain}
            row |= {"which": rounding, "bytes": solved.to_onnx(path).bytes, **task.evaluate(file_answers(path), WORDS)}
            row |= {"average bits": solved.allocation.used["average_bits"], "processor s": round(spent + seconds, 1)}
            assert scored.scoring is not None
            passes = scored.sensitivity.evaluations / len(scored.scoring)
            yield row | {"passes": passes, "rejected": rejected(solved)}


def measure(task: Task) -> None:
    """Print the table and write the JSON of one task again after each contestant, those finished from their files."""
    folder = FOLDER / task.name
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"words": WORDS, "widths": BITS, "seed": 0, "threads": torch.get_num_threads()}
    rows: list[Row] = [{"network": task.name, "recipe": "float", **task.evaluate(torch_answers(task.model()), WORDS)}]
    for name in CONTESTANTS:
        path = folder / f"{name}.json"
        if not path.is_file():
            write_json(path, "recipe rows", 1, {"rows": list(rows_of(task, name, folder))})
        rows += read_json(path, "recipe rows", 1)["rows"]
        _ = write(f"recipes_{task.name}", rows, meta)


def main() -> None:
    """Measure the tasks that are named."""
    for name in asked(__doc__, "task", NAMES):
        measure(TASKS[name])


if __name__ == "__main__":
    main()
