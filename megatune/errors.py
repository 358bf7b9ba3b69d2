"""Errors that a user can mend.

Each carries one message that says what is wrong, where, and what to do about it. The command line prints that message
without a traceback and exits with code 2; anything that is not a `MegatuneError` is a bug and keeps its traceback.
"""


class MegatuneError(Exception):
    """Base of every error that a user can mend; the message is complete by itself."""


class ConfigError(MegatuneError):
    """A key or value of the configuration, or a combination of them, cannot be run."""


class DataError(MegatuneError):
    """A data file, row or chat template cannot be used; names the file and the line."""


class CheckpointError(MegatuneError):
    """A model folder or checkpoint is missing, incomplete or damaged."""


class ParallelError(MegatuneError):
    """A parallel layout does not fit the machine or the model; names the number to change."""


class TrainingError(MegatuneError):
    """The run itself cannot go on (loss not finite, a lost rank); names the step and what is safe."""
