"""The errors of kprobe, and what each means to whoever ran the command.

A message says what happened, with which value, and what to do about it. The command line turns `exit_code`
into the process's exit status (1 the tool failed, 2 wrong usage or bad input).
"""

__all__ = [
    "CapabilityError",
    "CaptureFormatError",
    "ConfigError",
    "FrameError",
    "InputError",
    "KprobeError",
    "ProbeError",
    "StoreError",
]


class KprobeError(Exception):
    """Base of all errors that kprobe raises on purpose."""

    exit_code = 1


class ConfigError(KprobeError):
    """A setting is missing, malformed or contradicts another one."""

    exit_code = 2


class InputError(KprobeError):
    """A file or argument that the user gave cannot be used as it is."""

    exit_code = 2


class CaptureFormatError(InputError):
    """A capture file is not one of ours, or of a version that this kprobe does not know."""


class FrameError(KprobeError):
    """Bytes that should be one frame (see `events.frames`) are not: truncated, corrupt or of an unknown schema."""


class ProbeError(KprobeError):
    """The kernel side could not be set up, or failed while recording."""


class CapabilityError(ProbeError):
    """This kernel or this user lacks something the probe cannot do without (root, BTF, tracefs)."""


class StoreError(KprobeError):
    """A server (Kafka, ClickHouse, Neo4j) is unreachable or refused what was asked."""
