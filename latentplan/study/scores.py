"""``latentplan scores``: returns of runs in the forms that plotting scripts of the field read.

``dreamerv3``
    A list of ``{"task", "method", "seed", "xs", "ys"}``, as in the files ``scores/*.json.gz`` of
    danijar/dreamerv3, which its ``scores/view.py`` reads (and ``scores/plot.py`` at commit
    423291a). Or a folder with a file ``latentplan-TASK-METHOD-SEED/scores.jsonl`` per run and lines
    ``{"step", "episode/score"}``, which its ``plot.py`` reads, and ``dreamerv3/main.py`` writes.
``tdmpc2``
    A file per task with the columns ``step,reward,seed``, as in ``results/tdmpc2/*.csv`` of
    nicklashansen/tdmpc2.
``csv``
    One table with a row per line of ``metrics.jsonl`` that has a return, and a column per return.

All of them count environment frames: the simulator's steps, ``env.repeat`` of them per decision.
The forms are written from those files; no code of these projects is used.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from latentplan.runs.session_record import write_text
from latentplan.study.learning_curves import METRICS, Curve, Run, read_runs
from latentplan.types import UserError

log = logging.getLogger("latentplan")
DEFAULT_METRIC = {"dreamerv3": "train", "tdmpc2": "eval", "csv": ""}  # by format; empty: all
SETTINGS = ("task", "obs", "size", "ablation", "seed")
CSV_COLUMNS = ("run", *SETTINGS, "repeat", "frame", "seconds", *METRICS)
ABSENT = {
    "train": "no finished training episode",
    "eval": "no evaluation",
    "sample": "no evaluation of the sampled policy",
    "planner": "no evaluation of the planner",
}
Scores = list[tuple[Run, Curve]]


def scores(
    folders: Sequence[Path], form: str, out: Path | None, *, metric: str = "", method: str = ""
) -> str:
    """Write the returns of runs.

    Args:
        folders: run folders.
        form: a key of ``DEFAULT_METRIC``.
        out: a file, or a folder where the format has several files; None: none is written.
        metric: a key of ``METRICS``; empty: that of the format.
        method: the name of the method; empty: the ablation of each run.

    Returns:
        The content if ``out`` is None, else the paths of the files, one a line.

    Raises:
        UserError: a folder holds no run, no run has such a return, the format cannot tell two runs
            apart, or a file cannot be written.
    """
    runs = read_runs(folders)
    if form == "csv":
        if metric or method:
            raise UserError("--metric and --method do not work with csv, which has all returns.")
        files = {"": _table(CSV_COLUMNS, _all_returns(runs))}
    else:
        chosen = _with_values(runs, metric or DEFAULT_METRIC[form])
        _check_distinct(chosen, method)
        files = _WRITERS[form](chosen, method, out)
    if out is None:
        return files[""]
    paths = [out / name if name else out for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        _write(path, text)
    return "\n".join(map(str, paths))


def _with_values(runs: Sequence[Run], metric: str) -> Scores:
    """The curve of every run. A warning names each run that has none, which is left out."""
    curves = [(run, run.curve(METRICS[metric])) for run in runs]
    missing = [run for run, curve in curves if not curve.frames.size]
    _check_some(runs, missing, metric)
    return [(run, curve) for run, curve in curves if curve.frames.size]


def _all_returns(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of the table: all that have a return. A warning names runs without evaluation."""
    missing = [run for run in runs if not run.curve(METRICS["eval"]).frames.size]
    _check_some(runs, [run for run in missing if not run.curve(METRICS["train"]).frames.size], "")
    for run in missing:
        log.warning("%s has no evaluation yet.", run.folder)
    table = []
    for run in runs:
        settings = {key: getattr(run.config, key) for key in SETTINGS}
        described = {"run": run.folder.name, **settings, "repeat": run.config.env.repeat}
        for row in run.rows:
            returns = {name: row.get(metric) for name, metric in METRICS.items()}
            if any(value is not None for value in returns.values()):
                at = {"frame": row["step"], "seconds": row.get("time")}
                table.append({**described, **at, **returns})
    return table


def _check_some(runs: Sequence[Run], missing: Sequence[Run], metric: str) -> None:
    """Warn about runs without a return, or raise a UserError if no run has one."""
    absent = ABSENT.get(metric, "neither an evaluation nor a finished training episode")
    if len(missing) == len(runs):
        names = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"{names}: there is {absent} yet.")
    for run in missing:
        log.warning("%s is left out: it has %s yet.", run.folder, absent)


def _check_distinct(chosen: Scores, method: str) -> None:
    """Raise a UserError if two runs have the same task, method and seed."""
    seen: dict[tuple[str, str, str, int], Path] = {}
    for run, _ in chosen:
        key = (*run.task, _method(run, method), run.config.seed)
        if key in seen:
            raise UserError(
                f"{seen[key]} and {run.folder} have the same task, method and seed: export them "
                "separately, each with its own --method NAME and --out."
            )
        seen[key] = run.folder


def _method(run: Run, method: str) -> str:
    ablation = run.config.ablation
    return _word(method or ("latentplan" if ablation == "none" else ablation))


def _word(text: str) -> str:
    """A text without characters that could leave a folder, or that separate words in names."""
    return re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")


def _task(run: Run) -> str:
    """The name of the task in both projects: ``cup`` stands for ``ball_in_cup``."""
    return _word(re.sub("^ball_in_cup", "cup", run.task[1]))


def _dreamerv3(chosen: Scores, method: str, out: Path | None) -> dict[str, str]:
    """The list for standard output or a ``.json`` or ``.json.gz`` file, else a file per run."""
    records = [
        {
            "task": f"{run.task[0]}_{_task(run)}",
            "method": _method(run, method),
            "seed": str(run.config.seed),
            "xs": curve.frames.tolist(),
            "ys": curve.values.tolist(),
        }
        for run, curve in chosen
    ]
    if out is None or out.name.endswith((".json", ".json.gz")):
        return {"": json.dumps(records) + "\n"}
    files = {}
    for record in records:
        # plot.py splits the name of the folder at its dashes, into four parts.
        folder = f"latentplan-{record['task']}-{record['method']}-{record['seed']}"
        lines = (
            json.dumps({"step": x, "episode/score": y}) + "\n"
            for x, y in zip(record["xs"], record["ys"], strict=True)
        )
        files[f"{folder}/scores.jsonl"] = "".join(lines)
    return files


def _tdmpc2(chosen: Scores, method: str, out: Path | None) -> dict[str, str]:
    """A table per task, which has no column for the method."""
    methods = {_method(run, method) for run, _ in chosen}
    if len(methods) > 1:
        raise UserError(
            f"A table of tdmpc2 has one method, but the runs have {', '.join(sorted(methods))}: "
            "export each into a folder of its own, or give all one name with --method."
        )
    tables: dict[str, list[dict[str, Any]]] = {}
    for run, curve in chosen:
        rows = tables.setdefault(f"{_task(run).replace('_', '-')}.csv", [])
        for frame, value in zip(*curve, strict=True):
            rows.append({"step": frame, "reward": f"{value:.6g}", "seed": run.config.seed})
    files = {name: _table(("step", "reward", "seed"), rows) for name, rows in tables.items()}
    if out is not None and out.suffix != ".csv":
        return files
    if len(files) > 1:
        raise UserError("The runs have several tasks, each with a file: give --out FOLDER.")
    return {"": next(iter(files.values()))}


_WRITERS = {"dreamerv3": _dreamerv3, "tdmpc2": _tdmpc2}


def _table(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    if path.suffix != ".gz":
        write_text(path, text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the time in its header, the same runs give the same file.
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
