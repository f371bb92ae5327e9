"""The model of every system call of x86-64: what it reads from and writes to memory, and how a replay serves it.

What: one line of a table per call. `model(nr)` gives its `Model`; a call without a line, or with class `refuse`, is not
modelled, and a recording that contains one says so by name and is refused by replay.

Classes: `emulate` served from the log; `block` the same, and recording may switch threads there; `real` run again in the
replay, result checked; `special` and `exec` handled by name in recorder and player (processes, mappings, programs);
`allow` never stopped, neither at recording nor at replay: its effect depends on the process's own memory and calls only;
`absent` answered ENOSYS in both (the caller falls back); `refuse`.

Regions: `N:LEN` is LEN bytes behind argument N; LEN is a number, `ret` (the result), `ret*K`, `aM` (value of argument M),
`aM*K`, `*M` (u32 behind argument M), or `str`. Named shapes (`iov`, `msg`, ...) have a function of their own below.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from events.syscalls import NAMES, NUMBERS

__all__ = [
    "MODELS", "Memory", "Model", "decode_call", "input_of", "model", "name_of", "output_regions", "passed_fds", "unknown",
]  # fmt: skip

RESTART_SYSCALL: Final = NUMBERS["restart_syscall"]
MAX_INPUT_BYTES: Final = 1 << 26
MAX_STRING_BYTES: Final = 4096
IOV_LIMIT: Final = 1024


class Memory(Protocol):
    """Reads a tracee's memory; short or empty where it is not mapped."""

    def read(self, address: int, length: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Model:
    """One call. `args`: a letter an argument: f fd, i 32-bit, l 64-bit, p pointer (never compared), s path."""

    nr: int
    name: str
    kind: str
    args: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


_TABLE: Final = """
read block fpl > 1:ret
write block fpl < 1:a2
open emulate sii < 0:str
close emulate f
stat emulate sp < 0:str > 1:144
fstat emulate fp > 1:144
lstat emulate sp < 0:str > 1:144
poll block pii < 0:a1*8 > 0:a1*8
lseek emulate fli
mmap special lliifl
mprotect allow
munmap allow
brk real l
rt_sigaction allow
rt_sigprocmask real ippl < 1:8
rt_sigreturn real -
restart_syscall block -
ioctl block fip < ioctl > ioctl
pread64 block fpll > 1:ret
pwrite64 block fpll < 1:a2
readv block fpi > iov
writev block fpi < iov
access emulate si < 0:str
pipe emulate p > 0:8
select block ipppp < 1:fds 2:fds 3:fds 4:16 > 1:fds 2:fds 3:fds 4:16
sched_yield block -
mremap special lllil
msync emulate lli
mincore emulate llp > 2:pages
madvise allow
shmget refuse
shmat refuse
shmctl refuse
dup emulate f
dup2 emulate ff
pause block -
nanosleep block pp < 0:16 >! 1:16
getitimer emulate ip > 1:32
alarm emulate i
setitimer emulate ipp < 1:32 > 2:32
getpid emulate -
sendfile block ffpl > 2:8
socket emulate iii
connect block fpi < 1:a2
accept block fpp > sockaddr1
sendto block fplipi < 1:a2 4:a5
recvfrom block fplipp > 1:ret sockaddr4
sendmsg block fpi < msg
recvmsg block fpi > msg
shutdown emulate fi
bind emulate fpi < 1:a2
listen emulate fi
getsockname emulate fpp > sockaddr1
getpeername emulate fpp > sockaddr1
socketpair emulate iiip > 3:8
setsockopt emulate fiipi < 3:a4
getsockopt emulate fiipp > sockopt
clone special lpppl
fork special -
vfork special -
execve exec spp < 0:str
exit special i
wait4 block ipip > 1:4 3:144
kill emulate ii
uname emulate p > 0:390
semget emulate iii
semop block ipi < 1:a2*6
semctl refuse
shmdt refuse
msgget emulate ii
msgsnd block ipli
msgrcv block iplii > 1:ret+8
msgctl refuse
fcntl block fil > fcntl
flock block fi
fsync block f
fdatasync block f
truncate emulate sl < 0:str
ftruncate emulate fl
getdents emulate fpi > 1:ret
getcwd emulate pl > 0:ret
chdir emulate s < 0:str
fchdir emulate f
rename emulate ss < 0:str 1:str
mkdir emulate si < 0:str
rmdir emulate s < 0:str
creat emulate si < 0:str
link emulate ss < 0:str 1:str
unlink emulate s < 0:str
symlink emulate ss < 0:str 1:str
readlink emulate spi < 0:str > 1:ret
chmod emulate si < 0:str
fchmod emulate fi
chown emulate sii < 0:str
fchown emulate fii
lchown emulate sii < 0:str
umask emulate i
gettimeofday emulate pp > 0:16 1:8
getrlimit emulate ip > 1:16
getrusage emulate ip > 1:144
sysinfo emulate p > 0:112
times emulate p > 0:32
ptrace refuse
getuid emulate -
syslog emulate ipi > 1:ret
getgid emulate -
setuid emulate i
setgid emulate i
geteuid emulate -
getegid emulate -
setpgid emulate ii
getppid emulate -
getpgrp emulate -
setsid emulate -
setreuid emulate ii
setregid emulate ii
getgroups emulate ip > 1:ret*4
setgroups emulate ip < 1:a0*4
setresuid emulate iii
getresuid emulate ppp > 0:4 1:4 2:4
setresgid emulate iii
getresgid emulate ppp > 0:4 1:4 2:4
getpgid emulate i
setfsuid emulate i
setfsgid emulate i
getsid emulate i
capget emulate pp > 0:8 1:24
capset emulate pp < 1:24
rt_sigpending emulate pl > 0:a1
rt_sigtimedwait block pppl < 0:a3 2:16 > 1:128
rt_sigqueueinfo emulate iip
rt_sigsuspend block pl < 0:a1
sigaltstack allow
utime emulate sp < 0:str 1:16
mknod emulate sil < 0:str
uselib refuse
personality emulate l
ustat refuse
statfs emulate sp < 0:str > 1:120
fstatfs emulate fp > 1:120
getpriority emulate ii
setpriority emulate iii
sched_setparam emulate ip
sched_getparam emulate ip > 1:4
sched_setscheduler emulate iip
sched_getscheduler emulate i
sched_get_priority_max emulate i
sched_get_priority_min emulate i
sched_rr_get_interval emulate ip > 1:16
mlock allow
munlock allow
mlockall allow
munlockall allow
vhangup emulate -
modify_ldt refuse
pivot_root emulate ss < 0:str 1:str
prctl special illll
arch_prctl allow
adjtimex emulate p > 0:208
setrlimit special ip < 1:16
chroot emulate s < 0:str
sync block -
acct emulate s
settimeofday emulate pp
mount emulate sssll
umount2 emulate si < 0:str
sethostname emulate pl < 0:a1
setdomainname emulate pl < 0:a1
gettid emulate -
readahead emulate fll
setxattr emulate sspli < 0:str 1:str 2:a3
lsetxattr emulate sspli < 0:str 1:str 2:a3
fsetxattr emulate fspli < 1:str 2:a3
getxattr emulate sspl < 0:str 1:str > 2:ret?a3
lgetxattr emulate sspl < 0:str 1:str > 2:ret?a3
fgetxattr emulate fspl < 1:str > 2:ret?a3
listxattr emulate spl < 0:str > 1:ret?a2
llistxattr emulate spl < 0:str > 1:ret?a2
flistxattr emulate fpl > 1:ret?a2
removexattr emulate ss < 0:str 1:str
lremovexattr emulate ss < 0:str 1:str
fremovexattr emulate fs < 1:str
tkill emulate ii
time emulate p > 0:8
futex block piippi > futex
sched_setaffinity special ilp
sched_getaffinity special ilp
set_thread_area refuse
get_thread_area refuse
io_setup absent
io_destroy absent
io_getevents absent
io_submit absent
io_cancel absent
epoll_create emulate i
remap_file_pages refuse
getdents64 emulate fpi > 1:ret
set_tid_address real p
semtimedop block ipip < 1:a2*6
fadvise64 emulate flli
timer_create emulate ipp > 2:4
timer_settime emulate iipp < 2:32 > 3:32
timer_gettime emulate ip > 1:32
timer_getoverrun emulate i
timer_delete emulate i
clock_settime emulate ip < 1:16
clock_gettime emulate ip > 1:16
clock_getres emulate ip > 1:16
clock_nanosleep block iipp < 2:16 >! 3:16
exit_group special i
epoll_wait block fpii > 1:ret*12
epoll_ctl emulate fifp < 3:12
tgkill emulate iii
utimes emulate sp < 0:str 1:32
mbind emulate plipll
set_mempolicy emulate ipl
get_mempolicy emulate ppllp > 0:4
mq_open emulate siip < 0:str
mq_unlink emulate s < 0:str
mq_timedsend block fplip < 1:a2
mq_timedreceive block fplpp > 1:ret 3:4
mq_notify refuse
mq_getsetattr emulate fpp > 2:64
waitid block iipip > 2:128 4:144
add_key emulate sspli
request_key emulate sssi
keyctl refuse
ioprio_set emulate iii
ioprio_get emulate ii
inotify_init emulate -
inotify_add_watch emulate fsi < 1:str
inotify_rm_watch emulate fi
openat emulate fsii < 1:str
mkdirat emulate fsi < 1:str
mknodat emulate fsil < 1:str
fchownat emulate fsiii < 1:str
futimesat emulate fsp < 1:str 2:32
newfstatat emulate fspi < 1:str > 2:144
unlinkat emulate fsi < 1:str
renameat emulate fsfs < 1:str 3:str
linkat emulate fsfsi < 1:str 3:str
symlinkat emulate sfs < 0:str 2:str
readlinkat emulate fspi < 1:str > 2:ret
fchmodat emulate fsi < 1:str
faccessat emulate fsi < 1:str
pselect6 block ippppp < 1:fds 2:fds 3:fds 4:16 > 1:fds 2:fds 3:fds 4:16
ppoll block pippl < 0:a1*8 2:16 > 0:a1*8 2:16
unshare emulate l
set_robust_list allow
get_robust_list allow
splice block fpfpli > 1:8 3:8
tee block ffli
sync_file_range emulate flli
vmsplice block fpii < iov
utimensat emulate fspi < 1:str 2:32
epoll_pwait block fpiipl > 1:ret*12
signalfd emulate fpl < 1:a2
timerfd_create emulate ii
eventfd emulate i
fallocate emulate fill
timerfd_settime emulate fipp < 2:32 > 3:32
timerfd_gettime emulate fp > 1:32
accept4 block fppi > sockaddr1
signalfd4 emulate fpli < 1:a2
eventfd2 emulate ii
epoll_create1 emulate i
dup3 emulate ffi
pipe2 emulate pi > 0:8
inotify_init1 emulate i
preadv block fpill > iov
pwritev block fpill < iov
rt_tgsigqueueinfo emulate iiip
perf_event_open absent
recvmmsg block fpiip > mmsg
fanotify_init refuse
fanotify_mark refuse
prlimit64 special iipp < 2:16 > 3:16
name_to_handle_at emulate fsppi < 1:str > handle 3:4
open_by_handle_at refuse
clock_adjtime emulate ip > 1:208
syncfs block f
sendmmsg block fpii < mmsg > mmsglen
setns emulate fi
getcpu emulate ppp > 0:4 1:4
process_vm_readv refuse
process_vm_writev refuse
kcmp emulate iiill
sched_setattr emulate ipi
sched_getattr emulate ipii > 1:a2
renameat2 emulate fsfsi < 1:str 3:str
seccomp special iip
getrandom block pli > 0:ret
memfd_create emulate si < 0:str
bpf absent
execveat exec fsppi < 1:str
userfaultfd absent
membarrier allow
mlock2 allow
copy_file_range block fpfpli > 1:8 3:8
preadv2 block fpilli > iov
pwritev2 block fpilli < iov
pkey_mprotect allow
pkey_alloc absent
pkey_free absent
statx emulate fsiip < 1:str > 4:256
io_pgetevents absent
rseq absent
pidfd_send_signal emulate fipi
io_uring_setup absent
io_uring_enter absent
io_uring_register absent
open_tree emulate fsi < 1:str
move_mount emulate fsfsi
fsopen emulate si
fsconfig emulate fispi
fsmount emulate fii
fspick emulate fsi
pidfd_open emulate ii
clone3 special pl
close_range emulate iii
openat2 emulate fspl < 1:str 2:a3
pidfd_getfd emulate fii
faccessat2 emulate fsii < 1:str
process_madvise emulate fplli
epoll_pwait2 block fpippl > 1:ret*12
mount_setattr emulate fsipl
landlock_create_ruleset emulate pli < 0:a1
landlock_add_rule emulate fipi
landlock_restrict_self emulate fi
memfd_secret absent
process_mrelease emulate fi
futex_waitv block piipi
set_mempolicy_home_node emulate llll
cachestat emulate fppi > 2:40
fchmodat2 emulate fsii < 1:str
map_shadow_stack absent
futex_wake block plli
futex_wait block pllipi
futex_requeue block piii
mseal allow
"""


def _parse(line: str) -> Model:
    head, _, rest = line.partition(" < ")
    if not rest:
        head, rest = line, ""
        for mark in (" >! ", " > "):
            if mark in line:
                head, _, tail = line.partition(mark)
                rest = mark[1:] + tail
                break
    inputs, outputs = rest, ""
    for mark in (">! ", "> "):
        if mark in rest:
            inputs, _, tail = rest.partition(mark)
            outputs = ("! " if "!" in mark else "") + tail
            break
    words = head.split()
    args = words[2].replace("-", "") if len(words) > 2 else ""
    return Model(NUMBERS[words[0]], words[0], words[1], args, tuple(inputs.split()), tuple(outputs.split()))


MODELS: Final[dict[int, Model]] = {m.nr: m for m in map(_parse, _TABLE.strip().splitlines())}


def model(nr: int) -> Model | None:
    """The model of a call, or None for one that this kprobe does not know."""
    return MODELS.get(nr)


def unknown(nr: int) -> Model:
    """A call that no model describes: served only where it failed, so that it has no outputs."""
    return Model(nr, name_of(nr), "refuse", "llllll", (), ())


def name_of(nr: int) -> str:
    """The call's name, or its number where it has none."""
    return NAMES.get(nr, f"syscall_{nr}")


def signed32(value: int) -> int:
    """The low half of a register as a signed number."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def c_string(memory: Memory, address: int) -> bytes:
    """The bytes before the NUL; reads up to a page boundary at a time, so that a string at a mapping's end is whole."""
    if not address:
        return b""
    out = b""
    while len(out) < MAX_STRING_BYTES:
        piece = memory.read(address, 4096 - (address & 4095) if address & 4095 > 3840 else 256)
        if not piece:
            break
        end = piece.find(b"\0")
        if end >= 0:
            return out + piece[:end]
        out += piece
        address += len(piece)
    return out


def _iovecs(memory: Memory, address: int, count: int) -> list[tuple[int, int]]:
    raw = memory.read(address, min(count, IOV_LIMIT) * 16)
    return list(struct.iter_unpack("<QQ", raw[: len(raw) // 16 * 16]))


# Terminal and socket requests that predate the encoding of sizes in the number.
_IOCTL_OUT: Final = {
    0x5401: 36, 0x5413: 8, 0x540F: 4, 0x5429: 4, 0x541B: 4, 0x5411: 4, 0x5405: 18, 0x5424: 4, 0x5415: 4, 0x8905: 4,
    0x8910: 40, 0x8913: 40, 0x8915: 40, 0x8919: 40, 0x891B: 40, 0x8921: 40, 0x8927: 40, 0x8933: 40,
    0x8903: 4, 0x8901: 4, 0x5432: 4,
    0x5603: 6, 0x4B33: 1, 0x4B44: 4, 0x1260: 8,
}  # fmt: skip
_IOCTL_NONE: Final = {
    0x5402, 0x5403, 0x5404, 0x5406, 0x5407, 0x5408, 0x5409, 0x540A, 0x540B, 0x540C, 0x540D, 0x540E, 0x5410, 0x5412,
    0x5414, 0x5416, 0x5418, 0x5420, 0x5421, 0x5422, 0x5423, 0x5425, 0x5450, 0x5451, 0x5452, 0x8902, 0x40049409,
    0x4B45, 0x4B46,
}  # fmt: skip
_IOCTL_IN: Final = {0x5402: 36, 0x5403: 36, 0x5404: 36, 0x5410: 4, 0x5414: 8, 0x5421: 4, 0x5412: 1}
_IOCTL_TYPES: Final = b"Tft\x12X\x89"


def ioctl_known(command: int) -> bool:
    """Whether the bytes that the request writes are known."""
    command &= 0xFFFFFFFF
    if command in _IOCTL_OUT or command in _IOCTL_NONE:
        return True
    return command > 0xFFFF and (command >> 8) & 0xFF in _IOCTL_TYPES


def _ioctl_out(args: Sequence[int]) -> Iterator[tuple[int, int]]:
    command = args[1] & 0xFFFFFFFF
    if command in _IOCTL_OUT:
        yield args[2], _IOCTL_OUT[command]
    elif command not in _IOCTL_NONE and command >> 31 & 1:
        yield args[2], command >> 16 & 0x3FFF


_FCNTL_OUT: Final = {5: 32, 36: 32, 16: 8, 1036: 8, 1035: 8, 1037: 8, 1038: 8}


def _sockaddr(memory: Memory, args: Sequence[int], first: int) -> Iterator[tuple[int, int]]:
    if args[first] and args[first + 1]:
        yield args[first + 1], 4
        raw = memory.read(args[first + 1], 4)
        yield args[first], min(int.from_bytes(raw, "little"), 128)


def _msg_out(memory: Memory, address: int, result: int) -> Iterator[tuple[int, int]]:
    """The message header itself carries lengths out; then name, data and control."""
    yield address + 8, 4
    yield address + 40, 16
    raw = memory.read(address, 56)
    if len(raw) < 56:
        return
    name, name_len, iov, count, control, control_len = struct.unpack_from("<QIxxxxQQQQ", raw)
    if name:
        yield name, min(name_len, 128)
    yield from _split(_iovecs(memory, iov, count), result)
    if control:
        yield control, min(control_len, 65536)


def _split(vectors: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    for base, size in vectors:
        take = min(size, length)
        if take > 0:
            yield base, take
        length -= take


def _mmsg_out(memory: Memory, args: Sequence[int], result: int) -> Iterator[tuple[int, int]]:
    for i in range(result):
        head = args[1] + 64 * i
        yield head + 56, 4
        raw = memory.read(head + 56, 4)
        yield from _msg_out(memory, head, int.from_bytes(raw, "little"))


_FUTEX_WRITES: Final = {5: 4, 6: 0, 7: 0, 8: 0, 11: 0, 12: 0, 13: 0}


def _futex_out(args: Sequence[int]) -> Iterator[tuple[int, int]]:
    operation = args[1] & 0x7F
    if operation == 5:
        yield args[4], 4
    elif operation in _FUTEX_WRITES:
        yield args[0], 4


_LENGTHS: Final[dict[str, Callable[[Sequence[int], int], int]]] = {
    "fds": lambda a, _r: (min(a[0] & 0xFFFFFFFF, 65536) + 63) // 64 * 8,
    "pages": lambda a, _r: (a[1] + 4095) // 4096,
    "ret": lambda _a, r: r,
    "ret+8": lambda _a, r: r + 8,
}


def _length(text: str, args: Sequence[int], result: int) -> int:
    if text.isdigit():
        return int(text)
    if text in _LENGTHS:
        return _LENGTHS[text](args, result)
    head, _, factor = text.partition("*")
    if head == "ret":
        return result * int(factor)
    if head.startswith("ret?"):  # a zero size asks for the length only
        return result if args[int(head[5:])] else 0
    return (args[int(head[1:])] & 0xFFFFFFFF if factor else args[int(head[1:])]) * int(factor or 1)


def output_regions(shape: Model, memory: Memory, args: Sequence[int], result: int) -> Iterator[tuple[int, int]]:
    """(address, length) of what the call wrote, in an order in which earlier regions tell the length of later ones."""
    words = shape.outputs
    if not words:
        return
    if words[0] == "!":  # remaining time of an interrupted sleep: written on EINTR only
        if result not in (-4, -516):
            return
        words = words[1:]
    elif (result < 0 and result not in (-514, -516) and shape.name != "getsockopt") or result < 0:
        return
    for word in words:
        yield from _one_region(word, memory, args, result)


def _one_region(word: str, memory: Memory, args: Sequence[int], result: int) -> Iterator[tuple[int, int]]:
    if word[0].isdigit():
        index, _, text = word.partition(":")
        address = args[int(index)]
        size = _length(text, args, result)
        if address and size > 0:
            yield address, size
    elif word == "iov":
        yield from _split(_iovecs(memory, args[1], args[2]), result)
    elif word.startswith("sockaddr"):
        yield from _sockaddr(memory, args, int(word[8:]))
    elif word == "msg":
        yield from _msg_out(memory, args[1], result)
    elif word == "mmsg":
        yield from _mmsg_out(memory, args, result)
    elif word == "mmsglen":
        yield from ((args[1] + 64 * i + 56, 4) for i in range(result))
    elif word == "ioctl":
        yield from _ioctl_out(args)
    elif word == "fcntl":
        size = _FCNTL_OUT.get(args[1] & 0xFFFFFFFF, 0)
        if size:
            yield args[2], size
    elif word == "futex":
        yield from _futex_out(args)
    elif word == "sockopt":
        yield args[4], 4
        yield args[3], min(int.from_bytes(memory.read(args[4], 4), "little"), 4096)
    elif word == "handle":
        yield args[2], 8
        yield args[2] + 8, min(int.from_bytes(memory.read(args[2], 4), "little"), 128)


def input_of(shape: Model, memory: Memory, args: Sequence[int]) -> bytes:
    """What the call reads from memory, as one byte string that is the same whenever the program asks for the same."""
    words = shape.inputs
    if not words:
        return b""
    if len(words) == 1:
        return _one_input(words[0], memory, args)
    parts = [_one_input(word, memory, args) for word in words]
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def _one_input(word: str, memory: Memory, args: Sequence[int]) -> bytes:
    if word[0].isdigit():
        index, _, text = word.partition(":")
        address = args[int(index)]
        if not address:
            return b""
        if text == "str":
            return c_string(memory, address)
        return memory.read(address, min(_length(text, args, 0), MAX_INPUT_BYTES))
    if word == "iov":
        return _gather(memory, _iovecs(memory, args[1], args[2]))
    if word == "msg":
        return _msg_in(memory, args[1])
    if word == "mmsg":
        return b"".join(_msg_in(memory, args[1] + 64 * i) for i in range(min(args[2], 64)))
    size = _IOCTL_IN.get(args[1] & 0xFFFFFFFF, 0)
    return memory.read(args[2], size) if size else b""


def _gather(memory: Memory, vectors: Sequence[tuple[int, int]]) -> bytes:
    out = bytearray()
    for base, size in vectors:
        if size and len(out) < MAX_INPUT_BYTES:
            out += memory.read(base, min(size, MAX_INPUT_BYTES))
    return bytes(out)


def _msg_in(memory: Memory, address: int) -> bytes:
    raw = memory.read(address, 56)
    if len(raw) < 56:
        return b""
    name, name_len, iov, count, control, control_len = struct.unpack_from("<QIxxxxQQQQ", raw)
    out = memory.read(name, min(name_len, 128)) if name else b""
    out += _gather(memory, _iovecs(memory, iov, count))
    return out + (memory.read(control, min(control_len, 65536)) if control else b"")


def passed_fds(memory: Memory, address: int) -> list[int]:
    """The descriptors in the control data of a received message."""
    raw = memory.read(address, 56)
    if len(raw) < 56:
        return []
    control, length = struct.unpack_from("<QQ", raw, 32)
    data = memory.read(control, min(length, 65536))
    at, fds = 0, []
    while at + 16 <= len(data):
        size, level, kind = struct.unpack_from("<Qii", data, at)
        if size < 16:
            break
        if (level, kind) == (1, 1):
            fds += [fd for (fd,) in struct.iter_unpack("<i", data[at + 16 : at + 16 + (size - 16) // 4 * 4])]
        at += (size + 7) // 8 * 8
    return fds


def decode_call(nr: int, args: Sequence[int], payload: bytes = b"") -> str:
    """A line for people: name, arguments by type, the first bytes of what it read."""
    shape = model(nr)
    letters = shape.args if shape else "llllll"
    shown = []
    for letter, value in zip(letters, args, strict=False):
        if letter in "fi":
            shown.append(str(signed32(value)))
        elif letter == "l" and value < 1 << 32:
            shown.append(str(value))
        else:
            shown.append(hex(value))
    text = f"{name_of(nr)}({', '.join(shown)})"
    return f"{text} {payload[:64]!r}" if payload else text
