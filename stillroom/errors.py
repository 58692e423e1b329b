"""Every exception that a caller of Stillroom may see.

    StillroomError
    ├── ConfigError            a recipe or an option is wrong: names the key and the nearest valid one
    ├── DataError              a record, file or data set cannot be used: names file, line and reason code
    │   └── NotEnoughData      too few records were accepted for the job
    ├── ParseError             text is not a tool call or specification: has `position`
    ├── ModelError             a model could not be opened or did not answer
    │   ├── ModelUnavailable   it may answer later (429, 5xx, connection lost); carries `retry_after_s`
    │   ├── ModelRefused       it will not answer this request (4xx, bad credentials); do not retry
    │   └── NotRecorded        a recorded teacher has no answer for this prompt
    ├── BudgetExceeded         the next paid call would pass the token or money budget
    ├── LicenseConflict        licence or terms of teacher or data forbid the run, and nobody acknowledged it
    ├── StorageError           an object store cannot be reached, refuses, or lacks what is asked for
    ├── ArtifactError          a stored result is missing, damaged or of another version
    └── CheckpointError
        └── CheckpointCorrupt  a committed checkpoint does not match its checksums

Each message says what happened, where, and what to do about it.
"""

from __future__ import annotations


class StillroomError(Exception):
    """Base of every error that Stillroom raises on purpose."""


class ConfigError(StillroomError):
    """A recipe or an option is wrong."""


class DataError(StillroomError):
    """A record, a file or a data set cannot be used."""


class NotEnoughData(DataError):
    """Too few records were accepted for the job."""


class ParseError(StillroomError):
    """Text could not be read as what it should be.

    Attributes:
        position: offset into the text, in characters, where reading stopped.
    """

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(f"{message} (at character {position})")
        self.position = position


class ModelError(StillroomError):
    """A model could not be opened, or did not answer."""


class ModelUnavailable(ModelError):
    """The model may answer later.

    Attributes:
        retry_after_s: seconds that the server asked to wait, or None.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelRefused(ModelError):
    """The model will not answer this request however often it is asked."""


class NotRecorded(ModelError):
    """A recorded teacher has no answer for this prompt."""


class BudgetExceeded(StillroomError):
    """The next paid call would pass the token or money budget."""


class LicenseConflict(StillroomError):
    """Licence or terms of teacher or data forbid the run, and the recipe does not acknowledge it."""


class StorageError(StillroomError):
    """An object store cannot be reached, refuses, or lacks what is asked for; or a URL is of no known kind."""


class ArtifactError(StillroomError):
    """A stored result is missing, damaged or of another version."""


class CheckpointError(StillroomError):
    """A checkpoint could not be written or read."""


class CheckpointCorrupt(CheckpointError):
    """A committed checkpoint does not match its checksums."""
