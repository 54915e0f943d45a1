/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk with a volatile write cache, for power cuts: an NBD server (one connection) over a raw file. What was written
 * since the last flush is in this process only, and gone when it is killed, but for a random part of the sectors, as a
 * real disk writes back when and in which order it likes.
 *
 *   volatile-disk SOCKET FILE SEED
 *
 * Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle, simple replies).
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SECTOR 512
#define REQUEST_MAX (64 * 1024 * 1024)
#define WRITTEN_BACK_EARLY 4 /* one sector in so many */

enum { OPT_EXPORT_NAME = 1, OPT_ABORT = 2, OPT_INFO = 6, OPT_GO = 7 };
enum { REP_ACK = 1, REP_INFO = 3 };
#define REP_ERR_UNSUP 0x80000001u
enum { CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES = 6 };
enum { FLAG_HAS_FLAGS = 1, FLAG_SEND_FLUSH = 4, FLAG_SEND_FUA = 8, FLAG_SEND_TRIM = 32, FLAG_SEND_WRITE_ZEROES = 64 };
#define CMD_FLAG_FUA 1
#define TRANSMISSION_FLAGS (FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES)

static int file = -1, client = -1;
static unsigned char *cache; /* the whole disk, copied on write */
static unsigned char *dirty; /* a byte for each sector */
static uint64_t size, seed;

static _Noreturn void fail(const char *what)
{
    fprintf(stderr, "volatile-disk: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t next_random(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

static void take(void *to, size_t len)
{
    ssize_t n = len > 0 ? recv(client, to, len, MSG_WAITALL) : 0; /* which waits even for nothing */

    if (n != (ssize_t)len) {
        if (n == 0)
            exit(0);
        fail("recv");
    }
}

static void give(const void *from, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = send(client, (const char *)from + done, len - done, MSG_NOSIGNAL);
        if (n <= 0)
            fail("send");
        done += (size_t)n;
    }
}

static void put16(unsigned char *at, uint16_t v)
{
    v = htobe16(v);
    memcpy(at, &v, 2);
}

static void put32(unsigned char *at, uint32_t v)
{
    v = htobe32(v);
    memcpy(at, &v, 4);
}

static void put64(unsigned char *at, uint64_t v)
{
    v = htobe64(v);
    memcpy(at, &v, 8);
}

static uint64_t get(const unsigned char *at, int bytes)
{
    uint64_t v = 0;

    for (int i = 0; i < bytes; i++)
        v = v << 8 | at[i];
    return v;
}

static void write_back(uint64_t first, uint64_t sectors)
{
    if (pwrite(file, cache + first * SECTOR, sectors * SECTOR, (off_t)(first * SECTOR)) != (ssize_t)(sectors * SECTOR))
        fail("pwrite");
}

static void flush(uint64_t first, uint64_t end)
{
    while (first < end) {
        uint64_t run = 0;
        if (!dirty[first]) {
            first++;
            continue;
        }
        while (first + run < end && dirty[first + run])
            dirty[first + run++] = 0;
        write_back(first, run);
        first += run;
    }
}

static void written(uint64_t offset, uint64_t len, bool through)
{
    uint64_t first = offset / SECTOR, end = (offset + len + SECTOR - 1) / SECTOR;

    memset(dirty + first, 1, end - first);
    if (through) {
        flush(first, end);
        return;
    }
    for (uint64_t s = first; s < end; s++)
        if (next_random() % WRITTEN_BACK_EARLY == 0)
            write_back(s, 1);
}

static void option_reply(uint32_t option, uint32_t type, const void *data, uint32_t len)
{
    unsigned char h[20];

    put64(h, 0x3e889045565a9u);
    put32(h + 8, option);
    put32(h + 12, type);
    put32(h + 16, len);
    give(h, sizeof h);
    give(data, len);
}

static void negotiate(void)
{
    unsigned char h[18], data[4096], info[12];

    memcpy(h, "NBDMAGICIHAVEOPT", 16);
    put16(h + 16, 3); /* fixed newstyle, no zeroes */
    give(h, 18);
    take(h, 4);
    bool no_zeroes = get(h, 4) & 2;
    for (;;) {
        take(h, 16);
        uint32_t option = (uint32_t)get(h + 8, 4), len = (uint32_t)get(h + 12, 4);
        if (len > sizeof data) {
            errno = EPROTO;
            fail("option");
        }
        take(data, len);
        switch (option) {
        case OPT_EXPORT_NAME: {
            unsigned char reply[134] = {0};
            put64(reply, size);
            put16(reply + 8, TRANSMISSION_FLAGS);
            give(reply, no_zeroes ? 10 : sizeof reply);
            return;
        }
        case OPT_INFO:
        case OPT_GO:
            put16(info, 0); /* NBD_INFO_EXPORT */
            put64(info + 2, size);
            put16(info + 10, TRANSMISSION_FLAGS);
            option_reply(option, REP_INFO, info, sizeof info);
            option_reply(option, REP_ACK, NULL, 0);
            if (option == OPT_GO)
                return;
            break;
        case OPT_ABORT:
            option_reply(option, REP_ACK, NULL, 0);
            exit(0);
        default:
            option_reply(option, REP_ERR_UNSUP, NULL, 0);
        }
    }
}

static void serve(void)
{
    for (;;) {
        unsigned char h[28], reply[16];

        take(h, sizeof h);
        uint16_t flags = (uint16_t)get(h + 4, 2), command = (uint16_t)get(h + 6, 2);
        uint64_t offset = get(h + 16, 8), len = get(h + 24, 4);
        uint32_t error = 0;
        if (get(h, 4) != 0x25609513 || (command == CMD_WRITE && len > REQUEST_MAX)) {
            errno = EPROTO;
            fail("request");
        }
        bool inside = offset <= size && len <= size - offset;
        bool through = flags & CMD_FLAG_FUA;
        switch (command) {
        case CMD_READ:
            error = inside ? 0 : EINVAL;
            break;
        case CMD_WRITE:
            if (!inside) {
                errno = EPROTO;
                fail("write outside the disk");
            }
            take(cache + offset, len);
            written(offset, len, through);
            break;
        case CMD_TRIM:
        case CMD_WRITE_ZEROES:
            if (inside) {
                memset(cache + offset, 0, len);
                written(offset, len, through);
            } else
                error = EINVAL;
            break;
        case CMD_FLUSH:
            flush(0, size / SECTOR);
            break;
        case CMD_DISC:
            flush(0, size / SECTOR); /* an orderly end, as switching a machine off is */
            return;
        default:
            error = EINVAL;
        }
        put32(reply, 0x67446698);
        put32(reply + 4, error);
        memcpy(reply + 8, h + 8, 8);
        give(reply, sizeof reply);
        if (command == CMD_READ && !error)
            give(cache + offset, len);
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat st;

    if (argc != 4 || strlen(argv[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: volatile-disk SOCKET FILE SEED\n");
        return 1;
    }
    seed = strtoull(argv[3], NULL, 10) * 2 + 1;
    file = open(argv[2], O_RDWR);
    if (file < 0 || fstat(file, &st) != 0)
        fail(argv[2]);
    size = (uint64_t)st.st_size / SECTOR * SECTOR;
    cache = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
    dirty = calloc(size / SECTOR, 1);
    if (cache == MAP_FAILED || !dirty)
        fail("mmap");
    strcpy(address.sun_path, argv[1]);
    unlink(argv[1]);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 1) != 0)
        fail(argv[1]);
    client = accept(listener, NULL, NULL);
    if (client < 0)
        fail("accept");
    negotiate();
    serve();
    return 0;
}
