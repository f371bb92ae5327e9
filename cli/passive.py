"""The passive recorder's commands: `kprobe replay record --passive` and `kprobe replay import`.

The probe records, `replay.passive` makes the recording of what it captured. The capture stays in the recording folder
(`capture.kcap`): the kernel's events of the same run, for `kprobe analyze` and for the level F0.
"""

import sys
from pathlib import Path

from events.errors import InputError

__all__ = ["import_capture", "record_passive"]


def record_passive(command: list[str], folder: Path) -> int:
    """Record a command with BPF into a recording folder; returns the command's exit status."""
    from cli.record import record_payload

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot make the recording folder {folder}: {error.strerror}") from error
    if taken:
        raise InputError(f"{folder} is not empty: name a new folder, so that no recording is overwritten")
    folder.chmod(0o700)
    status = record_payload(folder / "capture.kcap", command)
    import_capture(folder / "capture.kcap", folder)
    return status


def import_capture(capture: Path, folder: Path) -> int:
    """Make a recording of a capture; tells its level and why it is not higher. Returns 0, or 3 if it is F0."""
    from probe.capture import CaptureReader
    from replay.passive import import_frames

    with CaptureReader(capture) as reader:
        meta = import_frames(reader.frames(), folder)
        damage = list(reader.damage)
    for line in damage:
        print(f"kprobe: {capture}: {line}", file=sys.stderr)
    print(f"kprobe: {folder}: level {meta['fidelity']}, {meta['calls']} calls, {meta['threads']} threads", file=sys.stderr)
    for reason in meta["refused"]:
        print(f"kprobe: cannot be replayed as a program: {reason}", file=sys.stderr)
    return 3 if meta["refused"] else 0
