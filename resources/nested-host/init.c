/* SPDX-License-Identifier: Apache-2.0
 *
 * PID 1 of the machine that scripts/nested-host starts. From the initramfs it loads the modules listed in
 * /modules/early and /modules/late, puts an overlay over the host's root, moves into it, and runs the one command that relay.c sends.
 * When that ends, file systems are synced and the status is sent; the host then kills the machine.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <poll.h>
#include <pty.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>

#include "protocol.h"

#define STATUS_NOT_EXECUTABLE 126
#define STATUS_NOT_FOUND 127
/* 9p over virtio carries at most 128 pages in one request, less those of the headers */
#define SHARE_OPTIONS "trans=virtio,version=9p2000.L,msize=512000,access=any"

/* To the console, which the host shows when the machine goes down; `fatal` goes down. */
static void note(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fputs("nested-host: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
}

#define fatal(...)                                                                                                     \
    do {                                                                                                               \
        note(__VA_ARGS__);                                                                                             \
        sync();                                                                                                        \
        reboot(RB_AUTOBOOT); /* with -no-reboot, QEMU ends here */                                                     \
        _exit(1);                                                                                                      \
    } while (0)

static void mount_or_die(const char *source, const char *target, const char *type, unsigned long flags,
                         const char *options)
{
    mkdir(target, 0755);
    if (mount(source, target, type, flags, options) != 0)
        fatal("cannot mount %s on %s: %s", source, target, strerror(errno));
}

/* For what a program may want but most do not. */
static void mount_if_there(const char *type, const char *target)
{
    mkdir(target, 0755);
    if (mount(type, target, type, MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0 && errno != ENODEV)
        note("no %s on %s: %s", type, target, strerror(errno));
}

static bool write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool ok = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

    if (fd >= 0)
        close(fd);
    return ok;
}

static void load_modules(const char *list)
{
    char line[256], path[PATH_MAX];
    FILE *order = fopen(list, "re");

    if (!order)
        fatal("no %s: %s", list, strerror(errno));
    while (fgets(line, sizeof line, order)) {
        line[strcspn(line, "\n")] = '\0';
        snprintf(path, sizeof path, "modules/%s", line);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST))
            note("cannot load %s: %s", line, strerror(errno));
        close(fd);
    }
    fclose(order);
}

/* The port's name stands in sysfs; the driver learns it a little after it has found the device. */
static int open_port(void)
{
    for (int tries = 0; tries < 20000; tries++) {
        DIR *d = opendir("/sys/class/virtio-ports");
        struct dirent *e;

        while (d && (e = readdir(d))) {
            char path[PATH_MAX], name[64] = "";
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", e->d_name);
            FILE *f = fopen(path, "re");
            if (!f)
                continue;
            bool ours = fgets(name, sizeof name, f) && strncmp(name, PORT_NAME, strlen(PORT_NAME)) == 0;
            fclose(f);
            if (!ours)
                continue;
            snprintf(path, sizeof path, "/dev/%s", e->d_name);
            int fd = open(path, O_RDWR | O_CLOEXEC);
            if (fd >= 0) {
                closedir(d);
                return fd;
            }
        }
        if (d)
            closedir(d);
        usleep(1000);
    }
    fatal("no virtio port named %s", PORT_NAME);
}

static void read_all(int fd, void *buffer, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = read(fd, (char *)buffer + done, len - done);
        if (n > 0)
            done += (size_t)n;
        else if (n == 0 || (errno != EINTR && errno != EAGAIN))
            fatal("the host closed the port");
    }
}

static void send_frame(int port, enum frame type, const void *data, size_t len)
{
    unsigned char bytes[FRAME_HEADER_BYTES + FRAME_DATA_MAX];

    frame_header(bytes, type, (uint32_t)len);
    if (len > 0)
        memcpy(bytes + FRAME_HEADER_BYTES, data, len);
    for (size_t done = 0; done < FRAME_HEADER_BYTES + len;) {
        ssize_t n = write(port, bytes + done, FRAME_HEADER_BYTES + len - done);
        if (n > 0)
            done += (size_t)n;
        else if (n < 0 && errno != EINTR && errno != EAGAIN)
            fatal("cannot write to the port: %s", strerror(errno));
    }
}

struct config {
    const char *cwd, *results, *modules;
    int terminal, rows, columns;
    char **env, **args;
};

static struct config read_config(int port)
{
    struct config c = {.cwd = "/"};
    unsigned char header[FRAME_HEADER_BYTES];
    size_t envs = 0, args = 0;

    read_all(port, header, sizeof header);
    uint32_t len = frame_length(header);
    if (header[0] != FRAME_CONFIG || len > FRAME_CONFIG_MAX)
        fatal("the host's first frame is not the configuration");
    char *text = malloc(len + 1);
    /* never more strings than bytes / 3; three more for our own variables and the end */
    c.env = calloc(len / 3 + 4, sizeof *c.env);
    c.args = calloc(len / 3 + 4, sizeof *c.args);
    if (!text || !c.env || !c.args)
        fatal("out of memory");
    read_all(port, text, len);
    text[len] = '\0';
    for (char *at = text; at < text + len; at += strlen(at) + 1) {
        char *value = strchr(at, '=');
        if (!value)
            continue;
        size_t key = (size_t)(value - at);
        value++;
#define IS(name) (key == sizeof name - 1 && memcmp(at, name, key) == 0)
        if (IS("env")) {
            if (strncmp(value, "RVMM_RESULTS=", 13) != 0)
                c.env[envs++] = value;
        } else if (IS("arg"))
            c.args[args++] = value;
        else if (IS("cwd"))
            c.cwd = value;
        else if (IS("results"))
            c.results = value;
        else if (IS("modules"))
            c.modules = value;
        else if (IS("terminal"))
            c.terminal = atoi(value);
        else if (IS("rows"))
            c.rows = atoi(value);
        else if (IS("columns"))
            c.columns = atoi(value);
#undef IS
    }
    if (args == 0)
        fatal("the host sent no command");
    c.env[envs++] = "RVMM_NESTED_HOST=1";
    if (c.results && asprintf(&c.env[envs], "RVMM_RESULTS=%s", c.results) > 0)
        envs++;
    return c;
}

/* Nodes whose opening loads the driver: tun, fuse, vhost-net, loop-control and their like. */
static void make_device_nodes(const char *release)
{
    char path[PATH_MAX], line[512], name[256], kind;
    unsigned major, minor;

    snprintf(path, sizeof path, "/lib/modules/%s/modules.devname", release);
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%*s %255s %c%u:%u", name, &kind, &major, &minor) != 4)
            continue;
        snprintf(path, sizeof path, "/dev/%s", name);
        for (char *slash = strchr(path + 5, '/'); slash; slash = strchr(slash + 1, '/')) {
            *slash = '\0';
            mkdir(path, 0755);
            *slash = '/';
        }
        mknod(path, (kind == 'b' ? S_IFBLK : S_IFCHR) | 0666, makedev(major, minor));
    }
    if (f)
        fclose(f);
}

static void make_cgroups(void)
{
    char controllers[512] = "", enable[1024] = "", *save = NULL;

    mount_or_die("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    FILE *f = fopen("/sys/fs/cgroup/cgroup.controllers", "re");
    if (f && fgets(controllers, sizeof controllers, f)) {
        for (char *c = strtok_r(controllers, " \n", &save); c; c = strtok_r(NULL, " \n", &save)) {
            strcat(enable, " +");
            strcat(enable, c);
        }
        if (!write_file("/sys/fs/cgroup/cgroup.subtree_control", enable))
            note("cannot enable cgroup controllers:%s", enable);
    }
    if (f)
        fclose(f);
}

static void loopback_up(void)
{
    struct ifreq r = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (s < 0 || ioctl(s, SIOCSIFFLAGS, &r) != 0)
        note("cannot set lo up: %s", strerror(errno));
    close(s);
}

static void enter_root(const struct config *c, pid_t loader)
{
    char path[PATH_MAX], modules[PATH_MAX];
    struct utsname u;

    uname(&u);
    mount_or_die("root", "/lower", "9p", MS_RDONLY, SHARE_OPTIONS ",cache=loose");
    mount_or_die("tmpfs", "/upper", "tmpfs", 0, "size=80%,mode=755,huge=never");
    mkdir("/upper/data", 0755);
    mkdir("/upper/work", 0755);
    mount_or_die("overlay", "/root", "overlay", 0,
                 "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work,redirect_dir=on,index=off,xino=off");

    mount_or_die("/dev", "/root/dev", NULL, MS_MOVE, NULL);
    mount_or_die("/proc", "/root/proc", NULL, MS_MOVE, NULL);
    mount_or_die("/sys", "/root/sys", NULL, MS_MOVE, NULL);
    if (chdir("/root") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
        fatal("cannot move into the new root: %s", strerror(errno));

    mkdir("/dev/pts", 0755);
    mkdir("/dev/shm", 01777);
    mount_or_die("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=620,gid=5,ptmxmode=666");
    mount_or_die("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_or_die("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755");
    mkdir("/run/lock", 01777);
    mount_if_there("mqueue", "/dev/mqueue");
    mount_if_there("securityfs", "/sys/kernel/security");
    mount_if_there("debugfs", "/sys/kernel/debug");
    mount_if_there("tracefs", "/sys/kernel/tracing");
    mount_if_there("bpf", "/sys/fs/bpf");
    make_cgroups();
    symlink("/proc/self/fd", "/dev/fd");
    symlink("/proc/self/fd/0", "/dev/stdin");
    symlink("/proc/self/fd/1", "/dev/stdout");
    symlink("/proc/self/fd/2", "/dev/stderr");

    /* so that modprobe, and the kernel calling it, find this kernel's modules under the host's root */
    snprintf(path, sizeof path, "/lib/modules/%s", u.release);
    mkdir("/lib/modules", 0755);
    mkdir(path, 0755);
    if (c->modules) {
        snprintf(modules, sizeof modules, "%s/%s", c->modules, u.release);
        if (mount(modules, path, NULL, MS_BIND, NULL) != 0)
            note("no modules: cannot mount %s on %s: %s", modules, path, strerror(errno));
    }
    while (waitpid(loader, NULL, 0) < 0 && errno == EINTR)
        ;
    make_device_nodes(u.release);
    chmod("/dev/kvm", 0666);

    if (c->results)
        mount_or_die("results", c->results, "9p", 0, SHARE_OPTIONS ",cache=mmap");

    sethostname("nested-host", 11);
    loopback_up();
    struct rlimit files = {1024, 1048576}, core = {0, RLIM_INFINITY};
    setrlimit(RLIMIT_NOFILE, &files);
    setrlimit(RLIMIT_CORE, &core);
}

static _Noreturn void run_command(const struct config *c, int in, int out, int err, bool has_terminal)
{
    sigset_t none;

    setsid();
    dup2(in, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    dup2(err, STDERR_FILENO);
    if (has_terminal) {
        int fd = c->terminal & TERMINAL_STDIN ? STDIN_FILENO : c->terminal & TERMINAL_STDOUT ? STDOUT_FILENO : STDERR_FILENO;
        ioctl(fd, TIOCSCTTY, 0);
    }
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (chdir(c->cwd) != 0) {
        dprintf(STDERR_FILENO, "nested-host: cannot enter %s: %s\n", c->cwd, strerror(errno));
        _exit(STATUS_NOT_EXECUTABLE);
    }
    environ = c->env;
    execvp(c->args[0], c->args);
    int status = errno == ENOENT ? STATUS_NOT_FOUND : STATUS_NOT_EXECUTABLE;
    dprintf(STDERR_FILENO, "nested-host: cannot run %s: %s\n", c->args[0], strerror(errno));
    _exit(status);
}

/* A stream of the command: our end, and whether it is the terminal's master or a pipe. */
struct streams {
    int in, out, err;
    bool in_is_terminal;
};

/* Carries what is there; false at the end of the stream. */
static bool carry(int port, int *fd, enum frame type)
{
    char data[FRAME_DATA_MAX];
    ssize_t n = read(*fd, data, sizeof data);

    if (n > 0) {
        send_frame(port, type, data, (size_t)n);
        return true;
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    close(*fd); /* EIO: nobody has the terminal open any more */
    *fd = -1;
    return false;
}

static void pipe_or_die(int ends[2])
{
    if (pipe2(ends, O_CLOEXEC) != 0)
        fatal("cannot make a pipe: %s", strerror(errno));
}

static int supervise(int port, const struct config *c)
{
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1}, master = -1, slave = -1, status = -1;
    sigset_t mask;

    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    int signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);

    if (c->terminal) {
        struct winsize size = {.ws_row = (unsigned short)c->rows, .ws_col = (unsigned short)c->columns};
        if (openpty(&master, &slave, NULL, NULL, &size) != 0)
            fatal("cannot make a terminal: %s", strerror(errno));
        fcntl(master, F_SETFD, FD_CLOEXEC);
        fcntl(slave, F_SETFD, FD_CLOEXEC);
    }
    if (!(c->terminal & TERMINAL_STDIN))
        pipe_or_die(in);
    if (!(c->terminal & TERMINAL_STDOUT))
        pipe_or_die(out);
    if (!(c->terminal & TERMINAL_STDERR))
        pipe_or_die(err);
    struct streams s = {.in = in[1], .out = out[0], .err = err[0]};
    if (c->terminal & TERMINAL_STDIN) {
        s.in = fcntl(master, F_DUPFD_CLOEXEC, 3);
        s.in_is_terminal = true;
    }
    /* what comes back from the terminal is standard output, unless only standard error is a terminal */
    if (c->terminal & TERMINAL_STDOUT)
        s.out = fcntl(master, F_DUPFD_CLOEXEC, 3);
    else if (c->terminal & TERMINAL_STDERR)
        s.err = fcntl(master, F_DUPFD_CLOEXEC, 3);
    /* a terminal that only takes input still echoes; that goes to standard error, as it is not output */
    int echo = c->terminal == TERMINAL_STDIN ? fcntl(master, F_DUPFD_CLOEXEC, 3) : -1;

    int *nonblocking[] = {&s.in, &s.out, &s.err, &echo};
    for (size_t i = 0; i < 4; i++)
        if (*nonblocking[i] >= 0)
            fcntl(*nonblocking[i], F_SETFL, O_NONBLOCK);

    unsigned char frame[FRAME_HEADER_BYTES + FRAME_DATA_MAX];
    const unsigned char *input = NULL;
    size_t input_len = 0;
    pid_t command = -1;
    int64_t next_alive = 0;

    for (;;) {
        struct pollfd p[] = {
            {signals, POLLIN, 0},
            {input ? -1 : port, POLLIN, 0},
            {input ? s.in : -1, POLLOUT, 0},
            {s.out, POLLIN, 0},
            {s.err, POLLIN, 0},
            {echo, POLLIN, 0},
        };
        if (command < 0) {
            send_frame(port, FRAME_READY, NULL, 0);
            command = fork();
            if (command < 0)
                fatal("fork: %s", strerror(errno));
            if (command == 0)
                run_command(c, in[0] >= 0 ? in[0] : slave, out[1] >= 0 ? out[1] : slave,
                            err[1] >= 0 ? err[1] : slave, c->terminal != 0);
            close(in[0]);
            close(out[1]);
            close(err[1]);
            close(slave);
        }
        if (poll(p, 6, ALIVE_MS) < 0 && errno != EINTR)
            fatal("poll: %s", strerror(errno));

        if (now_ms() >= next_alive) {
            next_alive = now_ms() + ALIVE_MS;
            send_frame(port, FRAME_ALIVE, NULL, 0);
        }
        if (p[3].revents)
            carry(port, &s.out, FRAME_STDOUT);
        if (p[4].revents)
            carry(port, &s.err, FRAME_STDERR);
        if (p[5].revents)
            carry(port, &echo, FRAME_STDERR);
        if (p[1].revents) {
            uint32_t len;
            read_all(port, frame, FRAME_HEADER_BYTES);
            len = frame_length(frame);
            if (len > FRAME_DATA_MAX)
                fatal("the host sent a frame of %u bytes", len);
            read_all(port, frame + FRAME_HEADER_BYTES, len);
            if (frame[0] == FRAME_WINDOW && len == sizeof(struct window)) {
                struct window w;
                memcpy(&w, frame + FRAME_HEADER_BYTES, sizeof w);
                struct winsize size = {.ws_row = w.rows, .ws_col = w.columns};
                if (master >= 0)
                    ioctl(master, TIOCSWINSZ, &size);
            } else if (frame[0] == FRAME_STDIN && len == 0) {
                /* a terminal's end of input is its VEOF character */
                if (s.in_is_terminal)
                    (void)!write(s.in, "\4", 1);
                else if (s.in >= 0) {
                    close(s.in);
                    s.in = -1;
                }
            } else if (frame[0] == FRAME_STDIN && s.in >= 0) {
                input = frame + FRAME_HEADER_BYTES;
                input_len = len;
            }
        }
        if (p[2].revents) {
            ssize_t n = write(s.in, input, input_len);
            if (n > 0) {
                input += n;
                input_len -= (size_t)n;
            }
            if (n < 0 && errno != EAGAIN && errno != EINTR) {
                close(s.in); /* the command reads no more */
                s.in = -1;
                input_len = 0;
            }
            if (input_len == 0)
                input = NULL;
        }
        if (p[0].revents) {
            struct signalfd_siginfo info;
            int how;
            pid_t who;

            (void)!read(signals, &info, sizeof info);
            while ((who = waitpid(-1, &how, WNOHANG)) > 0)
                if (who == command)
                    status = WIFEXITED(how) ? WEXITSTATUS(how) : 128 + WTERMSIG(how);
            if (status >= 0)
                break;
        }
    }
    /* What the command wrote before it ended; what its orphans write later is nobody's. */
    while (s.out >= 0 && carry(port, &s.out, FRAME_STDOUT))
        ;
    while (s.err >= 0 && carry(port, &s.err, FRAME_STDERR))
        ;
    return status;
}

int main(void)
{
    mount_or_die("dev", "/dev", "devtmpfs", MS_NOSUID, "mode=755");
    mount_or_die("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_or_die("sys", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    load_modules("modules/early");
    /* KVM and its like take half a second: on another processor, while this one mounts */
    pid_t loader = fork();
    if (loader < 0)
        fatal("fork: %s", strerror(errno));
    if (loader == 0) {
        load_modules("modules/late"); /* by relative names: its root stays the initramfs */
        _exit(0);
    }
    int port = open_port();
    struct config c = read_config(port);
    enter_root(&c, loader);
    unsigned char status = (unsigned char)supervise(port, &c);
    sync();
    send_frame(port, FRAME_EXIT, &status, 1);
    for (;;)
        pause(); /* the host ends the machine */
}
