"""Optional receivers of metrics besides the run folder: Weights & Biases, and MLflow.

``log.sinks`` names those of a run. The packages are extras of this one, and each is imported only
where its sink is used. No sink can end a run: one that fails gives one warning, and gets no more
metrics in that session.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from latentplan.config.loading import flatten
from latentplan.config.schema import SINKS, Config
from latentplan.runs.session_record import write_text
from latentplan.types import UserError

log = logging.getLogger("latentplan")
PROJECT = "latentplan"  # of W&B, and the experiment of MLflow
WANDB_FINISH_SECONDS = 60  # how long the end of a session waits for uploads
MLFLOW_REQUEST = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
PARAMETERS_PER_CALL = 100  # a limit of MLflow's servers


class Sink(Protocol):
    """A receiver of metrics."""

    def scalars(self, values: Mapping[str, float], frame: int) -> None:
        """Receive finite values by name, at an environment frame."""

    def close(self) -> None:
        """End the session."""


class WandbSink:
    """Sends metrics to a run of Weights & Biases, and the configuration as its config.

    A resumed run goes on with the same W&B run, whose id is in ``wandb_id``. ``WANDB_PROJECT`` and
    the other variables of W&B's own apply, for example ``WANDB_MODE=offline``. The horizontal axis
    is the metric ``frame``, since W&B ignores steps that go back, as those after a crash do.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        if Path.cwd().is_relative_to(folder.resolve()):
            raise UserError(
                "W&B would read its settings from the run folder, which may be from elsewhere: "
                "start training in another working folder."
            )
        saved = _read_id(folder / "wandb_id", r"[0-9a-f]{16}")
        run_id = saved or secrets.token_hex(8)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.resolve().name,
            id=run_id,
            resume="allow",
            dir=folder,
            config=flatten(asdict(config)),
            allow_val_change=True,  # of keys that may change when a run continues
            settings=wandb.Settings(console="off", finish_timeout=WANDB_FINISH_SECONDS),
        )
        self._run.define_metric("*", step_metric="frame")
        if saved is None:
            write_text(folder / "wandb_id", f"{run_id}\n")

    def scalars(self, values: Mapping[str, float], frame: int) -> None:
        """Log a row. W&B sends it from a process of its own."""
        self._run.log({"frame": frame, **values})

    def close(self) -> None:
        """Wait for the uploads, at most ``WANDB_FINISH_SECONDS``."""
        self._run.finish()


class MlflowSink:
    """Sends metrics to a run of MLflow, and the configuration as its parameters.

    A resumed run goes on with the same MLflow run, whose id is in ``mlflow_id``. MLflow's variables
    ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say where it is.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        import mlflow

        # With MLflow's own values, a server that does not answer would hold up training for long.
        for name, value in MLFLOW_REQUEST.items():
            os.environ.setdefault(name, value)
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        saved = _read_id(folder / "mlflow_id", r"[0-9a-f]{32}")
        if saved is not None and self._exists(saved, mlflow.MlflowException):
            self._run_id = saved
            self._client.update_run(saved, status="RUNNING")
            return  # MLflow's parameters cannot change
        self._run_id = self._create(folder)
        parameters = [
            mlflow.entities.Param(key, str(value)) for key, value in flatten(asdict(config)).items()
        ]
        for begin in range(0, len(parameters), PARAMETERS_PER_CALL):
            some = parameters[begin : begin + PARAMETERS_PER_CALL]
            self._client.log_batch(self._run_id, params=some)

    def _exists(self, run_id: str, kind: type[Exception]) -> bool:
        try:
            self._client.get_run(run_id)
        except kind as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("MLflow has no run %s any more: a new one is started.", run_id)
            return False
        return True

    def _create(self, folder: Path) -> str:
        """Create a run in the experiment. Returns its id."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._client.create_run(number, run_name=folder.resolve().name)
        write_text(folder / "mlflow_id", f"{run.info.run_id}\n")
        return str(run.info.run_id)

    def scalars(self, values: Mapping[str, float], frame: int) -> None:
        """Log a row, and wait until it has arrived."""
        now = round(time.time() * 1000)  # milliseconds
        metrics = [self._metric(name, value, now, frame) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)


KINDS: dict[str, type[WandbSink] | type[MlflowSink]] = dict(
    zip(SINKS, (WandbSink, MlflowSink), strict=True)
)


class Sinks:
    """The sinks of a session.

    Args:
        names: keys of ``KINDS``.
        folder: the run folder, which keeps the ids of the runs.
        config: the configuration of the run.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Config) -> None:
        self._sinks: dict[str, Sink] = {}
        for name in names:
            with self._guarded(name):
                self._sinks[name] = KINDS[name](folder, config)

    def scalars(self, values: Mapping[str, float], frame: int) -> None:
        """Send a row of metrics to every sink. Values that are not finite are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink.scalars(finite, frame)

    def close(self) -> None:
        """Close every sink."""
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink.close()
        self._sinks.clear()

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        # These packages and the network behind them fail in many ways, and none may end a run.
        except Exception as error:
            self._sinks.pop(name, None)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning(
                "%s gets no more metrics in this session, which goes on: %s", name, reason[0]
            )


def check_installed(names: Sequence[str]) -> None:
    """Check, before a session begins, that the packages of its sinks are installed.

    Raises:
        UserError: one is missing. The message names the extra that has it.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        # A folder of that name, such as the one W&B makes, is found as a package without a file.
        if spec is None or spec.origin is None:
            raise UserError(
                f"log.sinks={name} needs a package: pip install 'latentplan[{name}]', or train "
                "without it (log.sinks=)."
            )


def _read_id(path: Path, pattern: str) -> str | None:
    """The id of a run that an earlier session wrote; None, with a warning, if it is damaged."""
    if not path.exists():
        return None
    text = ""
    if path.is_file():  # reading a pipe, for example, would not end
        with path.open("rb") as file:
            text = file.read(100).decode(errors="replace").strip()
    if re.fullmatch(pattern, text):
        return text
    log.warning("%s does not hold the id of a run: a new run is started.", path)
    return None
