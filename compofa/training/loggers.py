"""Experiment trackers that a run can log to, beside TensorBoard: Weights & Biases and MLflow.

Nothing is sent anywhere unless the environment says so: Weights & Biases runs offline unless
``WANDB_MODE`` is set, and MLflow writes to the working directory unless ``MLFLOW_TRACKING_URI`` is.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from compofa.errors import CompofaError, ConfigError
from compofa.io.atomic import write_text_atomic
from compofa.io.untrusted import parse_json, read_text
from compofa.training.config import TrainConfig

log = logging.getLogger(__name__)

PROJECT = "compofa"
LOGGED = "loggers.json"
"""The id that a phase has with each tracker, under which a resumed phase is continued."""


class Writer(Protocol):
    """What metrics are written to."""

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Add the metrics of an epoch.

        Args:
            metrics: Numbers by name, such as ``train/loss``.
            step: Steps up to its end.
        """

    def close(self) -> None:
        """Write what is left."""


class Tracker(Writer, Protocol):
    """A :class:`Writer` to a run of an experiment tracker.

    Attributes:
        id: Id of the run.
    """

    id: str

    def __init__(self, module: Any, id_: str | None, config: TrainConfig, folder: Path) -> None:
        """Continue the run ``id_`` of the package ``module``, or start one if it is ``None``."""

    @staticmethod
    def errors(module: Any) -> tuple[type[Exception], ...]:
        """Return the errors that it raises."""


def require_logger(name: str) -> None:
    """Check that the package of a tracker is installed, before anything is written.

    Raises:
        ConfigError: It is not.
    """
    if name in LOGGERS and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"--logger: expected the package {name}, which is not installed: "
            f"pip install 'compofa[{name}]', or pip install {name}"
        )


def open_loggers(config: TrainConfig, folder: Path) -> list[Writer]:
    """Return the tracker of ``config.logger``, if any, in a list.

    Args:
        config: Resolved settings, which are logged as well.
        folder: Folder of the phase.

    Raises:
        CompofaError: The tracker cannot be started.
    """
    if config.logger not in LOGGERS:
        return []
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    return [_Guarded(LOGGERS[config.logger], config, folder)]


class _Guarded:
    """A tracker that is closed at its first error: training goes on without it.

    Args:
        tracker: Its class.
        config: Resolved settings.
        folder: Folder of the phase.

    Raises:
        CompofaError: It cannot be started.
    """

    def __init__(self, tracker: type[Tracker], config: TrainConfig, folder: Path) -> None:
        name = config.logger
        module = importlib.import_module(name)
        self.name, self.errors = name, (OSError, ValueError, *tracker.errors(module))
        known = _ids(folder)
        try:
            self.tracker: Tracker | None = tracker(module, known.get(name), config, folder)
        except self.errors as error:
            raise CompofaError(f"--logger {name}: expected a run to log to, got {error}") from error
        ids = json.dumps({**known, name: self.tracker.id}) + "\n"
        write_text_atomic(folder / LOGGED, ids)

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Add the metrics of an epoch."""
        self._call(lambda tracker: tracker.add(metrics, step))

    def close(self) -> None:
        """Write what is left."""
        self._call(lambda tracker: tracker.close())

    def _call(self, call: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            call(self.tracker)
        except self.errors as error:
            reason = " ".join(str(error).split())
            log.warning("--logger %s: nothing more is logged to it, after: %s", self.name, reason)
            self.tracker = None


class WandB:
    """A run of Weights & Biases."""

    def __init__(self, wandb: Any, id_: str | None, config: TrainConfig, folder: Path) -> None:
        self.id = id_ or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.id,
            resume="allow",
            name=_run_name(folder),
            dir=str(folder),
            config=config.to_json(),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )
        self._run.define_metric("step")  # not its own count of steps, which may only grow:
        self._run.define_metric("*", step_metric="step")  # a resumed run repeats an epoch

    @staticmethod
    def errors(wandb: Any) -> tuple[type[Exception], ...]:
        """Return the errors that it raises."""
        return (wandb.errors.Error,)

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Add the metrics of an epoch."""
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


class MLflow:
    """A run of MLflow."""

    def __init__(self, mlflow: Any, id_: str | None, config: TrainConfig, folder: Path) -> None:
        self._client = mlflow.MlflowClient()
        if id_ is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            run = self._client.create_run(experiment, run_name=_run_name(folder))
            id_ = run.info.run_id
            for key, value in config.to_json().items():
                self._client.log_param(id_, key, value)
        else:
            self._client.update_run(id_, status="RUNNING")
        self.id = id_

    @staticmethod
    def errors(mlflow: Any) -> tuple[type[Exception], ...]:
        """Return the errors that it raises."""
        return (mlflow.exceptions.MlflowException,)

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Add the metrics of an epoch."""
        for name, value in metrics.items():
            self._client.log_metric(self.id, name, value, step=step)

    def close(self) -> None:
        """Write what is left."""
        self._client.set_terminated(self.id)


LOGGERS: dict[str, type[Tracker]] = {"wandb": WandB, "mlflow": MLflow}
"""Trackers by the name of their package, the value of ``--logger``."""
_QUIET = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""Environment variables, set unless the user did, that keep the packages from reporting home."""


def _run_name(folder: Path) -> str:
    """Return the name of a phase's run, such as ``digits-compofa-small/teacher``."""
    return "/".join(folder.absolute().parts[-2:])


def _ids(folder: Path) -> dict[str, str]:
    """Return the ids in a phase's folder; none if the file is missing or damaged."""
    path = folder / LOGGED
    try:
        data = parse_json(read_text(path)) if path.is_file() else {}
    except (OSError, ValueError):
        data = {}
    ids = data.items() if isinstance(data, dict) else ()
    return {name: id_ for name, id_ in ids if isinstance(id_, str)}
