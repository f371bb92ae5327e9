"""From the C text in `bpf/` to BPF instructions for the running kernel.

What: puts the facts of this kernel (field places and tracepoint arguments from BTF) and of the record (events/kinds.py) in
front of the C text, has BCC compile it, and gives back the instructions of each function, not yet loaded: `link` then
replaces the placeholders of map file descriptors.
BCC runs in a child process that ends at once: its 180 MiB are not ours. It sees stub headers, so that no kernel headers
are needed and the result is the same on every distribution. Results are kept in a cache, named by a hash of the whole
text and the compiler's version.

Guarantees: a field or argument that this kernel lacks never stops the compilation; it stands in `Source.missing`.
Fails: CapabilityError without BCC (with the package to install), ProbeError with the compiler's words if the text is refused.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from events.errors import CapabilityError, ProbeError
from probe.btf import KernelTypes

__all__ = ["MODULES", "Source", "bcc_directory", "compile_source", "link", "write_payload_source", "write_source"]

BPF_DIR: Final = Path(__file__).parent / "bpf"
# Kernel modules whose types and tracepoints the probe uses, where they are not built in.
MODULES: Final = ("ext4", "jbd2")
_BCC_PLACES: Final = (
    "/usr/lib/python3/dist-packages",
    "/usr/lib/python3.11/site-packages",
    "/usr/lib/python3.12/site-packages",
)

# Address bits that no kernel pointer has: a read through a field that this kernel lacks fails, and gives 0.
_ABSENT_FIELD: Final = 0x4000000000000000

# All that BCC asks of kernel headers.
_STUBS: Final[Mapping[str, str]] = {
    "linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n#define CONFIG_BPF 1\n",
    "linux/types.h": """#pragma once
typedef unsigned char u8, __u8; typedef signed char s8, __s8; typedef unsigned short u16, __u16; typedef short s16, __s16;
typedef unsigned int u32, __u32; typedef int s32, __s32; typedef unsigned long long u64, __u64; typedef long long s64, __s64;
typedef __u16 __be16, __le16, __sum16; typedef __u32 __be32, __le32, __wsum; typedef __u64 __be64, __le64;
typedef __u64 __aligned_u64 __attribute__((aligned(8))); typedef unsigned long size_t, uintptr_t; typedef _Bool bool;
typedef int pid_t;
#define __always_inline inline __attribute__((always_inline))
#define NULL ((void *)0)
""",
    "linux/version.h": "#define LINUX_VERSION_CODE 0x050f00\n#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + c)\n",
    "linux/bpf_common.h": "#pragma once\n#define BPF_CLASS(code) ((code) & 0x07)\n",
    "asm/page.h": "#define PAGE_SIZE 4096\n",
    "linux/log2.h": "",
    "linux/compiler_types.h": "",
    "uapi/linux/bpf.h": "",
    "uapi/linux/if_packet.h": "",
    "uapi/linux/if_ether.h": "",
    "uapi/linux/ptrace.h": "#pragma once\nstruct pt_regs { unsigned long unused; };\n",
}


@dataclass(frozen=True, slots=True)
class Source:
    """C text made for one kernel: `text`, and what this kernel lacks of it.

    `missing_fields` are paths such as "mutex.owner"; `missing_arguments` names, per program, arguments that its text cannot
    do without.
    """

    text: str
    missing_fields: tuple[str, ...]
    missing_arguments: Mapping[str, tuple[str, ...]]


def write_source(types: KernelTypes, programs: Mapping[str, str | None], facts: Mapping[str, int], kinds: str) -> Source:
    """The whole text. `programs` maps each program's name to the tracepoint it is for (None: absent here)."""
    hot = (BPF_DIR / "hot.c").read_text()
    rest = [p.read_text() for p in sorted(BPF_DIR.glob("*.c")) if p.name != "hot.c"]
    body = "\n".join([(BPF_DIR / "common.h").read_text(), "#define TYPED", hot, "#undef TYPED", hot, *rest])
    return _with_facts(types, programs, facts, kinds, body)


def write_payload_source(types: KernelTypes, programs: Mapping[str, str | None], facts: Mapping[str, int]) -> Source:
    """The text of the payload programs, which are compiled only where they are asked for."""
    body = "\n".join(p.read_text() for p in (BPF_DIR / "common.h", BPF_DIR / "payload" / "payload.c"))
    return _with_facts(types, programs, facts, "", body)


def _with_facts(
    types: KernelTypes, programs: Mapping[str, str | None], facts: Mapping[str, int], kinds: str, body: str
) -> Source:
    fields, missing_fields = _field_macros(types, body)
    arguments, missing_arguments = _argument_macros(types, programs, body)
    machine = [f"#define {name} {value}" for name, value in sorted(facts.items())]
    return Source("\n".join([kinds, *fields, *arguments, *machine, body]), missing_fields, missing_arguments)


def _is_guarded(token: str, body: str) -> bool:
    """Does the text ask whether `token` exists?"""
    return re.search(rf"(#ifdef {token}\b|defined\({token}\))", body) is not None


def _field_macros(types: KernelTypes, body: str) -> tuple[list[str], tuple[str, ...]]:
    paths = dict.fromkeys(
        p for block in re.findall(r"@fields\n(.*?)\*/", body, re.DOTALL) for p in re.findall(r"\w+(?:\.\w+)+", block)
    )
    lines, missing = [], []
    for path in paths:
        token, place = "OFF_" + path.replace(".", "_"), types.place(path, MODULES)
        if place is not None:
            lines += [f"#define {token} {place.byte}", f"#define {token}_BIT {place.bit}"]
            continue
        missing.append(path)
        if not _is_guarded(token, body):
            lines += [f"#define {token} {_ABSENT_FIELD:#x}ULL", f"#define {token}_BIT 0"]
    return lines, tuple(missing)


def _argument_macros(
    types: KernelTypes, programs: Mapping[str, str | None], body: str
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    lines: list[str] = []
    missing: dict[str, list[str]] = {}
    for program, name in sorted(_wanted_arguments(body)):
        if program not in programs:
            continue
        tracepoint, token = programs[program], f"ARG_{program}__{name}"
        blob = types.owner(tracepoint, MODULES) if tracepoint else None
        found = [a for a in (blob.arguments(tracepoint) or () if blob and tracepoint else ()) if a.name == name]
        if found:
            lines += [f"#define {token} {found[0].index}", f"#define {token}_BYTES {found[0].size}"]
        elif not _is_guarded(token, body):
            lines += [f"#define {token} 0", f"#define {token}_BYTES 0"]  # compiles; is not loaded
            missing.setdefault(program, []).append(name)
    return lines, {program: tuple(names) for program, names in missing.items()}


def _wanted_arguments(body: str) -> set[tuple[str, str]]:
    """(program, argument) pairs that the text uses, also by macros that make several programs of one layout."""
    wanted = set(re.findall(r"ARG_(\w+)__(\w+?)(?:_BYTES)?\b", body)) | set(re.findall(r"\bARG\((\w+), (\w+)\)", body))
    for macro, text in re.findall(r"#define (\w+)\(name, \w+.*?\)((?:.*\\\n)*.*\n)", body):
        names = re.findall(r"ARG\(name, (\w+)\)", text)
        wanted |= {(program, n) for program in re.findall(rf"^{macro}\((\w+),", body, re.MULTILINE) for n in names}
    return wanted


def bcc_directory() -> Path:
    """Where the distribution's BCC for Python lies. Raises CapabilityError, naming the package, if nowhere.

    PyPI's `bcc` is another program; only the distribution's comes with the compiler library.
    """
    for place in _BCC_PLACES:
        if (Path(place) / "bcc" / "libbcc.py").exists():
            return Path(place)
    raise CapabilityError(
        "BCC is not installed: apt-get install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora, RHEL). "
        "PyPI's package of the name bcc is an unrelated program"
    )


def _bcc_version(directory: Path) -> str:
    version = directory / "bcc" / "version.py"
    return version.read_text() if version.exists() else "unknown"


def cache_directory() -> Path:
    """Where compiled programs are kept; only its owner can write there, as what lies there is loaded into the kernel."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "kprobe" / "bpf"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def compile_source(text: str, functions: Sequence[str], *, cache: bool = True) -> dict[str, bytes]:
    """Instructions of each of `functions` that `text` defines, by name."""
    directory = bcc_directory()
    key = hashlib.sha256("\0".join([text, _bcc_version(directory), os.uname().machine, *functions]).encode()).hexdigest()
    kept = cache_directory() / f"{key}.json"
    if cache and kept.exists() and kept.stat().st_uid == os.geteuid():
        with contextlib.suppress(ValueError, OSError):  # a damaged file is compiled anew
            return _decode(kept.read_text())
    answer = _compile_in_child(directory, text, functions)
    if cache:
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            file.write(answer)
        Path(file.name).replace(kept)
    return _decode(answer)


def _decode(answer: str) -> dict[str, bytes]:
    return {name: base64.b64decode(code) for name, code in json.loads(answer).items()}


def _compile_in_child(directory: Path, text: str, functions: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="kprobe-headers-") as headers:
        for name, content in _STUBS.items():
            path = Path(headers) / "include" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _CHILD, str(directory)],
            input=json.dumps({"text": text, "functions": list(functions)}),
            env={**os.environ, "BCC_KERNEL_SOURCE": headers},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode != 0:
        said = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise ProbeError(f"BCC cannot compile the probe's programs (status {result.returncode}): {' | '.join(said[-5:])}")
    return result.stdout


# The child's whole program: it must not import anything of ours, and its standard output is the answer.
_CHILD: Final = """
import base64, json, os, sys
sys.path.append(sys.argv[1])
job = json.load(sys.stdin)
answer = os.dup(1)
os.dup2(2, 1)
from bcc import BPF
program = BPF(text=job["text"], cflags=["-w", "-O2"])
code = {}
for name in job["functions"]:
    try:
        code[name] = base64.b64encode(program.dump_func(name.encode())).decode()
    except Exception as error:
        print("error:", name, error, file=sys.stderr)
with os.fdopen(answer, "w") as out:
    json.dump(code, out)
sys.stdout.flush()
os._exit(0)
"""

_LOAD_64: Final = 0x18  # BPF_LD | BPF_IMM | BPF_DW: two slots
_ATOMIC_64: Final = 0xDB  # BPF_STX | BPF_ATOMIC | BPF_DW
_FETCH: Final = 1


def link(instructions: bytes, maps: Mapping[int, int], *, fetch_add: bool) -> bytes:
    """`instructions` with file descriptors for map placeholders, and atomic adds turned into fetch-and-add.

    clang at BCC's instruction level knows no fetch-and-add, so the C text writes the plain atomic add.
    """
    code = bytearray(instructions)
    at = 0
    while at < len(code):
        opcode, registers = code[at], code[at + 1]
        if opcode == _LOAD_64:
            (value,) = struct.unpack_from("<i", code, at + 4)
            if registers >> 4 in (1, 2):  # BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE
                struct.pack_into("<i", code, at + 4, maps[value])
            at += 8
        elif opcode == _ATOMIC_64 and fetch_add:
            struct.pack_into("<i", code, at + 4, _FETCH)
        at += 8
    return bytes(code)
