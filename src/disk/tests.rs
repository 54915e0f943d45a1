#![allow(unsafe_code)]

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use super::*;

fn file(dir: &tempfile::TempDir, name: &str, size_bytes: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).unwrap().set_len(size_bytes).unwrap();
    path
}

const READ_ONLY: Options =
    Options { read_only: true, cache: Cache::Writeback, io: Io::Auto, may_be_empty: false };

/// The message, which must be one line that names the image.
fn refusal(path: &Path, options: &Options) -> String {
    let message = open(path, options).expect_err("the image is refused").to_string();
    assert!(!message.contains('\n') && message.contains(&*path.to_string_lossy()), "{message}");
    message
}

#[test]
fn bad_images_are_refused_with_their_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    nix::unistd::mkfifo(&path("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let cases = [
        (path("none"), "does not exist"),
        (dir.path().to_path_buf(), "is a directory"),
        (path("pipe"), "is a pipe"),
        (PathBuf::from("/dev/null"), "is a character device"),
        (file(&dir, "empty", 0), "is empty"),
        (file(&dir, "odd", 1000), "has 1000 bytes, which is not a multiple of 512"),
        (file(&dir, "sub", 512).join("below"), "Not a directory"),
    ];
    for (path, reason) in cases {
        for options in [Options::default(), READ_ONLY] {
            let error = open(&path, &options).unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            let message = refusal(&path, &options) + &source;
            assert!(message.contains(reason), "{message}");
        }
    }
}

#[test]
fn writer_excludes_all_and_readers_share() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "disk", 1 << 20);
    let writer = open(&path, &Options::default()).unwrap();
    assert_eq!(writer.size_bytes(), 1 << 20);
    let message = refusal(&path, &Options::default());
    let pid = format!("by process {}", std::process::id());
    assert!(message.contains(&pid), "{message}");
    refusal(&path, &READ_ONLY);
    drop(writer);
    let readers = [open(&path, &READ_ONLY).unwrap(), open(&path, &READ_ONLY).unwrap()];
    refusal(&path, &Options::default());
    drop(readers);
    open(&path, &Options::default()).unwrap();
}

/// Holds an image until it is killed; not a test, but the other process of the one below.
#[test]
#[ignore = "run by dead_holder_does_not_keep_the_image"]
fn hold_image() {
    let Some(path) = std::env::var_os("RVMM_TEST_HOLD") else { return };
    let image = Arc::new(open(Path::new(&path), &Options { io: Io::Uring, ..Options::default() }).unwrap());
    let mut engine = Engine::new(image, 8, Durability::OnFlush).unwrap();
    engine.start(Operation::Flush, ());
    engine.wait();
    println!("holding");
    std::thread::sleep(std::time::Duration::from_secs(60));
}

#[test]
fn dead_holder_does_not_keep_the_image() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "disk", 1 << 20);
    for _ in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "disk::tests::hold_image", "--ignored", "--nocapture"])
            .env("RVMM_TEST_HOLD", &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("holding")));
        let message = refusal(&path, &Options::default());
        assert!(message.contains(&format!("by process {}", child.id())), "{message}");
        child.kill().unwrap();
        child.wait().unwrap();
        open(&path, &Options::default()).unwrap();
    }
}

#[test]
fn image_that_this_user_may_not_write_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "disk", 512);
    let secret = file(&dir, "secret", 512);
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o0)).unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).unwrap();
    // SAFETY: changes no more than this thread's rights to files; an ordinary user has none to lose.
    unsafe { libc::setfsuid(65534) };
    assert!(matches!(open(&path, &Options::default()), Err(Error::NotWritable { .. })));
    open(&path, &READ_ONLY).unwrap();
    assert!(matches!(open(&secret, &READ_ONLY), Err(Error::Permission { .. })));
    assert!(matches!(open(&secret, &Options::default()), Err(Error::Permission { .. })));
}

/// A loop device on a file, detached at the end.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path) -> Option<Self> {
        let output =
            std::process::Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let device = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
        Some(Self(device.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// Carries out one operation and returns what came of it.
fn run(image: &Arc<Image>, operation: Operation) -> io::Result<()> {
    let mut engine = Engine::new(Arc::clone(image), 8, Durability::OnFlush).unwrap();
    engine.start(operation, ());
    assert_eq!(engine.in_flight(), 1);
    engine.commit();
    engine.wait();
    let ((), result) = engine.reap().expect("the operation is over");
    assert_eq!(engine.in_flight(), 0);
    result
}

fn write_operation(offset: u64, bytes: &'static [u8]) -> Operation {
    let mut buffers = Buffers::default();
    // SAFETY: the bytes live for ever and are only written from.
    unsafe { buffers.push(bytes.as_ptr().cast_mut(), bytes.len()) };
    Operation::Write { offset, buffers }
}

#[test]
fn block_device_is_an_image_with_its_own_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "disk", 1 << 20);
    let Some(device) = Loop::new(&path) else {
        eprintln!("skipped: this user or host has no loop device to give");
        return;
    };
    for io in [Io::Sync, Io::Uring] {
        let image = Arc::new(open(&device.0, &Options { io, ..Options::default() }).unwrap());
        assert_eq!(image.size_bytes(), 1 << 20);
        refusal(&device.0, &READ_ONLY);
        run(&image, write_operation(0, &[7; 64 << 10])).unwrap();
        run(&image, Operation::Discard { offset: 4096, len: 8192 }).unwrap();
        run(&image, Operation::WriteZeroes { offset: 16384, len: 512, unmap: false }).unwrap();
        run(&image, Operation::WriteZeroes { offset: 20480, len: 4096, unmap: true }).unwrap();
        run(&image, Operation::Flush).unwrap();
        let mut expected = vec![7; 64 << 10];
        for range in [4096..12288, 16384..16896, 20480..24576] {
            expected[range].fill(0);
        }
        let bytes = std::fs::read(&device.0).unwrap();
        assert!(bytes[..64 << 10] == expected);
    }
}

#[test]
fn dropped_engine_has_let_go_of_its_buffers() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "disk", 64 << 20);
    for _ in 0..50 {
        let image = Arc::new(open(&path, &Options { io: Io::Uring, ..Options::default() }).unwrap());
        let mut engine = Engine::new(Arc::clone(&image), 64, Durability::Always).unwrap();
        let mut bytes = vec![1u8; 1 << 20];
        for slot in 0..32 {
            let mut buffers = Buffers::default();
            // SAFETY: `bytes` outlives the engine, which is dropped first, and is not touched until then.
            unsafe { buffers.push(bytes.as_mut_ptr(), bytes.len()) };
            engine.start(Operation::Read { offset: slot << 20, buffers }, ());
        }
        engine.commit();
        drop(engine);
        bytes.fill(9);
        std::thread::sleep(std::time::Duration::from_micros(200));
        assert!(bytes.iter().all(|byte| *byte == 9), "the host wrote to memory that it had let go of");
    }
}

#[test]
fn a_thousand_engines_leak_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "disk", 1 << 20);
    let image = Arc::new(open(&path, &Options { io: Io::Uring, ..Options::default() }).unwrap());
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for _ in 0..1000 {
        let mut engine = Engine::new(Arc::clone(&image), 64, Durability::OnFlush).unwrap();
        engine.start(Operation::Flush, ());
    }
    // Other tests open descriptors meanwhile, but not a thousand.
    assert!(descriptors() < before + 500);
}

/// Makes io_uring_setup fail in this thread, as a seccomp filter around a container does.
fn forbid_io_uring() {
    let statement = |code: u32, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_io_uring_setup as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program lives until the calls return, which copy it; they change what this thread may do and nothing
    // else.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

#[test]
fn host_without_io_uring_gets_system_calls_that_wait() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "disk", 1 << 20);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            forbid_io_uring();
            let image = |io| Arc::new(open(&path, &Options { io, ..Options::default() }).unwrap());
            let auto = image(Io::Auto);
            assert!(Engine::<()>::new(Arc::clone(&auto), 8, Durability::OnFlush).unwrap().fd().is_none());
            run(&auto, write_operation(512, &[7; 512])).unwrap();
            run(&auto, Operation::Flush).unwrap();
            drop(auto);
            assert!(Engine::<()>::new(image(Io::Uring), 8, Durability::OnFlush).is_err());
        });
    });
    assert_eq!(std::fs::read(&path).unwrap()[512..1024], [7; 512]);
}
