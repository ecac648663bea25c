"""The errors a user can meet. Each carries the exit code of the command line.

A leaf: every room may import it, and it imports nothing. The message is one line that says what
was seen, what was wanted and what to try.
"""


class LowVRAMError(Exception):
    """Base of every error raised on purpose. The command line prints it as one line."""

    exit_code = 1


class UsageError(LowVRAMError, ValueError):
    """An argument that is wrong in itself: an unknown voice, a size that is no size."""

    exit_code = 2


class DeviceError(LowVRAMError):
    """The device asked for is known but cannot be used on this machine."""

    exit_code = 2


class CheckpointError(LowVRAMError):
    """A model folder or file that is missing, damaged, or of a kind that cannot be read."""


class MediaError(LowVRAMError):
    """An image, recording or video that is missing, damaged, or lacks the track asked for."""


class DoesNotFitError(LowVRAMError):
    """The request cannot run within the budget; raised before anything is loaded.

    `plan` is the refused plan (`fits` is False): it names the phase, the bytes and the smallest
    budget that would do.
    """

    exit_code = 3

    def __init__(self, message: str, plan: object | None = None) -> None:
        super().__init__(message)
        self.plan = plan
