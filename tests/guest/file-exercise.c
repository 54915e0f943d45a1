// SPDX-License-Identifier: Apache-2.0
// Works on files in a folder at random and compares with what it expects: usage: file-exercise FOLDER SECONDS SEED
//
// One file is read, written, mapped, truncated, extended, punched and copied, and its bytes are compared with an array.
// Names are made, linked, moved and deleted, and are compared with a table.
// Ends with 0 if all was as expected, and else says what was not.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { FILE_MAX = 256 << 10, NAMES = 24, PAGE = 4096 };

static unsigned long long state;
static long operations;
static const char *doing = "nothing";

static unsigned rnd(unsigned below)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (unsigned)(state >> 33) % below;
}

__attribute__((noreturn, format(printf, 1, 2))) static void wrong(const char *format, ...)
{
	va_list list;

	printf("wrong after %ld operations, while doing %s: ", operations, doing);
	va_start(list, format);
	vprintf(format, list);
	va_end(list);
	printf(" (%s)\n", strerror(errno));
	exit(1);
}

#define MUST(what) ((what) < 0 ? wrong("%s", #what) : (void)0)

// --- one file's bytes

static unsigned char *expected, *buffer;
static long size;
static int file = -1;

static void open_file(void)
{
	if (file >= 0)
		MUST(close(file));
	MUST(file = open("bytes", O_RDWR | O_CREAT, 0600));
}

static void compare(const unsigned char *found, long at, long len)
{
	for (long i = 0; i < len; i++)
		if (found[i] != expected[at + i])
			wrong("byte %ld of %ld is %d and not %d", at + i, size, found[i], expected[at + i]);
}

static void fill(long at, long len)
{
	for (long i = 0; i < len; i++)
		buffer[i] = (unsigned char)rnd(256);
	if (at > size)
		memset(expected + size, 0, at - size);
	memcpy(expected + at, buffer, len);
	if (at + len > size)
		size = at + len;
}

static void check_size(void)
{
	struct stat stat;

	MUST(fstat(file, &stat));
	if (stat.st_size != size)
		wrong("the file has %lld bytes and not %ld", (long long)stat.st_size, size);
}

static void work_on_bytes(void)
{
	long at = rnd(FILE_MAX), len = 1 + rnd(rnd(4) ? 8192 : 65536);

	if (at + len > FILE_MAX)
		len = FILE_MAX - at;
	switch (rnd(12)) {
	case 0:
	case 1:
	case 2: {
		doing = "read";
		long there = at >= size ? 0 : at + len > size ? size - at : len;
		long got = pread(file, buffer, len, at);
		if (got != there)
			wrong("%ld bytes from %ld are %ld", len, at, got);
		compare(buffer, at, got);
		break;
	}
	case 3:
	case 4:
	case 5: {
		doing = "write";
		fill(at, len);
		if (pwrite(file, buffer, len, at) != len)
			wrong("%ld bytes to %ld", len, at);
		break;
	}
	case 6: {
		doing = "truncate";
		long to = rnd(FILE_MAX);
		MUST(ftruncate(file, to));
		if (to > size)
			memset(expected + size, 0, to - size);
		size = to;
		break;
	}
	case 7: {
		doing = "mapped read";
		if (!size)
			break;
		unsigned char *map = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
		if (map == MAP_FAILED)
			wrong("mmap of %ld bytes", size);
		compare(map, 0, size);
		MUST(munmap(map, size));
		break;
	}
	case 8: {
		doing = "mapped write";
		if (at >= size)
			break;
		if (at + len > size)
			len = size - at;
		unsigned char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
		if (map == MAP_FAILED)
			wrong("mmap of %ld bytes", size);
		fill(at, len);
		memcpy(map + at, buffer, len);
		MUST(msync(map, size, MS_SYNC));
		MUST(munmap(map, size));
		break;
	}
	case 9: {
		doing = "punch";
		if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, len) < 0) {
			if (errno != EOPNOTSUPP)
				wrong("punch %ld+%ld", at, len);
			break;
		}
		if (at < size)
			memset(expected + at, 0, at + len > size ? size - at : len);
		break;
	}
	case 10: {
		doing = "append";
		if (size + len > FILE_MAX)
			break;
		int end = open("bytes", O_WRONLY | O_APPEND);
		MUST(end);
		fill(size, len);
		if (write(end, buffer, len) != len)
			wrong("append %ld", len);
		MUST(close(end));
		break;
	}
	default:
		doing = "sync and open again";
		if (rnd(2))
			MUST(fsync(file));
		open_file();
		check_size();
		break;
	}
	if (rnd(16) == 0)
		check_size();
}

// --- names

static struct {
	int kind; // 0, S_IFREG, S_IFDIR or S_IFLNK
	int number; // which file it is
	int mode;
} names[NAMES];
static int links[4096], next_number = 1;

static const char *name(int n)
{
	static char text[4][32];
	static int turn;
	char *to = text[turn++ % 4];

	snprintf(to, sizeof text[0], "name-%d", n);
	return to;
}

static void expect(int result, int error, const char *what)
{
	int found = result < 0 ? errno : 0;

	if (found != error)
		wrong("%s gives %d and not %d", what, found, error);
}

static void work_on_names(void)
{
	int a = rnd(NAMES), b = rnd(NAMES);
	int fd;

	switch (rnd(8)) {
	case 0:
		doing = "create";
		fd = open(name(a), O_CREAT | O_EXCL | O_WRONLY, 0600);
		expect(fd, names[a].kind ? EEXIST : 0, "open");
		if (fd < 0)
			break;
		MUST(close(fd));
		names[a].kind = S_IFREG;
		names[a].mode = 0600;
		names[a].number = next_number = next_number % 4095 + 1;
		links[next_number] = 1;
		break;
	case 1:
		doing = "mkdir";
		expect(mkdir(name(a), 0700), names[a].kind ? EEXIST : 0, "mkdir");
		if (!names[a].kind) {
			names[a].kind = S_IFDIR;
			names[a].mode = 0700;
			names[a].number = 0;
		}
		break;
	case 2:
		doing = "symlink";
		expect(symlink("some/where", name(a)), names[a].kind ? EEXIST : 0, "symlink");
		if (!names[a].kind) {
			names[a].kind = S_IFLNK;
			names[a].mode = 0777;
			names[a].number = 0;
		}
		break;
	case 3:
		doing = "link";
		if (names[a].kind != S_IFREG)
			break;
		expect(link(name(a), name(b)), names[b].kind ? EEXIST : 0, "link");
		if (!names[b].kind) {
			names[b] = names[a];
			links[names[a].number]++;
		}
		break;
	case 4: {
		doing = "rename";
		if (!names[a].kind || a == b)
			break;
		int error = 0;
		if (names[a].kind == S_IFDIR && names[b].kind && names[b].kind != S_IFDIR)
			error = ENOTDIR;
		if (names[a].kind != S_IFDIR && names[b].kind == S_IFDIR)
			error = EISDIR;
		expect(rename(name(a), name(b)), error, "rename");
		if (error || (names[b].kind && names[a].number && names[a].number == names[b].number))
			break;
		links[names[b].number] -= names[b].kind != 0;
		names[b] = names[a];
		names[a].kind = 0;
		break;
	}
	case 5:
		doing = "delete";
		if (names[a].kind == S_IFDIR) {
			expect(unlink(name(a)), EISDIR, "unlink");
			expect(rmdir(name(a)), 0, "rmdir");
		} else {
			expect(unlink(name(a)), names[a].kind ? 0 : ENOENT, "unlink");
		}
		links[names[a].number] -= names[a].kind != 0;
		names[a].kind = 0;
		break;
	case 6:
		doing = "chmod";
		if (!names[a].kind || names[a].kind == S_IFLNK)
			break;
		int mode = rnd(0777) | 0700;
		MUST(chmod(name(a), mode));
		for (int n = 0; n < NAMES; n++)
			if (n == a || (names[n].kind == S_IFREG && names[a].kind == S_IFREG && names[n].number == names[a].number))
				names[n].mode = mode;
		break;
	default: {
		doing = "stat";
		struct stat stat;
		expect(lstat(name(a), &stat), names[a].kind ? 0 : ENOENT, "lstat");
		if (!names[a].kind)
			break;
		if ((int)(stat.st_mode & S_IFMT) != names[a].kind || (int)(stat.st_mode & 07777) != names[a].mode)
			wrong("%s has mode %o and not %o", name(a), stat.st_mode, names[a].kind | names[a].mode);
		if (names[a].kind == S_IFREG && (int)stat.st_nlink != links[names[a].number])
			wrong("%s has %d links and not %d", name(a), (int)stat.st_nlink, links[names[a].number]);
	}
	}
}

static void check_names(void)
{
	struct dirent *entry;
	int seen = 0, known = 0, n;
	DIR *here = opendir(".");

	doing = "list";
	if (!here)
		wrong("opendir");
	while ((entry = readdir(here)))
		if (sscanf(entry->d_name, "name-%d", &n) == 1) {
			if (!names[n].kind)
				wrong("%s is listed and should not exist", entry->d_name);
			seen++;
		}
	MUST(closedir(here));
	for (n = 0; n < NAMES; n++)
		known += names[n].kind != 0;
	if (seen != known)
		wrong("%d names are listed and not %d", seen, known);
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		printf("usage: file-exercise FOLDER SECONDS SEED\n");
		return 2;
	}
	time_t end = time(NULL) + atoi(argv[2]);
	state = strtoull(argv[3], NULL, 0);
	umask(0);
	expected = calloc(1, FILE_MAX);
	buffer = calloc(1, FILE_MAX);
	MUST(chdir(argv[1]));
	open_file();
	do {
		for (int n = 0; n < 20; n++, operations++)
			work_on_bytes();
		for (int n = 0; n < 20; n++, operations++)
			work_on_names();
		if (rnd(10) == 0)
			check_names();
	} while (time(NULL) < end);
	check_names();
	check_size();
	printf("%ld operations were as expected\n", operations);
	return 0;
}
