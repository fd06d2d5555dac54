"""Errors a user can cause: each carries one line saying what was expected and what came."""


class CompofaError(Exception):
    """Base of every error that a command reports in one line, without a traceback."""


class SpaceError(CompofaError, ValueError):
    """A subnet, coupling or choice that does not fit a search space."""


class DataError(CompofaError):
    """A data set that is missing, empty, unknown or broken."""


class LoaderError(DataError):
    """Data-loading processes that could not be started, were lost, or cannot hand over batches."""


class CheckpointError(CompofaError):
    """A checkpoint or weights file that cannot be used."""


class ConfigError(CompofaError, ValueError):
    """Settings of a command that do not fit together."""


class TableError(CompofaError):
    """A latency table or measured data file that cannot be used."""


class SearchError(CompofaError):
    """A search that cannot give what was asked for."""


class TrainingError(CompofaError):
    """Training that went wrong: losses or gradients that are not finite, or gradients replaced."""


class BusyError(CompofaError):
    """An output that another process is writing."""


class StoppedError(CompofaError):
    """A run that was asked to end before its time.

    Attributes:
        status: Exit status: 128 and the number of the signal that asked.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class WorkerError(CompofaError):
    """Another worker of the run was lost, or did not answer in time."""


class OtherWorkerError(CompofaError):
    """Another worker of the run failed and says why: this one ends without a word."""
