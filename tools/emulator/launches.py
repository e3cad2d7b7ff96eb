"""The launches that the emulator ran: which kernel, on which device and stream, with how much shared memory."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType


class _Record(ctypes.Structure):
    """`emu::Launch` of runtime.h."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("stream", ctypes.c_void_p),
        ("shared_bytes", ctypes.c_uint64),
        ("device", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Launch:
    """One launch. `kernel` is "cooperative" for a cooperative launch, which does not record its kernel's name."""

    kernel: str
    device: int
    stream: int
    shared_bytes: int


@contextmanager
def recorded(library: ModuleType) -> Iterator[list[Launch]]:
    """The launches within this block; the list is filled when the block ends."""
    control, launches = ctypes.CDLL(str(library.__file__)), []
    control.emu_launches.restype = ctypes.c_size_t
    control.emu_forget_launches()
    yield launches
    first = ctypes.POINTER(_Record)()
    for record in first[: control.emu_launches(ctypes.byref(first))]:
        name = "cooperative" if record.kernel is None else record.kernel.decode().strip("(").split("<")[0]
        launches.append(Launch(name, record.device, record.stream or 0, record.shared_bytes))


def current_device(library: ModuleType) -> int:
    """The emulated runtime's current device."""
    return ctypes.CDLL(str(library.__file__)).emu_current_device()
