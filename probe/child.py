"""A command that waits to be let go: so that it can be watched from before its first instruction.

`PausedChild` forks a process that holds still before its exec. Its pid is known, the probe attaches to it, and `release` lets
it become the command. It shares stdin, stdout, stderr, the terminal and the process group with us, as if we were not there;
signal dispositions that Python changed are put back. If we die or give up before the release it ends without running anything.
"""

import os
import signal
import sys
from collections.abc import Sequence

from events.errors import InputError, ProbeError

__all__ = ["PausedChild"]

# Python ignores these two; a command started by a shell would not find them ignored.
_RESTORED = (signal.SIGPIPE, signal.SIGXFSZ)


class PausedChild:
    """One command, not yet begun."""

    def __init__(self, command: Sequence[str]) -> None:
        if not command:
            raise InputError("no command given after --")
        self.command = list(command)
        self.status: int | None = None
        go_read, self._go = os.pipe2(os.O_CLOEXEC)
        self._failed, failed_write = os.pipe2(os.O_CLOEXEC)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go)
            os.close(self._failed)
            _become(self.command, go_read, failed_write)
        os.close(go_read)
        os.close(failed_write)

    def release(self) -> None:
        """Let it begin. Raises InputError if the command cannot be executed."""
        os.write(self._go, b"g")
        failed = os.read(self._failed, 16)  # ends with the exec, which closes the other end
        self._close()
        if failed:
            os.waitpid(self.pid, 0)
            raise InputError(f"cannot run {self.command[0]!r}: {os.strerror(int(failed))}")

    def abandon(self) -> None:
        """End it without having run anything; no-op once it was released."""
        if self._go >= 0:
            self._close()
            os.waitpid(self.pid, 0)

    def poll(self) -> int | None:
        """Its exit status as a shell would say it (128 + N for signal N), or None while it runs."""
        if self.status is None:
            self._reap(os.WNOHANG)
        return self.status

    def wait(self) -> int:
        """Its exit status, when it has ended."""
        while self.status is None:
            self._reap(0)
        return self.status

    def send_signal(self, number: int) -> None:
        """Pass a signal on, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _close(self) -> None:
        os.close(self._go)
        os.close(self._failed)
        self._go = self._failed = -1

    def _reap(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError as error:
            raise ProbeError(f"the exit status of {self.command[0]!r} (pid {self.pid}) was taken by someone else") from error
        if pid:
            code = os.waitstatus_to_exitcode(status)
            self.status = 128 - code if code < 0 else code


def _become(command: list[str], go: int, failed: int) -> None:
    """In the child: wait, then exec; never returns."""
    code = 127
    try:
        if os.read(go, 1):
            for number in _RESTORED:
                signal.signal(number, signal.SIG_DFL)
            os.execvp(command[0], command)
    except OSError as error:
        os.write(failed, str(error.errno).encode())
    finally:
        os._exit(code)
