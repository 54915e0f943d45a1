// SPDX-License-Identifier: Apache-2.0
/*
 * Writes whose loss can be seen, for power-cut tests.
 *
 *   block-writer write DEVICE [--no-flush] [COUNT]   prints "ACK n" after record n is durable
 *   block-writer check DEVICE LAST                   are records 1 to LAST whole?
 *
 * Record n lies at n * 4096, with its number and a checksum, so that a lost, old
 * or torn one shows. Writes are O_DIRECT; the fdatasync after each is what makes
 * it durable, and --no-flush leaves it out on purpose. Exit status of check: 0
 * all there, 1 some lost, 2 it could not be told.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RECORD 4096
#define MAGIC 0x72766d6d77726974ull

struct record {
	uint64_t magic, number, sum;
	uint8_t body[RECORD - 24];
};
_Static_assert(sizeof(struct record) == RECORD, "one record, one block");

static uint64_t checksum(const struct record *r)
{
	uint64_t sum = 0xcbf29ce484222325ull ^ r->number;

	for (size_t i = 0; i < sizeof r->body; i++)
		sum = (sum ^ r->body[i]) * 0x100000001b3ull;
	return sum;
}

static void fill(struct record *r, uint64_t number)
{
	uint64_t x = number * 0x9e3779b97f4a7c15ull | 1;

	r->magic = MAGIC;
	r->number = number;
	for (size_t i = 0; i < sizeof r->body; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		r->body[i] = x;
	}
	r->sum = checksum(r);
}

static int write_records(int fd, struct record *r, uint64_t count, int flush)
{
	char line[32];

	for (uint64_t n = 1; n <= count; n++) {
		fill(r, n);
		ssize_t done = pwrite(fd, r, RECORD, n * RECORD);
		if (done != RECORD) {
			fprintf(stderr, "block-writer: record %lu: %s\n", n,
				done < 0 ? strerror(errno) : "short write");
			return 1;
		}
		if (flush && fdatasync(fd) < 0) {
			fprintf(stderr, "block-writer: flush after record %lu: %s\n", n, strerror(errno));
			return 1;
		}
		int length = snprintf(line, sizeof line, "ACK %lu\n", n);
		if (write(1, line, length) != length)
			return 1;
	}
	return 0;
}

static int check_records(int fd, struct record *r, uint64_t last)
{
	uint64_t lost = 0;

	for (uint64_t n = 1; n <= last; n++) {
		if (pread(fd, r, RECORD, n * RECORD) != RECORD) {
			fprintf(stderr, "block-writer: cannot read record %lu: %s\n", n, strerror(errno));
			return 2;
		}
		if (r->magic == MAGIC && r->number == n && r->sum == checksum(r))
			continue;
		if (lost++ < 5)
			printf("block-writer: record %lu is %s\n", n,
			       r->magic != MAGIC ? "missing" : r->number != n ? "another one" : "torn");
	}
	printf("block-writer: %lu of %lu acknowledged records lost\n", lost, last);
	return lost ? 1 : 0;
}

int main(int argc, char **argv)
{
	int flush = 1, writing = argc > 2 && !strcmp(argv[1], "write");
	uint64_t number = writing ? UINT64_MAX / RECORD : 0;
	void *buffer;

	if (argc < 3 || (!writing && (strcmp(argv[1], "check") || argc < 4))) {
		fprintf(stderr, "usage: block-writer write DEVICE [--no-flush] [COUNT]\n"
				"       block-writer check DEVICE LAST\n");
		return 2;
	}
	for (int i = 3; i < argc; i++) {
		if (!strcmp(argv[i], "--no-flush"))
			flush = 0;
		else
			number = strtoull(argv[i], NULL, 10);
	}
	if (posix_memalign(&buffer, RECORD, RECORD))
		return 2;
	int fd = open(argv[2], (writing ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_DIRECT);
	if (fd < 0 && errno == EINVAL) /* a file system without O_DIRECT */
		fd = open(argv[2], (writing ? O_RDWR : O_RDONLY) | O_CLOEXEC);
	if (fd < 0) {
		fprintf(stderr, "block-writer: cannot open %s: %s\n", argv[2], strerror(errno));
		return 2;
	}
	return writing ? write_records(fd, buffer, number, flush) : check_records(fd, buffer, number);
}
