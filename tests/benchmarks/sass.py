"""Machine code as `nvdisasm -hex -c` prints it, written by hand: instructions with the control of each."""

from benchmarks.model.loops import Control, Listing, read_listing


def word(stall: int = 1, writes: int = 7, reads: int = 7, waits: int = 0) -> str:
    """The second word of an instruction, with nothing but its control."""
    return f"{(stall | writes << 5 | reads << 8 | waits << 11) << 41:016x}"


def listing(program: str, name: str = "a_kernel") -> Listing:
    """Of lines like `@P0 LDSM.16.M88.4 R4, [R2] | stall=2 writes=0`, and of labels like `.L_x_0:`."""
    text, address = [], 0
    for line in filter(None, map(str.strip, program.splitlines())):
        if line.endswith(":"):
            text.append(line)
            continue
        instruction, _, control = line.partition("|")
        fields = {key: int(value) for key, value in (part.split("=") for part in control.split())}
        text.append(f"        /*{address:04x}*/    {instruction.strip()} ;  /* 0x{0:016x} */")
        text.append(f"                            /* 0x{word(**fields)} */")
        address += 16
    return read_listing(name, "\n".join(text))


def controls(program: str) -> list[Control]:
    """The controls of such lines."""
    return listing(program).controls
