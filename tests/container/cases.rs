//! The table: what a container is started with, and what must come of it, behind either wall.

/// What is expected of an output.
pub enum Want {
    Any,
    Is(String),
    Has(&'static str),
    Holds(fn(&str) -> bool),
}

/// One line of the table.
pub struct Case {
    pub name: &'static str,
    /// `{DIR}` in them is a directory of the host that is the case's own: `env`, `secret`, `bind/file`.
    pub options: Vec<&'static str>,
    /// Empty for the image's own.
    pub command: Vec<&'static str>,
    pub stdin: Vec<u8>,
    pub code: i32,
    pub stdout: Want,
    pub stderr: Want,
    /// Cannot be in a VM with others: it is about the machine, or about what belongs to the first container.
    pub alone: bool,
    /// Is over before anything would be started.
    pub refused: bool,
}

fn case(name: &'static str, options: &[&'static str], command: &[&'static str]) -> Case {
    Case {
        name,
        options: options.to_vec(),
        command: command.to_vec(),
        stdin: vec![],
        code: 0,
        stdout: Want::Any,
        stderr: Want::Is(String::new()),
        alone: false,
        refused: false,
    }
}

fn shell(name: &'static str, options: &[&'static str], script: &'static str) -> Case {
    case(name, options, &["sh", "-c", script])
}

/// One that rvmm must refuse, with a message that has these words.
fn refused(name: &'static str, options: &[&'static str], why: &'static str) -> Case {
    Case { refused: true, ..case(name, options, &["true"]).code(125).out("").error(why) }
}

impl Case {
    fn out(mut self, text: &str) -> Case {
        self.stdout = Want::Is(text.into());
        self
    }
    fn has(mut self, text: &'static str) -> Case {
        self.stdout = Want::Has(text);
        self
    }
    fn holds(mut self, check: fn(&str) -> bool) -> Case {
        self.stdout = Want::Holds(check);
        self
    }
    fn error(mut self, text: &'static str) -> Case {
        self.stderr = Want::Has(text);
        self
    }
    fn code(mut self, code: i32) -> Case {
        self.code = code;
        self
    }
    fn input(mut self, bytes: &[u8]) -> Case {
        self.stdin = bytes.to_vec();
        self
    }
    fn alone(mut self) -> Case {
        self.alone = true;
        self
    }
}

/// All of them.
pub fn all() -> Vec<Case> {
    [process(), streams(), users(), walls(), limits(), files(), machine(), refusals()]
        .into_iter()
        .flatten()
        .collect()
}

fn process() -> Vec<Case> {
    vec![
        case("the image's own command runs", &[], &[]).out("the image's command\n"),
        shell("exit code 0", &[], "exit 0").out(""),
        shell("exit code 7", &[], "exit 7").code(7),
        shell("exit code 255", &[], "exit 255").code(255),
        shell("a child's death by a signal", &[], "sh -c 'kill -9 $$'; exit $?").code(137).error(""),
        case("a program that is not there", &[], &["nowhere"]).code(127).error("nowhere"),
        case("a path that is not there", &[], &["/bin/nowhere"]).code(127).error("nowhere"),
        case("a file that is no program", &[], &["/etc/not-a-program"]).code(126).error("not-a-program"),
        case("a directory as program", &[], &["/etc"]).code(126).error("/etc"),
        case("an interpreter that is not there", &[], &["bad-interpreter"]).code(126).error("interpreter"),
        case(
            "arguments with odd characters",
            &[],
            &[
                "printf",
                "<%s>",
                "",
                " ",
                "a b",
                "'\"",
                "$HOME",
                "\\n",
                "*",
                "new\nline",
                "\t\x01\x7f",
                "ü€😀",
                "-x",
                "--",
            ],
        )
        .out("<>< ><a b><'\"><$HOME><\\n><*><new\nline><\t\x01\x7f><ü€😀><-x><-->"),
        case("an entrypoint", &["--entrypoint", "echo"], &["one", "two"]).out("one two\n"),
        case("an entrypoint drops the image's command", &["--entrypoint", "pwd"], &[]).out("/home\n"),
        case(
            "arguments that look like options",
            &["--entrypoint", "echo"],
            &["-h", "--rm", "-p", "1:1", "--", "-x"],
        )
        .out("-h --rm -p 1:1 -- -x\n"),
        case("no entrypoint", &["--entrypoint="], &["echo", "x"]).out("x\n"),
        shell("process 1", &[], "echo $$; ls -d /proc/[0-9]* | wc -l").holds(|text| {
            let mut lines = text.lines().map(|line| line.trim().parse::<u32>().unwrap_or(99));
            lines.next() == Some(1) && lines.next().is_some_and(|count| count <= 4)
        }),
        shell("an init of its own", &["--init"], "[ $$ != 1 ] && grep PPid /proc/$$/status; exit 3")
            .out("PPid:\t1\n")
            .code(3),
        shell(
            "an init reaps",
            &["--init"],
            "(sleep 0.1 & ); sleep 1; grep -l 'State:.Z' /proc/[0-9]*/status; true",
        )
        .out(""),
        shell("the image's environment", &[], "echo $OF_IMAGE $BOTH $PATH $HOME")
            .out("yes image /bin /root\n"),
        shell(
            "variables",
            &["-e", "A=1", "-e", "B=two words", "-e", "BOTH=mine", "-e", "EMPTY="],
            "echo \"$A,$B,$BOTH,${EMPTY-no}\"",
        )
        .out("1,two words,mine,\n"),
        shell(
            "a variable of the caller's",
            &["-e", "TABLE_TEST", "-e", "OF_IMAGE"],
            "echo $TABLE_TEST ${OF_IMAGE-none}",
        )
        .out("from the caller none\n"),
        shell(
            "a file of variables",
            &["--env-file", "{DIR}/env", "-e", "LAST=flag"],
            "echo \"$ONE|$TWO|$LAST|$HASH\"",
        )
        .out("1|two = 2|flag|a#b\n"),
        shell("the image's working directory", &[], "pwd").out("/home\n"),
        shell("a working directory that is made", &["-w", "/made/for/it"], "pwd; stat -c %u:%a .")
            .out("/made/for/it\n0:755\n"),
        shell("the file mode mask", &[], "umask").out("0022\n"),
        case("signals as they were", &[], &["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"])
            .out("SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n"),
        shell("no descriptors but three", &[], "exec 3>&-; ls /proc/1/fd >/tmp/fds; tr '\\n' ' ' </tmp/fds")
            .holds(|text| {
                text.split_whitespace().all(|fd| fd.parse::<u32>().is_ok_and(|fd| fd <= 2 || fd == 10))
            }),
    ]
}

fn streams() -> Vec<Case> {
    vec![
        shell("outputs apart", &[], "echo out; echo err >&2").out("out\n").error("err\n"),
        case("input to its end", &["-i"], &["cat"]).input(b"one\ntwo").out("one\ntwo"),
        case("input of any bytes", &["-i"], &["od", "-An", "-tx1"])
            .input(b"\0\xff\x80\n\r")
            .out(" 00 ff 80 0a 0d\n"),
        case("a mebibyte of input", &["-i"], &["wc", "-c"]).input(&vec![b'x'; 1 << 20]).out("1048576\n"),
        case("no input unless asked", &[], &["cat"]).input(b"not for it").out(""),
        shell("input that nobody reads", &["-i"], "exit 4").input(&vec![b'x'; 1 << 20]).code(4),
        shell("a mebibyte of output", &[], "yes 0123456789abcde | head -c 1048576").holds(|text| {
            text.len() == 1 << 20 && text.as_bytes().chunks(16).all(|line| line == b"0123456789abcde\n")
        }),
        shell("output after the last line's end", &[], "printf no-newline").out("no-newline"),
        shell(
            "what children print after the end of process 1's input",
            &[],
            "(sleep 0.3; echo late) & wait; echo end",
        )
        .out("late\nend\n"),
        shell(
            "a terminal",
            &["-t"],
            "test -t 0 && test -t 1 && test -t 2 && echo $TERM; echo to-stderr >&2; stty -a | grep -c echo",
        )
        .holds(|text| text.starts_with("xterm\r\nto-stderr\r\n")),
    ]
}

fn users() -> Vec<Case> {
    const ID: &str = "echo $(id -u):$(id -g):$(id -G) $HOME; echo x >/dev/stdout";
    vec![
        shell("root", &[], ID).out("0:0:0 /root\nx\n"),
        shell("a user by name", &["-u", "ann"], ID).out("1000:1000:1000 29 /home/ann\nx\n"),
        shell("a user by number", &["-u", "1000"], ID).out("1000:1000:1000 29 /home/ann\nx\n"),
        shell("a user and a group by name", &["-u", "bob:audio"], ID).out("1001:29:29 /\nx\n"),
        shell("numbers of nobody", &["-u", "77:88"], ID).out("77:88:88 /\nx\n"),
        shell("further groups", &["-u", "77:88", "--group-add", "audio", "--group-add", "99"], ID)
            .out("77:88:88 29 99 /\nx\n"),
        shell(
            "a user's walls",
            &["-u", "ann"],
            "cat /root/x 2>&1; touch /x 2>&1; touch /home/ann/x && ls /home/ann",
        )
        .out("cat: can't open '/root/x': Permission denied\ntouch: /x: Permission denied\nx\n"),
        shell("a user in a terminal", &["-t", "-u", "ann"], "echo x >$(tty) && id -u").out("x\r\n1000\r\n"),
        shell("a user that is not there", &["-u", "nobody-here"], "true")
            .code(125)
            .out("")
            .error("nobody-here"),
        shell("a group that is not there", &["-u", "ann:no-group"], "true")
            .code(125)
            .out("")
            .error("no-group"),
    ]
}

fn walls() -> Vec<Case> {
    const CAPS: &str = "grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status | cut -f2 | tr '\\n' ' '";
    const NONE: &str =
        "0000000000000000 0000000000000000 0000000000000000 0000000000000000 0000000000000000 ";
    const SYSCALLS: &str = "grep -E '^Seccomp:|NoNewPrivs' /proc/self/status | cut -f2 | tr '\\n' ' '";
    vec![
        shell("capabilities", &[], CAPS)
            .out("0000000000000000 00000000a80425fb 00000000a80425fb 00000000a80425fb 0000000000000000 "),
        shell("capabilities of a user", &["-u", "ann"], CAPS)
            .out("0000000000000000 0000000000000000 0000000000000000 00000000a80425fb 0000000000000000 "),
        shell("no capabilities", &["--cap-drop", "ALL"], CAPS).out(NONE),
        shell("one capability", &["--cap-drop", "ALL", "--cap-add", "CHOWN"], CAPS)
            .out("0000000000000000 0000000000000001 0000000000000001 0000000000000001 0000000000000000 "),
        shell("a further capability", &["--cap-add", "net_admin,CAP_SYS_TIME"], CAPS)
            .out("0000000000000000 00000000aa0435fb 00000000aa0435fb 00000000aa0435fb 0000000000000000 "),
        shell("what a capability is for", &["--cap-drop", "CHOWN"], "chown 5 /etc/passwd 2>&1")
            .code(1)
            .has("Operation not permitted"),
        shell("privileged", &["--privileged"], "grep CapEff /proc/self/status; grep ^Seccomp: /proc/self/status; mount -t tmpfs x /tmp && echo mounted")
            .holds(|text| text.contains("Seccomp:\t0") && text.ends_with("mounted\n") && {
                    let digits = text.lines().next().and_then(|line| line.split('\t').nth(1)).unwrap_or_default();
                    // All that the host has: without those that the tests themselves are without.
                    u64::from_str_radix(digits, 16).is_ok_and(|set| set & (1 << 21 | 1 << 12) == 1 << 21 | 1 << 12)
                }),
        shell("a filter of system calls", &[], SYSCALLS).out("0 2 "),
        shell("without a filter", &["--security-opt", "seccomp=unconfined"], SYSCALLS).out("0 0 "),
        shell("no new privileges", &["--security-opt", "no-new-privileges"], SYSCALLS).out("1 2 "),
        shell("a filter of one's own", &["--security-opt", "seccomp={DIR}/filter.json"], "mkdir /tmp/x 2>&1; rmdir /tmp 2>&1; echo $?")
            .has("mkdir: can't create directory '/tmp/x': Operation not permitted"),
        shell("no namespaces inside", &[], "unshare -m true 2>&1").code(1).has("Operation not permitted"),
        shell("no mounts inside", &[], "mount -t tmpfs x /tmp 2>&1").code(1).has("ermission"),
        shell("no clock", &[], "date -s 2001-01-01 2>&1").has("not permitted"),
        shell("no disks", &[], "(mknod /tmp/d b 254 0 && dd if=/tmp/d of=/dev/null count=1) 2>&1").code(1).has("not permitted"),
        shell("hidden parts of /proc and /sys", &[], "cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c; ls /proc/acpi /sys/firmware 2>/dev/null | grep -v : | grep -c .")
            .out("0\n0\n")
            .code(1),
        shell("/proc/sys cannot be written", &[], "echo 1 >/proc/sys/kernel/panic").code(1).error("ead-only"),
        shell("/proc/sysrq-trigger cannot be written", &[], "echo h >/proc/sysrq-trigger").code(1).error("can't create"),
        shell("/sys cannot be written", &[], "mkdir /sys/fs/cgroup/x 2>&1; echo 1 >/sys/kernel/profiling").code(1).error(""),
        shell("paths shown", &["--security-opt", "systempaths=unconfined"], "grep -c ' /proc/' /proc/mounts").code(1).out("0\n"),
        // Where the kernel has /proc/kcore, libcontainer links to it, and it is masked.
        shell("devices", &[], "ls /dev | grep -v '^k*core$' | tr '\\n' ' '")
            .out("fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero "),
        shell("a device by another name", &["--device", "/dev/null:/dev/own"], "echo x >/dev/own && test -c /dev/own && echo yes")
            .out("yes\n"),
        refused("a device that is not there", &["--device", "/dev/nowhere"], "/dev/nowhere"),
        shell("devices work", &[], "head -c 8 /dev/urandom | wc -c; head -c 3 /dev/zero | wc -c; echo x >/dev/null; echo x >/dev/full")
            .out("8\n3\n")
            .code(1)
            .error("o space left"),
    ]
}

fn limits() -> Vec<Case> {
    vec![
        shell(
            "resource limits",
            &["--ulimit", "nofile=100:200", "--ulimit", "core=0"],
            "ulimit -n; ulimit -Hn; ulimit -c",
        )
        .out("100\n200\n0\n"),
        shell(
            "more memory than the limit",
            &["--memory", "32M", "--memory-swap", "32M"],
            "exec tail /dev/zero",
        )
        .code(137)
        .error(""),
        shell("a child's memory", &["--memory", "32M", "--memory-swap", "32M"], "tail /dev/zero; echo $?")
            .has("137\n")
            .error(""),
        shell(
            "the memory limit can be seen",
            &["--memory", "64M"],
            "cd /sys/fs/cgroup; cat memory.max memory/memory.limit_in_bytes 2>/dev/null | head -n1",
        )
        .out("67108864\n"),
        shell(
            "processes",
            &["--pids-limit", "8"],
            "for i in 1 2 3 4 5 6 7 8 9; do sleep 2 & done; wait; echo no",
        )
        .error("fork")
        .holds(|text| !text.contains("no"))
        .code(2),
        shell(
            "the limit of processes can be seen",
            &["--pids-limit", "77"],
            "cd /sys/fs/cgroup; cat pids.max pids/pids.max 2>/dev/null | head -n1",
        )
        .out("77\n"),
        shell(
            "processor time",
            &["--cpus", "0.5"],
            "cd /sys/fs/cgroup; cat cpu.max cpu/cpu.cfs_quota_us 2>/dev/null | head -n1 | cut -d' ' -f1",
        )
        .out("50000\n"),
        shell("one processor", &["--cpuset-cpus", "0"], "grep Cpus_allowed_list /proc/self/status")
            .out("Cpus_allowed_list:\t0\n"),
        shell(
            "shared memory",
            &["--shm-size", "3M"],
            "df -k /dev/shm | tail -n1 | awk '{print $2}'; head -c 4194304 /dev/zero >/dev/shm/x",
        )
        .out("3072\n")
        .code(1)
        .error("rror"),
        shell("kernel parameters", &["--sysctl", "kernel.msgmax=16384"], "cat /proc/sys/kernel/msgmax")
            .out("16384\n"),
        shell(
            "kernel parameters of networks",
            &["--sysctl", "net.ipv4.ip_forward=1"],
            "cat /proc/sys/net/ipv4/ip_forward",
        )
        .out("1\n")
        .alone(),
    ]
}

fn files() -> Vec<Case> {
    vec![
        shell("the root can be written", &[], "echo x >/etc/new && cat /etc/new && rm -r /data && ls /")
            .has("etc\n"),
        shell(
            "a read-only root",
            &["--read-only"],
            "touch /x 2>&1; touch /etc/passwd 2>&1; touch /dev/shm/x && echo shm",
        )
        .out("touch: /x: Read-only file system\ntouch: /etc/passwd: Read-only file system\nshm\n"),
        shell(
            "a read-only root with memory on it",
            &["--read-only", "--tmpfs", "/tmp"],
            "echo x >/tmp/x && cat /tmp/x",
        )
        .out("x\n"),
        shell(
            "memory with a size",
            &["--tmpfs", "/t:size=2m,mode=1770"],
            "stat -c %a /t; head -c 3145728 /dev/zero >/t/x",
        )
        .out("1770\n")
        .code(1)
        .error("rror"),
        shell(
            "memory runs no programs unless told",
            &["--tmpfs", "/t", "--tmpfs", "/u:exec"],
            "cp /bin/busybox /t; cp /bin/busybox /u; /u/busybox echo ran; /t/busybox echo ran",
        )
        .out("ran\n")
        .code(126)
        .error("ermission denied"),
        shell(
            "a directory of the host",
            &["-v", "{DIR}/bind:/b"],
            "cat /b/file; echo more >/b/new; cat /b/new",
        )
        .out("of the host\nmore\n"),
        shell("a directory of the host, to read", &["-v", "{DIR}/bind:/b:ro"], "cat /b/file; touch /b/x")
            .out("of the host\n")
            .code(1)
            .error("ead-only"),
        shell(
            "a file of the host",
            &["--mount", "type=bind,source={DIR}/bind/file,target=/etc/one,readonly"],
            "cat /etc/one; echo >/etc/one",
        )
        .out("of the host\n")
        .code(1)
        .error("ead-only"),
        shell("a directory of the host that is made", &["-v", "{DIR}/made:/b"], "touch /b/x && ls /b")
            .out("x\n"),
        shell(
            "owners of the host",
            &["-v", "{DIR}/bind:/b"],
            "touch /b/x; chown 1000:29 /b/x; stat -c %u:%g /b/x; ln -s x /b/l; readlink /b/l",
        )
        .out("1000:29\nx\n"),
        shell(
            "a mount in a mount",
            &["-v", "{DIR}/bind:/b", "--tmpfs", "/b/t"],
            "touch /b/t/x; ls /b/t; cat /b/file",
        )
        .out("x\nof the host\n"),
        shell(
            "a volume gets what the image has there",
            &["-v", "table-fill:/data"],
            "cat /data/seed; echo 1 >/data/x && cat /data/x",
        )
        .out("from the image\n1\n"),
        shell("a volume without a name", &["-v", "/data"], "cat /data/seed; echo 1 >/data/x && cat /data/x")
            .out("from the image\n1\n"),
        shell("a volume to read", &["-v", "table-read:/data:ro"], "cat /data/seed; touch /data/x")
            .out("from the image\n")
            .code(1)
            .error("ead-only"),
        shell(
            "a secret",
            &["--secret", "id=pw,src={DIR}/secret,uid=1000,mode=0400"],
            "cat /run/secrets/pw; stat -c %u:%a /run/secrets/pw; env | grep -c hidden",
        )
        .out("hidden\n1000:400\n0\n")
        .code(1),
        shell(
            "a secret is no file of the root",
            &["--secret", "id=pw,src={DIR}/secret", "-u", "ann"],
            "cat /run/secrets/pw 2>&1; grep -c ' /run/secrets' /proc/mounts",
        )
        .holds(|text| text.lines().last().is_some_and(|mounts| mounts != "0")),
    ]
}

fn machine() -> Vec<Case> {
    vec![
        shell("a host name", &["-h", "box"], "hostname; cat /etc/hostname; echo $HOSTNAME").out("box\nbox\nbox\n").alone(),
        shell("the id as host name", &[], "hostname | wc -c; [ $(hostname) = $HOSTNAME ] && echo same").out("13\nsame\n").alone(),
        shell("lines of /etc/hosts", &["--add-host", "db:10.9.8.7"], "grep db /etc/hosts; grep -c 127.0.0.1 /etc/hosts").holds(|text| {
            text.starts_with("10.9.8.7") && text.ends_with("1\n")
        }),
        shell("name servers", &["--dns", "9.9.9.9", "--dns-search", "example.org", "--dns-option", "ndots:3"], "cat /etc/resolv.conf")
            .holds(|text| ["nameserver 9.9.9.9", "search example.org", "options ndots:3"].iter().all(|line| text.contains(line)))
            .alone(),
        shell("no network", &[], "ls /sys/class/net | grep -v -E 'sit|tunl|ip6|gre|erspan|vti|dummy' | tr '\\n' ' '; ping -c1 -W2 127.0.0.1 >/dev/null && echo loopback")
            .out("lo loopback\n"),
    ]
}

fn refusals() -> Vec<Case> {
    vec![
        refused("a flag that is not there", &["--no-such-flag"], "no-such-flag"),
        refused("too little memory", &["--memory", "1M"], "6 MiB"),
        refused("a size that is none", &["--memory", "lots"], "lots"),
        refused("less swap than memory", &["--memory", "64M", "--memory-swap", "32M"], "memory-swap"),
        refused("a capability that is not there", &["--cap-add", "FLY"], "FLY"),
        refused("a security option that is not there", &["--security-opt", "magic"], "magic"),
        refused("a filter that is not there", &["--security-opt", "seccomp={DIR}/none.json"], "none.json"),
        refused("a relative working directory", &["-w", "here"], "here"),
        refused("two mounts at one place", &["-v", "a:/x", "--tmpfs", "/x"], "/x"),
        refused(
            "a directory that --mount does not make",
            &["--mount", "type=bind,source={DIR}/none,target=/x"],
            "none",
        ),
        refused("a file of variables that is not there", &["--env-file", "{DIR}/none"], "none"),
        refused("a secret that is not there", &["--secret", "id=x,src={DIR}/none"], "none"),
        refused("a name that is none", &["--name", "a/b"], "a/b"),
        refused("a signal that is not there", &["--stop-signal", "SIGNOT"], "SIGNOT"),
        refused("a limit that is not there", &["--ulimit", "nothing=1"], "nothing"),
        refused("a kernel parameter of the host", &["--sysctl", "kernel.panic=1"], "kernel.panic"),
        refused("a port without a network", &["-p", "80:80"], "publish"),
    ]
}
