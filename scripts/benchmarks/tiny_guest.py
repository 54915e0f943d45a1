# SPDX-License-Identifier: Apache-2.0
"""Guest kernels of a few instructions, which print on COM1 and power off by rvmm's sleep register."""

import struct

CODE_ADDR = 0x10_0000
COM1 = 0x3F8
SLEEP_CONTROL = 0x600
POWER_OFF = 0x34
PVH_NOTE = 18


def out(port, value):
    """mov dx, port; mov al, value; out dx, al: the same bytes in 32-bit and in 64-bit mode."""
    return b"\x66\xba" + struct.pack("<H", port) + b"\xb0" + bytes([value]) + b"\xee"


def await_byte():
    """Waits for a byte from COM1, which takes some once its receive interrupt is enabled, and leaves it in AL."""
    # again: mov dx, COM1 + 5; in al, dx; test al, 1; jz again; mov dx, COM1; in al, dx
    wait = b"\x66\xba\xfd\x03\xec\xa8\x01\x74\xf7\x66\xba\xf8\x03\xec"
    return out(COM1 + 1, 1) + wait


def elf(waits=False, stays=False):
    """The file, with a Linux and a PVH entry (which QEMU asks for). The guest prints one byte, or another one too as soon
    as it was sent one. Then it powers off, unless it is to stay."""
    halt = b"\xf4\xeb\xfd"
    code = out(COM1, ord("x"))
    if waits:
        code += await_byte() + out(COM1, ord("y"))
    if not stays:
        code += out(SLEEP_CONTROL, POWER_OFF)
    code += halt
    note = struct.pack("<III", 4, 4, PVH_NOTE) + b"Xen\0" + struct.pack("<I", CODE_ADDR)
    note_offset = 0x1000 + len(code) + -len(code) % 4
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, CODE_ADDR, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 7, 0x1000, CODE_ADDR, CODE_ADDR, len(code), len(code), 0x1000)
    header += struct.pack("<IIQQQQQQ", 4, 4, note_offset, 0, 0, len(note), len(note), 4)
    return (header.ljust(0x1000, b"\0") + code).ljust(note_offset, b"\0") + note
