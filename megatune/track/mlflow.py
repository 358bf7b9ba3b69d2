"""MLflow. Without a tracking server (`tracking_uri` or MLFLOW_TRACKING_URI) into `<folder>/mlruns`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatune.errors import ConfigError
from megatune.track.base import RunIds, need, public, tags

_OPTIONS = ("tracking_uri", "experiment", "run_name")
_PARAMETERS_AT_ONCE = 100  # a limit of the service's REST API
_LONGEST_VALUE = 500


class MLflow:
    """`options`: any of tracking_uri, experiment, run_name. A resumed run goes on in the same MLflow run."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        unknown = sorted(options.keys() - set(_OPTIONS))
        if unknown:
            raise ConfigError(f"track.mlflow: {unknown[0]} is unknown; use {', '.join(_OPTIONS)}")
        self._mlflow = need("mlflow", "mlflow")
        self._folder = folder
        self._options = options
        self._started = False

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        ids = RunIds(self._folder)
        earlier = ids.get("mlflow") if resumed_step else None
        uri = self._options.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # Newer versions want a database, which mlflow-skinny has not, unless they are told that files are meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (self._folder / "mlruns").absolute().as_uri()
        try:
            self._mlflow.set_tracking_uri(uri)
            self._mlflow.set_experiment(self._options.get("experiment") or "megatune")
            run = self._mlflow.start_run(run_id=earlier, run_name=self._options.get("run_name"))
            if not earlier:  # parameters of a run cannot be changed
                values = list(_flat(public(config)).items())
                for i in range(0, len(values), _PARAMETERS_AT_ONCE):
                    self._mlflow.log_params(dict(values[i : i + _PARAMETERS_AT_ONCE]))
        except Exception as error:  # its own classes, requests' and the file system's
            raise ConfigError(
                f"track.mlflow: no run could be started at {uri} ({error}); check tracking_uri and the server"
            ) from error
        self._started = True
        ids.put("mlflow", run.info.run_id)

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        self._mlflow.log_metrics(tags(metrics), step=step)

    def close(self) -> None:
        if self._started:
            self._mlflow.end_run()


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` -> `{"a.b": "1"}`."""
    if not isinstance(value, dict):
        return {prefix: str(value)[:_LONGEST_VALUE]}
    found: dict[str, str] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found
