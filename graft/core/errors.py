"""Every error that GRAFT raises on purpose.

    GraftError
    ├── ConfigError            (ValueError)    a recipe, a flag or a setting is wrong         exit 2
    ├── DataError              (ValueError)    a data file or a row is wrong                  exit 2
    ├── AdapterError           (ValueError)    an adapter or a stored artifact is unusable    exit 2
    ├── ModelError             (ValueError)    a base model is missing, damaged or unsuitable exit 2
    ├── MissingDependencyError (ImportError)   an optional package is not installed           exit 2
    ├── GateRefusedError       (RuntimeError)  a parity or quality gate said no               exit 3
    ├── TrainingError          (RuntimeError)  a run broke: NaN, lost worker, bad checkpoint  exit 1
    │   ├── DeviceMemoryError                  a run needed more memory than its device has   exit 1
    │   └── NoRoomError                        others hold the memory or the cores it needs   exit 1
    ├── StoppedError           (RuntimeError)  a person ended the search from outside       exit 130
    ├── CompressionError       (RuntimeError)  a compressor could not keep its promise        exit 1
    └── ServingError           (RuntimeError)  an engine, a replica or the gateway failed     exit 1

A message says what was given, what was expected and what to do. No class takes arguments beyond the
message, so that each one survives pickling between processes.
"""

from __future__ import annotations

from typing import ClassVar


class GraftError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 1


class ConfigError(GraftError, ValueError):
    """A recipe, an override or a setting is wrong."""

    exit_code = 2


class DataError(GraftError, ValueError):
    """A data file, a row or a label mask is wrong."""

    exit_code = 2


class AdapterError(GraftError, ValueError):
    """An adapter or a stored artifact is missing, damaged or does not fit."""

    exit_code = 2


class ModelError(GraftError, ValueError):
    """A base model is missing, damaged or unsuitable."""

    exit_code = 2


class MissingDependencyError(GraftError, ImportError):
    """An optional package is needed and is not installed."""

    exit_code = 2


class GateRefusedError(GraftError, RuntimeError):
    """A parity or quality gate refused a candidate."""

    exit_code = 3


class TrainingError(GraftError, RuntimeError):
    """A training run broke."""


class DeviceMemoryError(TrainingError):
    """A run needed more memory than its device has."""


class NoRoomError(TrainingError):
    """Others hold the memory, disk or cores that a run needs; once they are free it goes on."""


class StoppedError(GraftError, RuntimeError):
    """A person ended a search from another process, as an interrupt would; it can go on."""

    exit_code = 130


class CompressionError(GraftError, RuntimeError):
    """A compressor could not keep its promise."""


class ServingError(GraftError, RuntimeError):
    """An engine, a replica or the gateway failed."""
