//! Which kernel runs?

/// Its release, as `uname -r` prints it; empty where it cannot be told.
#[must_use]
pub fn release() -> String {
    nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

/// Its version, major and minor; None where the release does not say.
#[must_use]
pub fn version() -> Option<(u32, u32)> {
    version_in(&release())
}

fn version_in(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_releases() {
        assert_eq!(version_in("6.12.117+deb12-amd64"), Some((6, 12)));
        assert_eq!(version_in("6.1.0-56-amd64"), Some((6, 1)));
        assert_eq!(version_in("7.0"), Some((7, 0)));
        for odd in ["", "6", "x.y", "linux-6.1"] {
            assert_eq!(version_in(odd), None, "{odd}");
        }
        assert!(version().is_some());
    }
}
