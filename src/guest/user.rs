//! Who a process runs as: `USER[:GROUP]` looked up in a container's `passwd` and `group`, as Docker does it.
//!
//! Nothing is opened here, since both sides use it. The files are the image's, so they may be anything.

/// Bytes of `passwd` and of `group` that count; what is behind them does not.
pub const FILE_BYTES_MAX: usize = 1 << 20;
/// Groups of a process at most: NGROUPS_MAX.
const GROUPS_MAX: usize = 65536;

/// Why somebody is nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Neither a name in the file nor a number.
    #[error("unable to find user {0}: no matching entries in passwd file")]
    NoUser(String),
    /// The same for a group.
    #[error("unable to find group {0}: no matching entries in group file")]
    NoGroup(String),
    /// The number is none that the kernel knows.
    #[error("uids and gids must be in range 0-4294967294, and this is {0}")]
    Range(String),
}

/// A user as the kernel knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups, in order, each once.
    pub groups: Vec<u32>,
    /// Home directory; `/` where nothing else is known.
    pub home: String,
}

/// An entry of `passwd`.
struct User<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

/// An entry of `group`.
struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

/// Looks up `user`, which is `USER[:GROUP]`, and `further` groups.
///
/// A user that is not in the file may be a number. The groups of which a user is a member count if no group was asked for.
pub fn resolve(user: &str, further: &[String], passwd: &[u8], group: &[u8]) -> Result<Identity, Error> {
    let (user_part, group_part) = user.split_once(':').unwrap_or((user, ""));
    let number = number(user_part)?;
    let found = users(passwd).find(|entry| match user_part {
        "" => entry.uid == 0,
        name => entry.name == name.as_bytes() || number == Some(entry.uid),
    });
    let mut identity = match (&found, number) {
        (Some(entry), _) => Identity {
            uid: entry.uid,
            gid: entry.gid,
            groups: Vec::new(),
            home: String::from_utf8_lossy(entry.home).into_owned(),
        },
        (None, Some(uid)) => Identity { uid, ..Identity::default() },
        (None, None) if user_part.is_empty() => Identity::default(),
        (None, None) => return Err(Error::NoUser(user_part.to_owned())),
    };
    if identity.home.is_empty() {
        identity.home.push('/');
    }
    if group_part.is_empty() {
        if let Some(entry) = found {
            let groups = groups(group).filter(|group| group.members().any(|name| name == entry.name));
            identity.groups = groups.map(|group| group.gid).take(GROUPS_MAX).collect();
        }
    } else {
        identity.gid = find_group(group_part, group)?;
    }
    for name in further {
        identity.groups.push(find_group(name, group)?);
    }
    let mut seen = std::collections::BTreeSet::new();
    identity.groups.retain(|gid| seen.insert(*gid));
    identity.groups.truncate(GROUPS_MAX);
    Ok(identity)
}

/// The home directory of a user's number; `/` where nothing else is known.
pub fn home_of(uid: u32, passwd: &[u8]) -> String {
    let home = users(passwd).find(|entry| entry.uid == uid).map_or(&b""[..], |entry| entry.home);
    if home.is_empty() { "/".to_owned() } else { String::from_utf8_lossy(home).into_owned() }
}

fn find_group(wanted: &str, file: &[u8]) -> Result<u32, Error> {
    let number = number(wanted)?;
    let found = groups(file).find(|group| group.name == wanted.as_bytes() || number == Some(group.gid));
    found.map(|group| group.gid).or(number).ok_or_else(|| Error::NoGroup(wanted.to_owned()))
}

/// A number, if it is one. Names may begin with digits, so only a whole number counts.
fn number(text: &str) -> Result<Option<u32>, Error> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    // The last number means "no change" to the kernel.
    match text.parse() {
        Ok(number) if number < u32::MAX => Ok(Some(number)),
        _ => Err(Error::Range(text.to_owned())),
    }
}

/// The lines of a file, without comments, cut into fields.
fn entries(file: &[u8]) -> impl Iterator<Item = impl Iterator<Item = &[u8]>> {
    let file = file.get(..FILE_BYTES_MAX).unwrap_or(file);
    let lines = file.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with(b"#"));
    lines.map(|line| line.split(|byte| *byte == b':'))
}

fn id(field: Option<&[u8]>) -> Option<u32> {
    std::str::from_utf8(field?).ok()?.parse().ok().filter(|id| *id < u32::MAX)
}

fn users(file: &[u8]) -> impl Iterator<Item = User<'_>> {
    entries(file).filter_map(|mut fields| {
        let name = fields.next().filter(|name| !name.is_empty())?;
        let (uid, gid) = (id(fields.nth(1))?, id(fields.next())?);
        Some(User { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    })
}

fn groups(file: &[u8]) -> impl Iterator<Item = Group<'_>> {
    entries(file).filter_map(|mut fields| {
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = id(fields.nth(1))?;
        Some(Group { name, gid, members: fields.next().unwrap_or_default() })
    })
}

impl<'a> Group<'a> {
    fn members(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.members.split(|byte| *byte == b',')
    }
}

#[cfg(test)]
mod tests;
