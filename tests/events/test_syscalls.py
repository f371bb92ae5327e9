"""The table of system calls agrees with the C library's own header, where there is one."""

import re
from pathlib import Path

import pytest

from events.syscalls import NAMES, NUMBERS

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.mark.parametrize(
    ("name", "nr"),
    [("read", 0), ("futex", 202), ("rseq", 334), ("pidfd_send_signal", 424), ("clone3", 435)],
)
def test_landmarks(name, nr):
    assert (NUMBERS[name], NAMES[nr]) == (nr, name)


@pytest.mark.skipif(not HEADER.exists(), reason="needs the C library's headers: apt-get install libc6-dev")
def test_the_table_agrees_with_the_c_librarys_header():
    defined = {name: int(nr) for name, nr in re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text())}

    assert defined.items() <= NUMBERS.items()
