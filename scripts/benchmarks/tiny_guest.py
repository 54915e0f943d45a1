# SPDX-License-Identifier: Apache-2.0
"""A guest kernel of a few instructions: it prints one byte on COM1 and, unless it is to stay, powers off by rvmm's sleep register."""

import struct

CODE_ADDR = 0x10_0000
COM1 = 0x3F8
SLEEP_CONTROL = 0x600
POWER_OFF = 0x34
PVH_NOTE = 18


def out(port, value):
    """mov dx, port; mov al, value; out dx, al: the same bytes in 32-bit and in 64-bit mode."""
    return b"\x66\xba" + struct.pack("<H", port) + b"\xb0" + bytes([value]) + b"\xee"


def elf(stays=False):
    """The file, with a Linux and a PVH entry (which QEMU asks for)."""
    halt = b"\xf4\xeb\xfd"
    code = out(COM1, ord("x")) + (b"" if stays else out(SLEEP_CONTROL, POWER_OFF)) + halt
    note = struct.pack("<III", 4, 4, PVH_NOTE) + b"Xen\0" + struct.pack("<I", CODE_ADDR)
    note_offset = 0x1000 + len(code) + -len(code) % 4
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, CODE_ADDR, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 7, 0x1000, CODE_ADDR, CODE_ADDR, len(code), len(code), 0x1000)
    header += struct.pack("<IIQQQQQQ", 4, 4, note_offset, 0, 0, len(note), len(note), 4)
    return (header.ljust(0x1000, b"\0") + code).ljust(note_offset, b"\0") + note
