"""Runs small enough for tests: set up on the tiny model, run to their end, stopped halfway, gone on with."""

import json
from pathlib import Path

from deltaw.api import finetune
from deltaw.data.store import Rows
from deltaw.train.events import Evaluated, Finished, Stepped

ROOT = Path(__file__).parents[1]
"""Where a process finds the package, installed or not."""

ROW = {"messages": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "bbb"}]}
TRAIN = ("train", "rows.jsonl", "--base", "base", "--dtype", "float32", "--threads", "1")
"""A command for the folder that the fixture `here` makes."""


def write_rows(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def told(tiny_path, tmp_path, **settings):
    """Settings of a small run in float32; `name` is the run's."""
    return {"base": str(tiny_path), "runs": str(tmp_path / "runs"), "dtype": "float32", "threads": 1, "name": "run",
            "learning_rate": 0.01, **settings}  # fmt: skip


def stored(rows):
    """Encoded rows, in a store."""
    made = Rows()
    for row in rows:
        made.append(row)
    return made


def prepared(rows_file, values, stop=lambda: False):
    """A run that is ready to begin, and asks nothing, which would take most of its time."""
    made = finetune.prepare([str(rows_file)], values)
    made.job.question, made.job.stop = None, stop
    return made


def gone_on(folder, stop=lambda: False):
    """The run in this folder, ready to go on."""
    made = finetune.resume(folder.name, folder.parent)
    made.job.question, made.job.stop = None, stop
    return made


def stopping_at(micro_step):
    """A wish to stop that is said at the micro-step of this number, counted from 1."""
    asked = iter(range(1, 10**9))
    return lambda: next(asked) == micro_step


def losses(events):
    """What was measured: training losses by step, then validation losses by step."""
    return ([(e.step, e.loss) for e in events if isinstance(e, Stepped)],
            [(e.step, e.loss, e.best) for e in events if isinstance(e, Evaluated)])  # fmt: skip


def end(events):
    """The last event, which says how the run ended."""
    assert isinstance(events[-1], Finished)
    return events[-1]


def write_contrary(folder):
    """Validation rows with answers that the rows of `rows_file` teach the model not to give: soon it gets no better."""
    file = folder / "contrary.jsonl"
    rows = [{"prompt": f"say {i}", "completion": "zyxwvu"[i] * 3} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
