/* SPDX-License-Identifier: Apache-2.0
 *
 * The host's end of scripts/nested-host: starts QEMU, carries the command's streams, and sees to it that QEMU dies
 * with us, however we end (PR_SET_PDEATHSIG). Nothing is kept in files unless asked for.
 *
 *   relay [-t SECONDS] [-b SECONDS] [-k CONSOLE-FILE] [-p PID-FILE] [-s KEY=VALUE]... QEMU ARGS... -- CMD ARGS...
 *
 * A single "--" ends QEMU's arguments. -b limits the time until the command starts, -t the whole run.
 *
 *   relay -c
 *
 * prints the frequency of this machine's time stamp counter in kHz.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>

#include "protocol.h"

#define EXIT_TIMEOUT 124
#define EXIT_FAILED 125
#define SILENCE_MS 120000 /* after which the machine is said to stand still */
#define CONSOLE_TAIL 16384
#define ESCAPE_KEY 0x1d /* Ctrl-] */
#define ESCAPE_MS 1000
/* poll() promises room for this much on a pipe; more could block */
#define WRITE_CHUNK 4096

extern char **environ;

static pid_t qemu = -1;
static const char *pid_file;
static struct termios saved_terminal;
static bool terminal_is_raw;
static char console_tail[CONSOLE_TAIL];
static size_t console_total;

static void stop_machine(void)
{
    if (qemu > 0) {
        kill(qemu, SIGKILL);
        while (waitpid(qemu, NULL, 0) < 0 && errno == EINTR)
            ;
        qemu = -1;
    }
    if (pid_file) {
        unlink(pid_file);
        pid_file = NULL;
    }
    if (terminal_is_raw) {
        tcsetattr(STDIN_FILENO, TCSADRAIN, &saved_terminal);
        terminal_is_raw = false;
    }
}

static _Noreturn void finish(int status)
{
    stop_machine();
    exit(status);
}

static _Noreturn void fail(int status, const char *format, ...)
{
    va_list args;

    stop_machine();
    fputs("nested-host: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(status);
}

/* For ends that only the machine's console can explain. */
static _Noreturn void fail_with_console(int status, const char *what)
{
    size_t have = console_total < CONSOLE_TAIL ? console_total : CONSOLE_TAIL;
    size_t want = have < 3000 ? have : 3000;

    stop_machine();
    if (want > 0) {
        fprintf(stderr, "nested-host: the machine's console ended with:\n");
        for (size_t i = console_total - want; i < console_total; i++) {
            char c = console_tail[i % CONSOLE_TAIL];
            if (c == '\n' || c == '\t' || (c >= ' ' && c != 0x7f))
                fputc(c, stderr);
        }
        if (console_tail[(console_total - 1) % CONSOLE_TAIL] != '\n')
            fputc('\n', stderr);
    }
    fail(status, "%s", what);
}

static void *need(void *p)
{
    if (!p)
        fail(EXIT_FAILED, "out of memory");
    return p;
}

/* Bytes on their way to the machine. Grows only by the configuration and one piece of input. */
static struct {
    unsigned char *bytes;
    size_t len, sent;
} outgoing;

static void send_frame(enum frame type, const void *data, size_t len)
{
    size_t keep = outgoing.len - outgoing.sent;

    if (outgoing.sent > 0)
        memmove(outgoing.bytes, outgoing.bytes + outgoing.sent, keep);
    outgoing.bytes = need(realloc(outgoing.bytes, keep + FRAME_HEADER_BYTES + len));
    frame_header(outgoing.bytes + keep, type, (uint32_t)len);
    if (len > 0)
        memcpy(outgoing.bytes + keep + FRAME_HEADER_BYTES, data, len);
    outgoing.sent = 0;
    outgoing.len = keep + FRAME_HEADER_BYTES + len;
}

static struct {
    char *bytes;
    size_t len;
} config;

static void add_config(const char *key, const char *value)
{
    size_t key_len = strlen(key), value_len = strlen(value);

    config.bytes = need(realloc(config.bytes, config.len + key_len + value_len + 2));
    memcpy(config.bytes + config.len, key, key_len);
    config.bytes[config.len + key_len] = '=';
    memcpy(config.bytes + config.len + key_len + 1, value, value_len + 1);
    config.len += key_len + value_len + 2;
}

static bool get_window(struct window *w)
{
    struct winsize size;
    int fd = isatty(STDIN_FILENO) ? STDIN_FILENO : isatty(STDOUT_FILENO) ? STDOUT_FILENO : STDERR_FILENO;

    if (ioctl(fd, TIOCGWINSZ, &size) != 0)
        return false;
    *w = (struct window){size.ws_row, size.ws_col};
    return true;
}

static void send_config(char **command)
{
    char text[PATH_MAX + 1];
    int terminal = (isatty(STDIN_FILENO) ? TERMINAL_STDIN : 0) | (isatty(STDOUT_FILENO) ? TERMINAL_STDOUT : 0) |
                   (isatty(STDERR_FILENO) ? TERMINAL_STDERR : 0);

    if (!getcwd(text, sizeof text))
        fail(EXIT_FAILED, "cannot tell the working directory: %s", strerror(errno));
    add_config("cwd", text);
    snprintf(text, sizeof text, "%d", terminal);
    add_config("terminal", text);
    struct window w;
    if (get_window(&w)) {
        snprintf(text, sizeof text, "%u", w.rows);
        add_config("rows", text);
        snprintf(text, sizeof text, "%u", w.columns);
        add_config("columns", text);
    }
    for (char **e = environ; *e; e++)
        add_config("env", *e);
    for (char **c = command; *c; c++)
        add_config("arg", *c);
    if (config.len > FRAME_CONFIG_MAX)
        fail(EXIT_FAILED, "environment and arguments are larger than %d bytes", FRAME_CONFIG_MAX);
    send_frame(FRAME_CONFIG, config.bytes, config.len);
}

static void write_pid_file(void)
{
    FILE *f = fopen(pid_file, "we");

    if (!f || fprintf(f, "%ld\n", (long)qemu) < 0 || fclose(f) != 0) {
        const char *name = pid_file;
        fail(EXIT_FAILED, "cannot write %s: %s", name, strerror(errno));
    }
}

static void start_machine(char **argv, size_t argc, int port, int console, sigset_t *old_mask)
{
    char port_arg[64], console_arg[64];
    char *extra[] = {"-chardev", port_arg, "-device", "virtserialport,chardev=port,name=" PORT_NAME,
                     "-chardev", console_arg, "-serial", "chardev:console"};
    size_t extras = sizeof extra / sizeof *extra;
    char **all = need(calloc(argc + extras + 1, sizeof *all));
    pid_t parent = getpid();

    snprintf(port_arg, sizeof port_arg, "socket,id=port,fd=%d", port);
    snprintf(console_arg, sizeof console_arg, "socket,id=console,fd=%d", console);
    memcpy(all, argv, argc * sizeof *all);
    memcpy(all + argc, extra, sizeof extra);

    qemu = fork();
    if (qemu < 0)
        fail(EXIT_FAILED, "cannot start another process: %s", strerror(errno));
    if (qemu == 0) {
        int null = open("/dev/null", O_RDWR);

        /* A session of its own: Ctrl-C on our terminal is ours to handle. Standard error stays, for QEMU's own words. */
        setsid();
        if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent)
            _exit(EXIT_FAILED);
        sigprocmask(SIG_SETMASK, old_mask, NULL);
        signal(SIGPIPE, SIG_DFL);
        dup2(null, STDIN_FILENO);
        dup2(null, STDOUT_FILENO);
        execvp(all[0], all);
        dprintf(STDERR_FILENO, "nested-host: cannot run %s: %s\n", all[0], strerror(errno));
        _exit(EXIT_FAILED);
    }
    free(all);
    close(port);
    close(console);
}

static void make_terminal_raw(void)
{
    struct termios raw;

    if (!isatty(STDIN_FILENO) || tcgetattr(STDIN_FILENO, &saved_terminal) != 0)
        return;
    raw = saved_terminal;
    cfmakeraw(&raw);
    /* The command's terminal inside turns \n into \r\n itself; other writers to this one still need it done. */
    raw.c_oflag = saved_terminal.c_oflag;
    if (isatty(STDOUT_FILENO))
        raw.c_oflag &= ~(tcflag_t)OPOST;
    if (tcsetattr(STDIN_FILENO, TCSADRAIN, &raw) == 0)
        terminal_is_raw = true;
}

/* Whether the third Ctrl-] within a second has just been typed. */
static bool escape_typed(const unsigned char *typed, size_t len)
{
    static int count;
    static int64_t first;

    for (size_t i = 0; i < len; i++) {
        if (typed[i] != ESCAPE_KEY) {
            count = 0;
            continue;
        }
        if (count == 0 || now_ms() - first > ESCAPE_MS) {
            count = 0;
            first = now_ms();
        }
        if (++count == 3)
            return true;
    }
    return false;
}

/* A clock reading and the counter at it, as near as the best of a few tries. */
static void read_clocks(int64_t *ns, int64_t *counter)
{
    int64_t best = INT64_MAX;

    for (int i = 0; i < 50; i++) {
        struct timespec t;
        int64_t before = (int64_t)__builtin_ia32_rdtsc();
        clock_gettime(CLOCK_MONOTONIC_RAW, &t);
        int64_t took = (int64_t)__builtin_ia32_rdtsc() - before;
        if (took < best) {
            best = took;
            *counter = before + took / 2;
            *ns = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
        }
    }
}

static int print_counter_khz(void)
{
    int64_t ns[2], counter[2];

    read_clocks(&ns[0], &counter[0]);
    usleep(20000);
    read_clocks(&ns[1], &counter[1]);
    printf("%.0f\n", (double)(counter[1] - counter[0]) * 1e6 / (double)(ns[1] - ns[0]));
    return 0;
}

static const char *next_value(int *i, int argc, char **argv)
{
    if (++*i >= argc)
        fail(EXIT_FAILED, "relay: %s needs a value", argv[*i - 1]);
    return argv[*i];
}

int main(int argc, char **argv)
{
    const char *console_name = NULL;
    int64_t timeout_ms = 0, boot_ms = 180000, started = now_ms();
    int i = 1, port[2], console[2], console_file = -1;
    char **qemu_argv;
    size_t qemu_argc = 0;
    sigset_t mask, old_mask;

    if (argc == 2 && strcmp(argv[1], "-c") == 0)
        return print_counter_khz();
    for (; i < argc && argv[i][0] == '-' && argv[i][1] != '\0' && argv[i][2] == '\0'; i++) {
        switch (argv[i][1]) {
        case 't': timeout_ms = (int64_t)(strtod(next_value(&i, argc, argv), NULL) * 1000); break;
        case 'b': boot_ms = (int64_t)(strtod(next_value(&i, argc, argv), NULL) * 1000); break;
        case 'k': console_name = next_value(&i, argc, argv); break;
        case 'p': pid_file = next_value(&i, argc, argv); break;
        case 's': {
            char *pair = need(strdup(next_value(&i, argc, argv))), *value = strchr(pair, '=');
            if (!value)
                fail(EXIT_FAILED, "relay: -s needs KEY=VALUE");
            *value = '\0';
            add_config(pair, value + 1);
            free(pair);
            break;
        }
        default: fail(EXIT_FAILED, "relay: unknown option %s", argv[i]);
        }
    }
    qemu_argv = argv + i;
    while (i + (int)qemu_argc < argc && strcmp(qemu_argv[qemu_argc], "--") != 0)
        qemu_argc++;
    if (qemu_argc == 0 || i + (int)qemu_argc + 1 >= argc)
        fail(EXIT_FAILED, "relay: QEMU's or the command's arguments are missing");

    if (console_name) {
        console_file = open(console_name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (console_file < 0)
            fail(EXIT_FAILED, "cannot write %s: %s", console_name, strerror(errno));
    }
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, port) != 0 || socketpair(AF_UNIX, SOCK_STREAM, 0, console) != 0)
        fail(EXIT_FAILED, "cannot make a socket pair: %s", strerror(errno));
    fcntl(port[0], F_SETFD, FD_CLOEXEC);
    fcntl(console[0], F_SETFD, FD_CLOEXEC);
    fcntl(port[0], F_SETFL, O_NONBLOCK);
    fcntl(console[0], F_SETFL, O_NONBLOCK);

    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&mask);
    int handled[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGCHLD, SIGWINCH};
    for (size_t s = 0; s < sizeof handled / sizeof *handled; s++)
        sigaddset(&mask, handled[s]);
    sigprocmask(SIG_BLOCK, &mask, &old_mask);
    int signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0)
        fail(EXIT_FAILED, "cannot make a signalfd: %s", strerror(errno));

    send_config(qemu_argv + qemu_argc + 1);
    start_machine(qemu_argv, qemu_argc, port[1], console[1], &old_mask);
    if (pid_file)
        write_pid_file();

    bool ready = false, input_open = true, qemu_ended = false, port_open = true;
    int qemu_status = 0;
    static unsigned char incoming[FRAME_HEADER_BYTES + FRAME_DATA_MAX];
    size_t incoming_len = 0;
    const unsigned char *pending = NULL; /* of `incoming`, for our stdout or stderr */
    size_t pending_len = 0, frame_bytes = 0;
    int pending_fd = -1;
    int64_t heard = 0, next_nudge = 0;

    for (;;) {
        /* 1. act on what has come in */
        while (!pending && incoming_len >= FRAME_HEADER_BYTES) {
            uint32_t len = frame_length(incoming);
            if (len > FRAME_DATA_MAX)
                fail(EXIT_FAILED, "the machine sent nonsense on its port");
            frame_bytes = FRAME_HEADER_BYTES + len;
            if (incoming_len < frame_bytes)
                break;
            switch (incoming[0]) {
            case FRAME_READY:
                ready = true;
                make_terminal_raw();
                break;
            case FRAME_ALIVE: break;
            case FRAME_STDOUT:
            case FRAME_STDERR:
                pending_fd = incoming[0] == FRAME_STDOUT ? STDOUT_FILENO : STDERR_FILENO;
                pending = incoming + FRAME_HEADER_BYTES;
                pending_len = len;
                break;
            case FRAME_EXIT:
                finish(len == 1 ? incoming[FRAME_HEADER_BYTES] : EXIT_FAILED);
            default:
                fail(EXIT_FAILED, "the machine sent nonsense on its port");
            }
            if (pending && pending_len > 0)
                break;
            pending = NULL;
            memmove(incoming, incoming + frame_bytes, incoming_len - frame_bytes);
            incoming_len -= frame_bytes;
        }
        if (!port_open && !pending && qemu_ended) {
            if (WIFSIGNALED(qemu_status) && WTERMSIG(qemu_status) == SIGKILL)
                fail(128 + SIGKILL, "the machine was killed");
            if (WIFEXITED(qemu_status) && WEXITSTATUS(qemu_status) != 0)
                fail(EXIT_FAILED, "QEMU ended with status %d", WEXITSTATUS(qemu_status));
            fail_with_console(EXIT_FAILED, ready ? "the machine went down before the command ended"
                                                 : "the machine went down before the command started");
        }

        /* 2. time limits */
        int64_t now = now_ms(), limit = 0;
        if (timeout_ms > 0)
            limit = started + timeout_ms;
        if (!ready && (limit == 0 || started + boot_ms < limit))
            limit = started + boot_ms;
        if (limit > 0 && now >= limit) {
            if (timeout_ms > 0 && now >= started + timeout_ms)
                fail(EXIT_TIMEOUT, "time limit of %.1f s reached", (double)timeout_ms / 1000);
            fail_with_console(EXIT_FAILED, "the machine did not start in time");
        }

        /* a machine that waits for us to take its output is not silent */
        if (!ready || pending)
            heard = now;
        if (now - heard >= SILENCE_MS)
            fail_with_console(EXIT_FAILED, "the machine stands still: nothing heard for two minutes");
        if (ready && now >= next_nudge && outgoing.len == outgoing.sent) {
            next_nudge = now + NUDGE_MS;
            send_frame(FRAME_NUDGE, NULL, 0);
        }

        /* 3. wait */
        size_t unsent = outgoing.len - outgoing.sent;
        struct pollfd p[] = {
            {signals, POLLIN, 0},
            {console[0], POLLIN, 0},
            {port_open ? port[0] : -1, (short)((pending ? 0 : POLLIN) | (unsent ? POLLOUT : 0)), 0},
            {ready && input_open && unsent == 0 ? STDIN_FILENO : -1, POLLIN, 0},
            {pending ? pending_fd : -1, POLLOUT, 0},
        };
        int64_t wait = limit > 0 ? limit - now : 60000;
        if (ready && next_nudge - now < wait)
            wait = next_nudge > now ? next_nudge - now : NUDGE_MS;
        if (poll(p, 5, wait > 60000 ? 60000 : (int)wait) < 0 && errno != EINTR)
            fail(EXIT_FAILED, "poll: %s", strerror(errno));

        if (p[0].revents) {
            struct signalfd_siginfo info;
            while (read(signals, &info, sizeof info) == sizeof info) {
                if (info.ssi_signo == SIGWINCH) {
                    struct window w;
                    if (get_window(&w))
                        send_frame(FRAME_WINDOW, &w, sizeof w);
                } else if (info.ssi_signo == SIGCHLD) {
                    if (qemu > 0 && waitpid(qemu, &qemu_status, WNOHANG) == qemu) {
                        qemu = -1;
                        qemu_ended = true;
                    }
                } else
                    finish(128 + (int)info.ssi_signo);
            }
        }
        if (p[1].revents) {
            char text[4096];
            ssize_t n = read(console[0], text, sizeof text);
            for (ssize_t k = 0; k < n; k++)
                console_tail[console_total++ % CONSOLE_TAIL] = text[k];
            if (n > 0 && console_file >= 0 && write(console_file, text, (size_t)n) < 0)
                fail(EXIT_FAILED, "cannot write %s: %s", console_name, strerror(errno));
            if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
                close(console[0]);
                console[0] = -1;
            }
        }
        if (p[2].revents & (POLLIN | POLLHUP | POLLERR)) {
            if (!pending) {
                ssize_t n = read(port[0], incoming + incoming_len, sizeof incoming - incoming_len);
                if (n > 0) {
                    incoming_len += (size_t)n;
                    heard = now;
                } else if (n == 0 || (errno != EAGAIN && errno != EINTR))
                    port_open = false;
            }
        }
        if (p[2].revents & POLLOUT && port_open) {
            ssize_t n = write(port[0], outgoing.bytes + outgoing.sent, unsent);
            if (n > 0)
                outgoing.sent += (size_t)n;
            else if (n < 0 && errno != EAGAIN && errno != EINTR)
                outgoing.sent = outgoing.len; /* its end shows when we read */
        }
        if (p[3].revents) {
            unsigned char data[FRAME_DATA_MAX];
            ssize_t n = read(STDIN_FILENO, data, sizeof data);
            if (n > 0) {
                if (terminal_is_raw && escape_typed(data, (size_t)n))
                    fail(128 + SIGINT, "stopped by Ctrl-] typed three times");
                send_frame(FRAME_STDIN, data, (size_t)n);
            } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
                input_open = false;
                send_frame(FRAME_STDIN, NULL, 0);
            }
        }
        if (p[4].revents) {
            ssize_t n = write(pending_fd, pending, pending_len < WRITE_CHUNK ? pending_len : WRITE_CHUNK);
            if (n < 0 && errno == EPIPE)
                finish(128 + SIGPIPE);
            if (n < 0 && errno != EAGAIN && errno != EINTR)
                fail(EXIT_FAILED, "cannot write the command's output: %s", strerror(errno));
            if (n > 0) {
                pending += n;
                pending_len -= (size_t)n;
            }
            if (pending_len == 0) {
                pending = NULL;
                memmove(incoming, incoming + frame_bytes, incoming_len - frame_bytes);
                incoming_len -= frame_bytes;
            }
        }
    }
}
