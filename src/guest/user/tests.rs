use proptest::prelude::*;

use super::*;

const PASSWD: &[u8] =
    b"root:x:0:0:root:/root:/bin/sh\n# a comment\nbroken\nweb:x:33:34:Web:/srv/web:/bin/false\n\
                        1000:x:7:8::/seven:\nnohome:x:50:51:::\n";
const GROUP: &[u8] =
    b"root:x:0:\nadm:x:4:web,root\nweb:x:34:\nlog:x:90:other,web\n90:x:91:\nwheel:x:10:root\n";

fn look_up(user: &str, further: &[&str]) -> Result<Identity, Error> {
    let further: Vec<_> = further.iter().map(|name| (*name).to_owned()).collect();
    resolve(user, &further, PASSWD, GROUP)
}

fn identity(uid: u32, gid: u32, groups: &[u32], home: &str) -> Identity {
    Identity { uid, gid, groups: groups.into(), home: home.to_owned() }
}

#[test]
fn name_has_its_group_further_groups_and_home() {
    assert_eq!(look_up("web", &[]), Ok(identity(33, 34, &[4, 90], "/srv/web")));
    assert_eq!(look_up("root", &[]), Ok(identity(0, 0, &[4, 10], "/root")));
    assert_eq!(look_up("nohome", &[]), Ok(identity(50, 51, &[], "/")));
}

#[test]
fn no_user_is_root() {
    assert_eq!(look_up("", &[]), Ok(identity(0, 0, &[4, 10], "/root")));
    assert_eq!(resolve("", &[], b"", b""), Ok(identity(0, 0, &[], "/")));
    assert_eq!(look_up(":adm", &[]), Ok(identity(0, 4, &[], "/root")));
}

#[test]
fn number_in_the_file_is_that_user() {
    assert_eq!(look_up("33", &[]), Ok(identity(33, 34, &[4, 90], "/srv/web")));
}

#[test]
fn number_that_is_nowhere_is_taken_as_it_is() {
    assert_eq!(look_up("4000", &[]), Ok(identity(4000, 0, &[], "/")));
    assert_eq!(look_up("4000:5000", &[]), Ok(identity(4000, 5000, &[], "/")));
}

#[test]
fn name_of_digits_is_found_by_name() {
    assert_eq!(look_up("1000", &[]), Ok(identity(7, 8, &[], "/seven")));
}

#[test]
fn group_that_was_asked_for_stands_instead_of_memberships() {
    assert_eq!(look_up("web:log", &[]), Ok(identity(33, 90, &[], "/srv/web")));
    assert_eq!(look_up("web:4", &[]), Ok(identity(33, 4, &[], "/srv/web")));
    assert_eq!(look_up("web:777", &[]), Ok(identity(33, 777, &[], "/srv/web")));
}

#[test]
fn further_groups_come_behind_and_only_once() {
    assert_eq!(
        look_up("web", &["wheel", "4", "800", "800"]),
        Ok(identity(33, 34, &[4, 90, 10, 800], "/srv/web"))
    );
}

#[test]
fn who_is_not_there_is_an_error() {
    assert_eq!(look_up("nobody", &[]), Err(Error::NoUser("nobody".into())));
    assert_eq!(look_up("web:staff", &[]), Err(Error::NoGroup("staff".into())));
    assert_eq!(look_up("web", &["staff"]), Err(Error::NoGroup("staff".into())));
    assert_eq!(look_up("broken", &[]), Err(Error::NoUser("broken".into())));
}

#[test]
fn number_out_of_range_is_an_error() {
    for user in ["4294967295", "99999999999999999999", "-1"] {
        assert_eq!(look_up(user, &[]), Err(Error::Range(user.into())));
    }
    assert_eq!(look_up("0:-5", &[]), Err(Error::Range("-5".into())));
}

#[test]
fn home_is_found_by_number() {
    assert_eq!(home_of(33, PASSWD), "/srv/web");
    assert_eq!(home_of(34, PASSWD), "/");
}

#[test]
fn entry_behind_the_bound_does_not_count() {
    let mut file = vec![b'\n'; FILE_BYTES_MAX - 3];
    file.extend_from_slice(b"far:x:1:1::/:\n");
    assert_eq!(resolve("far", &[], &file, b""), Err(Error::NoUser("far".into())));
}

proptest! {
    #[test]
    fn any_files_give_an_answer(user in ".{0,12}", passwd: Vec<u8>, group: Vec<u8>) {
        let _ = resolve(&user, std::slice::from_ref(&user), &passwd, &group);
    }

    #[test]
    fn files_that_look_right_give_an_answer(user in "[a-c0-3:]{0,6}", passwd in "([a-c0-3:,\n]{0,6}:){0,40}", group in "([a-c0-3:,\n]{0,6}:){0,40}") {
        if let Ok(identity) = resolve(&user, &[], passwd.as_bytes(), group.as_bytes()) {
            prop_assert!(!identity.home.is_empty());
        }
    }
}
