#!/usr/bin/env python3
"""Measure what the command that runs a study costs by itself, while its runs train.

The memory and the CPU time of the process of ``latentplan study run`` are read every few seconds,
without those of the runs. They go to ``OUT.csv`` and, with a summary, to ``OUT.json``.

    tools/benchmarks/study_cost.py configs/study/tiny_100.yaml --out docs/results/study_100
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from latentplan.runs.provenance import commit, processor
from latentplan.study.matrix import jobs
from latentplan.study.study_file import read_study

MIB = 2**20


def sample(command: list[str], every: float) -> tuple[int, list[dict[str, float]]]:
    """Run a command. Returns its exit code, and a row of measurements every so many seconds."""
    rows: list[dict[str, float]] = []
    begin = time.monotonic()
    with subprocess.Popen(command) as process:
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            cpu = driver.cpu_times()
            rows.append(
                {
                    "seconds": round(time.monotonic() - begin, 1),
                    "rss_mib": round(driver.memory_info().rss / MIB, 1),
                    "cpu_seconds": round(cpu.user + cpu.system, 2),  # without ended children
                    "runs": len(driver.children()),
                }
            )
            time.sleep(every)
    return process.returncode, rows


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """How memory and CPU grow, from a line through the second half of the rows."""
    half = rows[len(rows) // 2 :]
    hours = np.array([row["seconds"] for row in half]) / 3600
    memory, cpu = (np.array([row[key] for row in half]) for key in ("rss_mib", "cpu_seconds"))
    return {
        "minutes": round(rows[-1]["seconds"] / 60, 1),
        "rss_mib_begin": rows[len(rows) // 10]["rss_mib"],
        "rss_mib_end": rows[-1]["rss_mib"],
        "rss_mib_largest": max(row["rss_mib"] for row in rows),
        "rss_mib_per_hour": round(float(np.polyfit(hours, memory, 1)[0]), 1),
        "cpu_share": round(float(np.polyfit(hours * 3600, cpu, 1)[0]), 4),  # of one core
    }


def main() -> int:
    """Run the study, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a study file")
    parser.add_argument("--out", type=Path, required=True, help="path of the files without suffix")
    parser.add_argument("--every", type=float, default=5.0, help="seconds; default: 5")
    args = parser.parse_args()
    command = ["latentplan", "study", "run", str(args.file)]
    begun_with = commit()  # before this writes files
    code, rows = sample([sys.executable, "-m", *command], args.every)
    matrix = jobs(read_study(args.file), args.file)
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    result = {
        "command": " ".join(command),
        "commit": begun_with,
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "runs": len(matrix),
        "runs_done": sum(job.done() for job in matrix),
        "exit_code": code,
        **summary(rows),
    }
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
