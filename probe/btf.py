"""The running kernel's own description of its types: BTF, read in pure Python.

What: where a field lies in a kernel structure, which arguments a tracepoint hands to a BPF program and in which order,
and the values of enums. Header files would answer for the kernel they were shipped with, and silently wrongly for any
other; BTF answers for the kernel that runs.

Inputs: /sys/kernel/btf/vmlinux, and /sys/kernel/btf/MODULE for types and tracepoints that live in a module.
Guarantees: a name that this kernel lacks gives None, never an exception: it is a missing capability, not an error.
Fails: CapabilityError when the kernel offers no BTF at all, or BTF that is not of version 1.

Cost: one pass over about 130 000 types, 0.1 s.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from events.errors import CapabilityError

__all__ = ["Argument", "Btf", "FieldPlace", "KernelTypes", "build_id"]

BTF_ROOT: Final = Path("/sys/kernel/btf")

# include/uapi/linux/btf.h
INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(1, 12)
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)
_MODIFIERS: Final = frozenset({TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG})

# What follows the 12 bytes of a type: bytes once, and bytes for each of its vlen members.
_FIXED_BYTES: Final = {INT: 4, ARRAY: 12, VAR: 4, DECL_TAG: 4}
_MEMBER_BYTES: Final = {STRUCT: 12, UNION: 12, ENUM: 8, FUNC_PROTO: 8, DATASEC: 12, ENUM64: 12}
_MAGIC: Final = 0xEB9F


@dataclass(frozen=True, slots=True)
class FieldPlace:
    """Where a field lies in its structure. `bits` is 0 unless it is a bit field, which then starts at bit `bit` of `byte`."""

    byte: int
    bit: int = 0
    bits: int = 0


@dataclass(frozen=True, slots=True)
class Argument:
    """One raw argument of a tracepoint: its position, its name ("" if BTF has none), its bytes, and whether it is a pointer."""

    index: int
    name: str
    size: int
    pointer: bool


class Btf:
    """The types of one BTF blob; `base` holds those that a module's blob refers to."""

    def __init__(self, blob: bytes, base: "Btf | None" = None, *, name: str = "BTF") -> None:
        if len(blob) < 24 or struct.unpack_from("<HB", blob) != (_MAGIC, 1):
            raise CapabilityError(f"{name} is not BTF version 1; kprobe cannot find kernel fields without it")
        head, type_at, type_len, text_at, text_len = struct.unpack_from("<IIIII", blob, 4)
        self._types = blob[head + type_at : head + type_at + type_len]
        self._text = blob[head + text_at : head + text_at + text_len]
        self._base = base
        self._first_id: int = base._end_id if base else 1
        self._first_text: int = base._end_text if base else 0
        self._offsets = self._walk()
        self._end_id: int = self._first_id + len(self._offsets)
        self._end_text: int = self._first_text + len(self._text)
        self._by_name: dict[int, list[tuple[int, int]]] | None = None

    @classmethod
    def load(cls, path: Path, base: "Btf | None" = None) -> "Btf":
        """The types in `path`. Raises CapabilityError if there is none."""
        try:
            # one read: mmap of these files works only since Linux 6.16
            with path.open("rb", buffering=0) as file:
                return cls(file.readall(), base, name=str(path))
        except OSError as error:
            raise CapabilityError(
                f"cannot read {path} ({error.strerror}): kprobe needs a kernel built with CONFIG_DEBUG_INFO_BTF=y"
            ) from error

    def _walk(self) -> list[int]:
        """Byte offset of every type: the only loop over all types, one 4-byte load each."""
        fixed = [12 + _FIXED_BYTES.get(kind, 0) for kind in range(32)]
        each = [_MEMBER_BYTES.get(kind, 0) for kind in range(32)]
        load, types, offsets, at, end = struct.Struct("<I").unpack_from, self._types, [], 0, len(self._types)
        while at < end:
            offsets.append(at)
            (info,) = load(types, at + 4)
            kind = info >> 24 & 31
            at += fixed[kind] + each[kind] * (info & 0xFFFF)
        return offsets

    def text(self, offset: int) -> str:
        """The name at `offset` of the string section ("" for 0)."""
        if offset < self._first_text and self._base:
            return self._base.text(offset)
        at = offset - self._first_text
        return self._text[at : self._text.index(b"\0", at)].decode()

    def _locate(self, type_id: int) -> tuple[bytes, int]:
        if type_id < self._first_id and self._base:
            return self._base._locate(type_id)
        return self._types, self._offsets[type_id - self._first_id]

    def head(self, type_id: int) -> tuple[int, int, int, bool, int]:
        """(name offset, kind, vlen, kind flag, size or referred type) of a type; 0 is void."""
        if type_id == 0:
            return 0, 0, 0, False, 0
        types, at = self._locate(type_id)
        name, info, size = struct.unpack_from("<III", types, at)
        return name, info >> 24 & 31, info & 0xFFFF, bool(info >> 31), size

    def find(self, name: str, kinds: tuple[int, ...] = (STRUCT, UNION)) -> int | None:
        """Id of the type called `name`, of one of `kinds`; this blob's own before its base's."""
        if self._by_name is None:
            self._by_name = self._index_names()
        wanted = name.encode()
        at = self._text.find(b"\0" + wanted + b"\0") + 1 + self._first_text
        # a module's names may lie in the base's string section
        for offset in (at, self._base._text.find(b"\0" + wanted + b"\0") + 1 if self._base else 0):
            for kind, type_id in self._by_name.get(offset, ()) if offset else ():
                if kind in kinds:
                    return type_id
        return self._base.find(name, kinds) if self._base else None

    def _index_names(self) -> dict[int, list[tuple[int, int]]]:
        index: dict[int, list[tuple[int, int]]] = {}
        load, types = struct.Struct("<II").unpack_from, self._types
        for number, at in enumerate(self._offsets):
            name, info = load(types, at)
            if name:
                index.setdefault(name, []).append((info >> 24 & 31, number + self._first_id))
        return index

    def strip(self, type_id: int) -> int:
        """`type_id` without typedef, const, volatile, restrict and tags."""
        while type_id:
            _, kind, _, _, target = self.head(type_id)
            if kind not in _MODIFIERS:
                return type_id
            type_id = target
        return 0

    def members(self, type_id: int) -> Iterator[tuple[str, int, int, int]]:
        """(name, type id, bit offset, bit field size) of each member of a structure or union."""
        _, _, count, is_bitfield_form, _ = self.head(type_id)
        types, at = self._locate(type_id)
        for i in range(count):
            name, member, offset = struct.unpack_from("<III", types, at + 12 + 12 * i)
            if is_bitfield_form:
                yield self.text(name), member, offset & 0xFFFFFF, offset >> 24
            else:
                yield self.text(name), member, offset, 0

    def _member(self, type_id: int, name: str) -> tuple[int, int, int] | None:
        """(bit offset, type id, bit field size) of a member, searching anonymous members too."""
        for found, member, offset, bits in self.members(type_id):
            if found == name:
                return offset, member, bits
            inner = self.strip(member)
            if not found and self.head(inner)[1] in (STRUCT, UNION):
                below = self._member(inner, name)
                if below:
                    return below[0] + offset, below[1], below[2]
        return None

    def place(self, path: str) -> FieldPlace | None:
        """Where "struct.field[.field...]" lies; the path may cross embedded and anonymous structures. None if absent."""
        root, *names = path.split(".")
        type_id = self.find(root)
        total = bits = 0
        for name in names:
            if type_id is None or self.head(type_id)[1] not in (STRUCT, UNION):
                return None
            found = self._member(type_id, name)
            if found is None:
                return None
            total, type_id, bits = total + found[0], self.strip(found[1]), found[2]
        if type_id is None:
            return None
        return FieldPlace(total // 8, total % 8 if bits else 0, bits)

    def size(self, name: str) -> int | None:
        """Bytes of a structure."""
        type_id = self.find(name)
        return None if type_id is None else self.head(type_id)[4]

    def enum_value(self, enum: str, name: str) -> int | None:
        """Value of a member of an enum; they depend on the kernel's configuration."""
        type_id = self.find(enum, (ENUM, ENUM64))
        if type_id is None:
            return None
        _, kind, count, _, _ = self.head(type_id)
        types, at = self._locate(type_id)
        step = _MEMBER_BYTES[kind]
        for i in range(count):
            text, value = struct.unpack_from("<Ii", types, at + 12 + step * i)
            if self.text(text) == name:
                return int(value)
        return None

    def prototype_id(self, tracepoint: str) -> int | None:
        """Id of `typedef btf_trace_NAME`, which a tp_btf program names as its target. None: no such tracepoint here."""
        return self.find(f"btf_trace_{tracepoint}", (TYPEDEF,))

    def arguments(self, tracepoint: str) -> tuple[Argument, ...] | None:
        """Raw arguments in the order of this kernel, without the hidden first one. None if the tracepoint is absent."""
        type_id = self.prototype_id(tracepoint)
        while type_id and self.head(type_id)[1] != FUNC_PROTO:
            type_id = self.head(type_id)[4]
        if not type_id:
            return None
        types = [member for _, member in self._parameters(type_id)][1:]
        names = self._argument_names(tracepoint, len(types))
        heads = [self.head(self.strip(member)) for member in types]
        return tuple(Argument(i, names[i], 8 if head[1] == PTR else head[4], head[1] == PTR) for i, head in enumerate(heads))

    def _parameters(self, proto: int) -> list[tuple[str, int]]:
        types, at = self._locate(proto)
        count = self.head(proto)[2]
        pairs = [struct.unpack_from("<II", types, at + 12 + 8 * i) for i in range(count)]
        return [(self.text(name), int(member)) for name, member in pairs]

    def _argument_names(self, tracepoint: str, count: int) -> list[str]:
        # The typedef has types only; the names stand with the function that calls the probes: __probestub_ since
        # Linux 6.4, __traceiter_ since 5.10. A NULLable argument carries that in its name since 6.13.
        for prefix in ("__probestub_", "__traceiter_"):
            function = self.find(prefix + tracepoint, (FUNC,))
            if function is not None:
                names = [name.removesuffix("__nullable") for name, _ in self._parameters(self.head(function)[4])][1:]
                if len(names) == count:
                    return names
        return [""] * count


class KernelTypes:
    """The kernel's types and those of its loaded modules, each module's read when it is first asked for."""

    def __init__(self, root: Path = BTF_ROOT) -> None:
        self._root = root
        self.vmlinux = Btf.load(root / "vmlinux")
        self._modules: dict[str, Btf | None] = {}

    def module(self, name: str) -> Btf | None:
        """Types of a loaded module on top of the kernel's; None if it is not loaded (or built in)."""
        if name not in self._modules:
            path = self._root / name
            self._modules[name] = Btf.load(path, self.vmlinux) if path.exists() else None
        return self._modules[name]

    def owner(self, tracepoint: str, modules: tuple[str, ...]) -> Btf | None:
        """The blob in which `tracepoint` is described: the kernel's or one of `modules`."""
        for blob in (self.vmlinux, *map(self.module, modules)):
            if blob is not None and blob.prototype_id(tracepoint) is not None:
                return blob
        return None

    def place(self, path: str, modules: tuple[str, ...]) -> FieldPlace | None:
        """As `Btf.place`, looking into `modules` too."""
        for blob in (self.vmlinux, *map(self.module, modules)):
            found = blob.place(path) if blob is not None else None
            if found is not None:
                return found
        return None


def build_id() -> str:
    """A name for the running kernel's build: equal names mean equal types."""
    try:
        return hashlib.sha256(Path("/sys/kernel/notes").read_bytes()).hexdigest()[:20]
    except OSError:
        names = os.uname()
        return hashlib.sha256(f"{names.release} {names.version}".encode()).hexdigest()[:20]
