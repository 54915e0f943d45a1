#![allow(unsafe_code)]

use std::os::unix::fs::PermissionsExt;

use super::*;

fn file(dir: &tempfile::TempDir, name: &str, size_bytes: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).unwrap().set_len(size_bytes).unwrap();
    path
}

const READ_ONLY: Options = Options { read_only: true, cache: Cache::Writeback, io: Io::Auto };

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
