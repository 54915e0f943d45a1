// SPDX-License-Identifier: Apache-2.0
//
// Writes numbered, checksummed records and says which of them are on stable storage; checks them after a power cut.
//
//   record-writer PATH SEED [SECONDS]   in the guest: write until told to stop, the disk is full, or SECONDS are over.
//                                       Prints "ack N" once fdatasync has returned for every record up to N.
//   record-writer --check PATH SEED N   on the host: are records 0 to N there? Exit status 0: all; 2: some are not.
//
// Record n lies at offset n * 4096. The seed tells the records of one run from those of another. PATH may be a block
// device or a file, which grows.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define RECORD_BYTES 4096
#define WORDS (RECORD_BYTES / 8)
#define MAGIC 0x64726f6365722121u
#define BATCH_MAX 8
#define MISSING_SHOWN 5

struct record {
    uint64_t magic, seed, number, checksum;
    uint64_t fill[WORDS - 4];
};
_Static_assert(sizeof(struct record) == RECORD_BYTES, "a record fills a block");

// splitmix64
static uint64_t mix(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// Every word depends on seed and number, so a block in the wrong place or half written is found out.
static void make(struct record *r, uint64_t seed, uint64_t number)
{
    uint64_t state = seed ^ number * 0xd1342543de82ef95u, sum = 0;

    r->magic = MAGIC;
    r->seed = seed;
    r->number = number;
    for (size_t i = 0; i < WORDS - 4; i++)
        sum = (sum ^ (r->fill[i] = mix(&state))) * 0x100000001b3u;
    r->checksum = sum ^ seed ^ number;
}

static int fail(const char *what)
{
    printf("record-writer: %s: %s\n", what, strerror(errno));
    return 1;
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int write_records(const char *path, uint64_t seed, double seconds)
{
    static struct record r;
    uint64_t number = 0, state = seed;
    double end = now() + seconds;
    int fd = open(path, O_RDWR | O_CREAT, 0666);

    if (fd < 0)
        return fail(path);
    setvbuf(stdout, NULL, _IOLBF, 0);
    do {
        uint64_t batch = 1 + mix(&state) % BATCH_MAX;
        for (uint64_t i = 0; i < batch; i++, number++) {
            make(&r, seed, number);
            if (pwrite(fd, &r, sizeof r, (off_t)(number * RECORD_BYTES)) != sizeof r)
                return fail("pwrite");
        }
        if (fdatasync(fd) != 0)
            return fail("fdatasync");
        printf("ack %llu\n", (unsigned long long)(number - 1));
    } while (seconds == 0 || now() < end);
    return 0;
}

static int check_records(const char *path, uint64_t seed, uint64_t last)
{
    static struct record want, have;
    uint64_t missing = 0;
    int fd = open(path, O_RDONLY);

    if (fd < 0)
        return fail(path);
    for (uint64_t n = 0; n <= last; n++) {
        ssize_t got = pread(fd, &have, sizeof have, (off_t)(n * RECORD_BYTES));
        if (got < 0)
            return fail("pread");
        make(&want, seed, n);
        if (got == sizeof have && memcmp(&want, &have, sizeof have) == 0)
            continue;
        if (missing++ < MISSING_SHOWN)
            printf("record %llu was acknowledged and is %s\n", (unsigned long long)n,
                   got == sizeof have && have.magic == MAGIC && have.seed == seed ? "damaged" : "not there");
    }
    printf("%llu of %llu acknowledged records lost\n", (unsigned long long)missing, (unsigned long long)last + 1);
    return missing ? 2 : 0;
}

int main(int argc, char **argv)
{
    if (argc == 5 && strcmp(argv[1], "--check") == 0)
        return check_records(argv[2], strtoull(argv[3], NULL, 10), strtoull(argv[4], NULL, 10));
    if ((argc == 3 || argc == 4) && argv[1][0] != '-')
        return write_records(argv[1], strtoull(argv[2], NULL, 10), argc == 4 ? strtod(argv[3], NULL) : 0);
    fprintf(stderr, "usage: record-writer PATH SEED [SECONDS] | record-writer --check PATH SEED LAST\n");
    return 1;
}
