"""What the launchers asked of the emulated CUDA runtime: their launches and calls for attributes, on devices of any kind."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType


class _Record(ctypes.Structure):
    """`emu::Launch` of runtime.h."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("stream", ctypes.c_void_p),
        ("shared_bytes", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("device", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Launch:
    """One launch. `kernel` is "cooperative" for a cooperative launch, which does not record its kernel's name."""

    kernel: str
    device: int
    stream: int
    shared_bytes: int
    blocks: int


@dataclass
class Calls:
    """The launches, and how often attributes of kernels or devices were read or set."""

    launches: list[Launch] = field(default_factory=list)
    attributes: int = 0

    @property
    def kernels(self) -> set[str]:
        """The names of the kernels that were launched."""
        return {launch.kernel for launch in self.launches}


@contextmanager
def recorded(library: ModuleType) -> Iterator[Calls]:
    """The calls within this block; the result is filled when the block ends."""
    control, calls = _control(library), Calls()
    control.emu_launches.restype = ctypes.c_size_t
    control.emu_forget_calls()
    yield calls
    first = ctypes.POINTER(_Record)()
    for record in first[: control.emu_launches(ctypes.byref(first))]:
        name = "cooperative" if record.kernel is None else record.kernel.decode().strip("(").split("<")[0]
        calls.launches.append(Launch(name, record.device, record.stream or 0, record.shared_bytes, record.blocks))
    calls.attributes = control.emu_attribute_calls()


@contextmanager
def devices(
    library: ModuleType, shared_bytes: int = 163 << 10, cooperative: bool = True, sets_attributes: bool = True
) -> Iterator[None]:
    """Both devices have this much shared memory a block, cooperative launches or not, and set kernels' attributes or not."""
    control = _control(library)

    def set_both(*properties: int) -> None:
        for index in (0, 1):
            control.emu_set_device(index, *properties)

    set_both(shared_bytes, cooperative, sets_attributes)
    try:
        yield
    finally:
        set_both(163 << 10, True, True)


@contextmanager
def capture(library: ModuleType) -> Iterator[None]:
    """A stream captures a graph: CUDA loads no machine code, unless the thread's capture mode is relaxed for that time."""
    control = _control(library)
    control.emu_set_capturing(True)
    try:
        yield
    finally:
        control.emu_set_capturing(False)
    assert not control.emu_capture_is_relaxed(), "the thread's capture mode is not restored"


def current_device(library: ModuleType) -> int:
    """The emulated runtime's current device."""
    return _control(library).emu_current_device()


def _control(library: ModuleType) -> ctypes.CDLL:
    return ctypes.CDLL(str(library.__file__))
