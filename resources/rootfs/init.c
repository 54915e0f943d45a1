// SPDX-License-Identifier: Apache-2.0
/*
 * PID 1 of the small busybox system that scripts/build-rootfs makes.
 *
 * One static program instead of a shell script: on a PVM host a fork with exec
 * costs a third of a second and a page fault milliseconds.
 *
 * It tells the monitor that user space is reached, mounts what a shell needs,
 * then runs rvmm.exec="..." from the kernel command line (the exit status goes to
 * the monitor) or an interactive shell, and powers off. The guest-event port is
 * described in docs/guest-kernel.md.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PORT_MARK 0x5f0
#define PORT_STATUS 0x5f1
#define PORT_POWER 0x600
#define MONITOR_ID 0x52
#define POWER_OFF 0x34

enum { MARK_USER_SPACE = 1, MARK_EXEC_START = 2, MARK_EXEC_END = 3 };

#ifndef TIOCGDEV
#define TIOCGDEV 0x80045432
#endif

static char cmdline[4096];

/* musl has no stdio that is cheap to touch; one write is all that is needed. */
static void say(const char *format, ...)
{
	char line[512];
	va_list ap;
	int n;

	va_start(ap, format);
	n = vsnprintf(line, sizeof line, format, ap);
	va_end(ap);
	if (n > (int)sizeof line - 1)
		n = sizeof line - 1;
	if (n > 0 && write(2, line, n) < 0)
		return;
}

/* I/O rights are taken for one access only, so that no child inherits them. */
static void port_write(unsigned short port, unsigned char value)
{
	if (iopl(3) == 0) {
		outb(value, port);
		iopl(0);
		return;
	}
	int fd = open("/dev/port", O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (pwrite(fd, &value, 1, port) != 1)
		say("init: cannot write port 0x%x: %s\n", port, strerror(errno));
	close(fd);
}

static unsigned char port_read(unsigned short port)
{
	unsigned char value = 0xff;

	if (iopl(3) == 0) {
		value = inb(port);
		iopl(0);
		return value;
	}
	int fd = open("/dev/port", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return value;
	if (pread(fd, &value, 1, port) != 1)
		value = 0xff;
	close(fd);
	return value;
}

static void mount_or_say(const char *what, const char *where, const char *options)
{
	if (mount(what, where, what, MS_NOSUID | (strcmp(what, "devtmpfs") ? MS_NODEV : 0) |
		  (strcmp(what, "devpts") ? 0 : MS_NOEXEC), options) < 0 && errno != EBUSY)
		say("init: cannot mount %s on %s: %s\n", what, where, strerror(errno));
}

static void loopback_up(void)
{
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return;
	if (ioctl(fd, SIOCSIFFLAGS, &request) < 0)
		say("init: cannot bring lo up: %s\n", strerror(errno));
	close(fd);
}

/*
 * The value of a parameter, quotes taken off as the kernel does: every '"' opens
 * or closes a part in which blanks do not end the parameter; there is no escape.
 */
static char *parameter(const char *name)
{
	size_t length = strlen(name);
	char *p = cmdline;

	while (*p) {
		while (*p == ' ' || *p == '\n')
			p++;
		char *start = p;
		int quoted = 0;
		while (*p && (quoted || (*p != ' ' && *p != '\n'))) {
			if (*p == '"')
				quoted = !quoted;
			p++;
		}
		size_t size = p - start;
		if (size > length && !strncmp(start, name, length) && start[length] == '=') {
			char *value = strndup(start + length + 1, size - length - 1);
			if (!value)
				return NULL;
			size_t n = strlen(value);
			if (value[0] == '"') {
				memmove(value, value + 1, n);
				n--;
				if (n && value[n - 1] == '"')
					value[n - 1] = 0;
			}
			return value;
		}
	}
	return NULL;
}

static void read_cmdline(void)
{
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return;
	n = read(fd, cmdline, sizeof cmdline - 1);
	cmdline[n > 0 ? n : 0] = 0;
	close(fd);
}

/*
 * /dev/console cannot be a controlling terminal; the device behind it can. It is
 * init's, not the command's: when a session's leader ends, the kernel hangs its
 * terminal up and throws away what was not sent yet.
 */
static void own_terminal(void)
{
	unsigned int device = 0;
	char path[32];
	int fd;

	setsid();
	if (ioctl(0, TIOCGDEV, &device) < 0)
		return;
	if (major(device) == 4 && minor(device) >= 64)
		snprintf(path, sizeof path, "/dev/ttyS%u", minor(device) - 64);
	else if (major(device) == 229)
		snprintf(path, sizeof path, "/dev/hvc%u", minor(device));
	else
		return;
	fd = open(path, O_RDWR);
	if (fd < 0)
		return;
	ioctl(fd, TIOCSCTTY, 1);
	dup2(fd, 0);
	dup2(fd, 1);
	dup2(fd, 2);
	if (fd > 2)
		close(fd);
}

static pid_t start(char *const argv[], const char *directory)
{
	static char *const environment[] = {
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "TERM=vt100", "USER=root", "SHELL=/bin/sh", NULL,
	};
	pid_t pid = vfork();

	if (pid == 0) {
		sigset_t none;
		sigemptyset(&none);
		setpgid(0, 0);
		tcsetpgrp(0, getpid()); /* SIGTTOU is still blocked */
		sigprocmask(SIG_SETMASK, &none, NULL);
		if (directory && chdir(directory) < 0)
			say("init: cannot enter %s: %s\n", directory, strerror(errno));
		execve("/bin/sh", argv, environment);
		_exit(127);
	}
	if (pid < 0)
		say("init: cannot start /bin/sh: %s\n", strerror(errno));
	return pid;
}

/* The ACPI power button is an input device; there may be none. */
static int open_power_button(void)
{
	char path[32];

	for (int i = 0; i < 8; i++) {
		unsigned long keys[KEY_MAX / (8 * sizeof(long)) + 1] = { 0 };
		snprintf(path, sizeof path, "/dev/input/event%d", i);
		int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
		if (fd < 0)
			return -1;
		if (ioctl(fd, EVIOCGBIT(EV_KEY, sizeof keys), keys) >= 0 &&
		    keys[KEY_POWER / (8 * sizeof(long))] >> KEY_POWER % (8 * sizeof(long)) & 1)
			return fd;
		close(fd);
	}
	return -1;
}

static int power_button_pressed(int fd)
{
	struct input_event event;

	while (read(fd, &event, sizeof event) == sizeof event)
		if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
			return 1;
	return 0;
}

/* Every process is our child or becomes it. kill(-1) cannot tell: it finds kernel threads too. */
static int none_left(void)
{
	pid_t pid;

	while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
		;
	return pid < 0 && errno == ECHILD;
}

static void end_processes(void)
{
	struct timespec pause = { .tv_nsec = 20 * 1000 * 1000 };

	if (none_left())
		return;
	kill(-1, SIGTERM);
	kill(-1, SIGCONT);
	for (int i = 0; i < 100; i++) {
		if (none_left())
			return;
		nanosleep(&pause, NULL);
	}
	kill(-1, SIGKILL);
	while (waitpid(-1, NULL, 0) > 0)
		;
}

static _Noreturn void stop(int how)
{
	end_processes();
	sync();
	tcdrain(0);
	/* Read-only leaves the file system clean; busy is no harm after sync. */
	mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
	/* A kernel without a power switch would only halt; the monitor has one. */
	if (how == RB_POWER_OFF && cmdline[0] && parameter("pvm_syscall_fixup") == NULL &&
	    access("/sys/firmware/acpi", F_OK) < 0 && port_read(PORT_MARK) == MONITOR_ID)
		port_write(PORT_POWER, POWER_OFF);
	reboot(how);
	for (;;)
		pause();
}

int main(void)
{
	port_write(PORT_MARK, MARK_USER_SPACE);
	umask(022);
	reboot(RB_DISABLE_CAD); /* Ctrl-Alt-Del is SIGINT to us */

	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIGPWR);
	sigset_t blocked = set;
	sigaddset(&blocked, SIGTTOU); /* the terminal serves the command's process group */
	sigprocmask(SIG_BLOCK, &blocked, NULL);

	mount_or_say("proc", "/proc", NULL);
	read_cmdline();
	if (access("/dev/null", F_OK) < 0)
		mount_or_say("devtmpfs", "/dev", "mode=0755");
	mkdir("/dev/pts", 0755);
	mount_or_say("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666");
	mkdir("/dev/shm", 01777);
	mount_or_say("sysfs", "/sys", NULL);
	mount_or_say("tmpfs", "/run", "mode=0755");
	mount_or_say("tmpfs", "/tmp", "mode=1777");
	loopback_up();
	own_terminal();

	char *command = parameter("rvmm.exec");
	char *run[] = { "sh", "-c", command, NULL };
	char *shell[] = { "-sh", NULL };
	if (command)
		port_write(PORT_MARK, MARK_EXEC_START);
	pid_t child = command ? start(run, NULL) : start(shell, "/root");
	if (child < 0)
		stop(RB_POWER_OFF);

	struct pollfd wait[2] = {
		{ .fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK), .events = POLLIN },
		{ .fd = open_power_button(), .events = POLLIN },
	};
	for (;;) {
		struct signalfd_siginfo info;

		if (poll(wait, 2, -1) < 0 && errno != EINTR)
			stop(RB_POWER_OFF);
		if (wait[1].revents && power_button_pressed(wait[1].fd))
			stop(RB_POWER_OFF);
		while (read(wait[0].fd, &info, sizeof info) == sizeof info) {
			switch (info.ssi_signo) {
			case SIGUSR1:
				stop(RB_HALT_SYSTEM);
			case SIGTERM: /* what busybox reboot sends */
				stop(RB_AUTOBOOT);
			case SIGINT:
			case SIGPWR:
			case SIGUSR2:
				stop(RB_POWER_OFF);
			}
		}
		int status;
		pid_t pid;
		while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
			if (pid != child)
				continue;
			if (command) {
				port_write(PORT_MARK, MARK_EXEC_END);
				port_write(PORT_STATUS, WIFEXITED(status) ? WEXITSTATUS(status)
									  : 128 + WTERMSIG(status));
			}
			stop(RB_POWER_OFF);
		}
	}
}
