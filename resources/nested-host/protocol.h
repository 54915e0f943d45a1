/* SPDX-License-Identifier: Apache-2.0
 *
 * What the two ends of the machine's virtio-serial port say to each other: relay.c on the host, init.c inside.
 * A frame is a type byte, a little-endian length and that many bytes.
 */
#ifndef NESTED_HOST_PROTOCOL_H
#define NESTED_HOST_PROTOCOL_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PORT_NAME "rvmm.nested-host"

enum frame {
    /* host to machine */
    FRAME_CONFIG = 'C', /* NUL-terminated "key=value" strings, once, first */
    FRAME_STDIN = 'I',  /* bytes for the command; none at all: end of input */
    FRAME_WINDOW = 'W', /* struct window */
    FRAME_NUDGE = 'N',  /* nothing: an interrupt, which finds one that QEMU lost (docs/nested-host.md) */
    /* machine to host */
    FRAME_READY = 'R',  /* the command is about to start */
    FRAME_STDOUT = 'O', /* bytes */
    FRAME_STDERR = 'E', /* bytes */
    FRAME_ALIVE = 'A',  /* nothing: every ALIVE_MS while the command runs */
    FRAME_EXIT = 'X',   /* one byte: the exit status; file systems are synced */
};

#define NUDGE_MS 100
#define ALIVE_MS 1000

#define FRAME_HEADER_BYTES 5
#define FRAME_DATA_MAX 32768           /* of a frame with bytes of a stream */
#define FRAME_CONFIG_MAX (8 * 1024 * 1024)

struct window {
    uint16_t rows, columns;
};

/* which of the command's streams are a terminal, as bits of the key "terminal" */
#define TERMINAL_STDIN 1
#define TERMINAL_STDOUT 2
#define TERMINAL_STDERR 4

static inline void frame_header(unsigned char *at, enum frame type, uint32_t len)
{
    at[0] = (unsigned char)type;
    at[1] = (unsigned char)len;
    at[2] = (unsigned char)(len >> 8);
    at[3] = (unsigned char)(len >> 16);
    at[4] = (unsigned char)(len >> 24);
}

static inline uint32_t frame_length(const unsigned char *at)
{
    return (uint32_t)at[1] | (uint32_t)at[2] << 8 | (uint32_t)at[3] << 16 | (uint32_t)at[4] << 24;
}

static inline int64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

#endif
