// SPDX-License-Identifier: Apache-2.0
/*
 * Both ends of vsock connections, for tests. One thread, so that it works where
 * starting a process takes long.
 *
 *   vsock shell PORT                 a shell for each connection to PORT
 *   vsock echo PORT                  sends back what comes, and the end of it
 *   vsock talk PORT COUNT BYTES      COUNT connections at once to the host's PORT, each sends BYTES and their end,
 *                                    and expects them back; prints "right R wrong W"
 *   vsock churn PORT COUNT           COUNT connections one after the other, a byte each way
 *   vsock hold PORT COUNT            COUNT connections, prints "held", waits until the host has ended all
 *   vsock try PORT                   one connection, prints how it ends
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

#define MOST 512
#define BUFFER 65536

struct stream {
	int fd;
	uint64_t seed, sent, received;
	int told_end, heard_end, wrong;
	size_t from, to; /* what waits in the buffer */
	uint8_t *buffer;
};

static struct stream streams[MOST];
static struct pollfd polled[MOST + 1];

static void die(const char *what)
{
	printf("vsock: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* The bytes of the stream with this seed from `at` on. */
static void pattern(uint64_t seed, uint64_t at, uint8_t *to, size_t len)
{
	uint64_t x = 0;

	for (size_t i = 0; i < len; i++, at++) {
		if (i == 0 || at % 8 == 0) {
			x = (seed << 40) + at / 8 + 0x9e3779b97f4a7c15ull;
			x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
			x = (x ^ x >> 27) * 0x94d049bb133111ebull;
			x ^= x >> 31;
		}
		to[i] = x >> at % 8 * 8;
	}
}

static int listening(unsigned port)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port };
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || bind(fd, (void *)&address, sizeof address) || listen(fd, MOST))
		die("listen");
	return fd;
}

static int connected(unsigned port)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port };
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	if (connect(fd, (void *)&address, sizeof address)) {
		int error = errno;
		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

static void unblock(int fd)
{
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static int shell(unsigned port)
{
	int fd, listener = listening(port);

	signal(SIGCHLD, SIG_IGN);
	while ((fd = accept(listener, NULL, NULL)) >= 0) {
		if (!fork()) {
			signal(SIGCHLD, SIG_DFL);
			dup2(fd, 0);
			dup2(fd, 1);
			dup2(fd, 2);
			close(fd);
			execl("/bin/sh", "sh", NULL);
			_exit(127);
		}
		close(fd);
	}
	die("accept");
	return 1;
}

static int would_block(ssize_t result)
{
	return result < 0 && (errno == EAGAIN || errno == EINTR);
}

/* Moves what can be moved; 0 when the stream is over. */
static int echo_once(struct stream *s)
{
	ssize_t n;

	if (!s->heard_end && s->to < BUFFER) {
		n = read(s->fd, s->buffer + s->to, BUFFER - s->to);
		if (n < 0 && !would_block(n))
			return 0;
		if (n == 0)
			s->heard_end = 1;
		if (n > 0)
			s->to += n;
	}
	if (s->from < s->to) {
		n = send(s->fd, s->buffer + s->from, s->to - s->from, MSG_NOSIGNAL);
		if (n < 0 && !would_block(n))
			return 0;
		if (n > 0)
			s->from += n;
		if (s->from == s->to)
			s->from = s->to = 0;
	}
	return !s->heard_end || s->from < s->to;
}

static _Noreturn void echo(unsigned port)
{
	int listener = listening(port), count = 0;

	unblock(listener);
	for (;;) {
		for (int i = 0; i < count; i++) {
			struct stream *s = &streams[i];
			polled[i].fd = s->fd;
			polled[i].events = (!s->heard_end && s->to < BUFFER ? POLLIN : 0) | (s->from < s->to ? POLLOUT : 0);
		}
		polled[count].fd = listener;
		polled[count].events = count < MOST ? POLLIN : 0;
		if (poll(polled, count + 1, -1) < 0)
			die("poll");
		int before = count;
		if (polled[count].revents & POLLIN) {
			int fd = accept(listener, NULL, NULL);
			if (fd >= 0) {
				unblock(fd);
				streams[count] = (struct stream){ .fd = fd, .buffer = malloc(BUFFER) };
				if (!streams[count++].buffer)
					die("malloc");
			}
		}
		for (int i = before - 1; i >= 0; i--) {
			if (!polled[i].revents || echo_once(&streams[i]))
				continue;
			close(streams[i].fd);
			free(streams[i].buffer);
			streams[i] = streams[--count];
		}
	}
}

static int talk_once(struct stream *s, uint64_t bytes)
{
	static uint8_t part[BUFFER], expected[BUFFER];
	ssize_t n;

	if (!s->told_end) {
		size_t len = bytes - s->sent < BUFFER ? bytes - s->sent : BUFFER;
		pattern(s->seed, s->sent, part, len);
		n = send(s->fd, part, len, MSG_NOSIGNAL);
		if (n < 0 && !would_block(n))
			return 0;
		if (n > 0)
			s->sent += n;
		if (s->sent == bytes) {
			shutdown(s->fd, SHUT_WR);
			s->told_end = 1;
		}
	}
	n = read(s->fd, part, BUFFER);
	if (n < 0)
		return would_block(n);
	if (n == 0) {
		s->heard_end = 1;
		return 0;
	}
	pattern(s->seed, s->received, expected, n);
	s->wrong |= memcmp(part, expected, n) != 0;
	s->received += n;
	return 1;
}

static int talk(unsigned port, int count, uint64_t bytes)
{
	int right = 0, left = count;

	for (int i = 0; i < count; i++) {
		streams[i] = (struct stream){ .fd = connected(port), .seed = i };
		if (streams[i].fd < 0)
			die("connect");
		unblock(streams[i].fd);
	}
	while (left > 0) {
		for (int i = 0; i < count; i++) {
			polled[i].fd = streams[i].fd;
			polled[i].events = POLLIN | (streams[i].told_end ? 0 : POLLOUT);
		}
		if (poll(polled, count, -1) < 0)
			die("poll");
		for (int i = 0; i < count; i++) {
			struct stream *s = &streams[i];
			if (s->fd < 0 || !polled[i].revents || talk_once(s, bytes))
				continue;
			right += s->heard_end && !s->wrong && s->sent == bytes && s->received == bytes;
			close(s->fd);
			s->fd = -1;
			left--;
		}
	}
	printf("right %d wrong %d\n", right, count - right);
	return right != count;
}

static int churn(unsigned port, int count)
{
	char byte = 'x';

	for (int i = 0; i < count; i++) {
		int fd = connected(port);
		if (fd < 0)
			die("connect");
		if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
			die("a byte each way");
		close(fd);
	}
	printf("done %d\n", count);
	return 0;
}

static int hold(unsigned port, int count)
{
	char byte;

	for (int i = 0; i < count; i++) {
		streams[i].fd = connected(port);
		if (streams[i].fd < 0)
			die("connect");
	}
	printf("held\n");
	fflush(stdout);
	for (int i = 0; i < count; i++)
		while (read(streams[i].fd, &byte, 1) > 0)
			;
	printf("ended\n");
	return 0;
}

static int try(unsigned port)
{
	int fd = connected(port);

	printf("%s\n", fd < 0 ? strerror(errno) : "connected");
	return fd < 0;
}

int main(int argc, char **argv)
{
	const char *verb = argc > 2 ? argv[1] : "";
	unsigned port = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
	int count = argc > 3 ? atoi(argv[3]) : 0;

	if (!strcmp(verb, "shell"))
		return shell(port);
	if (!strcmp(verb, "echo"))
		echo(port);
	if (!strcmp(verb, "try"))
		return try(port);
	if (count > 0 && !strcmp(verb, "churn"))
		return churn(port, count);
	if (count > 0 && count <= MOST && !strcmp(verb, "hold"))
		return hold(port, count);
	if (argc > 4 && count > 0 && count <= MOST && !strcmp(verb, "talk"))
		return talk(port, count, strtoull(argv[4], NULL, 10));
	fprintf(stderr, "usage: vsock shell|echo|try PORT, churn|hold PORT COUNT, talk PORT COUNT BYTES\n");
	return 2;
}
