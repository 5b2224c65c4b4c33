//! Migration URIs, spelled as QEMU spells them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a migration goes to or comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:HOST:PORT`. An empty host means all interfaces (listening) or this host (connecting).
    Tcp {
        /// Name or address; IPv6 addresses without their brackets.
        host: String,
        /// Port; 0 lets the kernel choose when listening.
        port: u16,
    },
    /// `unix:PATH`: a stream socket in the file system.
    Unix(PathBuf),
    /// `fd:N`: a file descriptor that this process inherited.
    Fd(i32),
    /// `exec:COMMAND`: the standard input (outgoing) or output (incoming) of a shell command.
    Exec(String),
    /// `file:PATH`: a snapshot. QEMU's `,offset=N` behind the path is taken if it is 0.
    File(PathBuf),
}

/// A text that is no migration URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// No transport of that name.
    #[error(
        "'{0}' is not a migration address: use tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND or file:PATH"
    )]
    Transport(String),
    /// `tcp:` without host and port.
    #[error(
        "'{0}' is not of the form tcp:HOST:PORT with a port from 0 to 65535 (IPv6: tcp:[ADDR]:PORT)"
    )]
    Tcp(String),
    /// `fd:` without a number.
    #[error("'{0}' is not of the form fd:N, the number of an inherited file descriptor")]
    Fd(String),
    /// `file:` with an offset.
    #[error(
        "'{0}' gives an offset, but vmferry's snapshots start where their file does: leave ',offset=' out"
    )]
    Offset(String),
    /// Nothing behind the colon.
    #[error("'{0}' lacks what comes after the colon")]
    Empty(String),
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let unknown = || UriError::Transport(text.to_owned());
        let (transport, rest) = text.split_once(':').ok_or_else(unknown)?;
        if !["tcp", "unix", "fd", "exec", "file"].contains(&transport) {
            return Err(unknown());
        }
        if rest.is_empty() {
            return Err(UriError::Empty(text.to_owned()));
        }
        match transport {
            "tcp" => {
                let bad = || UriError::Tcp(text.to_owned());
                let (host, port) = rest.rsplit_once(':').ok_or_else(bad)?;
                let host = match host.strip_prefix('[') {
                    Some(v6) => v6.strip_suffix(']').ok_or_else(bad)?,
                    None if host.contains(':') => return Err(bad()),
                    None => host,
                };
                Ok(Uri::Tcp {
                    host: host.to_owned(),
                    port: port.parse().map_err(|_| bad())?,
                })
            }
            "unix" => Ok(Uri::Unix(rest.into())),
            "fd" => match rest.parse() {
                Ok(fd) if fd >= 0 => Ok(Uri::Fd(fd)),
                _ => Err(UriError::Fd(text.to_owned())),
            },
            "exec" => Ok(Uri::Exec(rest.to_owned())),
            _ => match rest.rsplit_once(",offset=") {
                None => Ok(Uri::File(rest.into())),
                Some((_, offset)) if !is_zero(offset) => Err(UriError::Offset(text.to_owned())),
                Some(("", _)) => Err(UriError::Empty(text.to_owned())),
                Some((path, _)) => Ok(Uri::File(path.into())),
            },
        }
    }
}

/// Whether a number, in decimal or as `0x...`, is 0.
fn is_zero(number: &str) -> bool {
    number.strip_prefix("0x").unwrap_or(number).parse() == Ok(0_u64)
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Uri::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Uri::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Uri::Unix(path) => write!(f, "unix:{}", path.display()),
            Uri::Fd(fd) => write!(f, "fd:{fd}"),
            Uri::Exec(command) => write!(f, "exec:{command}"),
            // An offset in the path's own name would be read as one.
            Uri::File(path) if path.to_string_lossy().contains(",offset=") => {
                write!(f, "file:{},offset=0", path.display())
            }
            Uri::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read_and_printed_alike() {
        for text in [
            "tcp:host:4444",
            "tcp::0",
            "tcp:[::1]:1",
            "unix:/a b",
            "fd:7",
            "exec:cat > x",
            "file:x:y",
            "file:x,offset=1,offset=0",
        ] {
            assert_eq!(text.parse::<Uri>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn an_offset_of_nothing_is_none() {
        for text in ["file:x", "file:x,offset=0", "file:x,offset=0x0"] {
            assert_eq!(text.parse(), Ok(Uri::File("x".into())));
        }
    }

    #[test]
    fn bad_uris_are_refused_with_the_text_that_was_bad() {
        for text in [
            "",
            "tcp",
            "http://x",
            "tcp:",
            "tcp:host",
            "tcp:host:99999",
            "tcp:::1:5",
            "tcp:[::1:5",
            "fd:",
            "fd:-1",
            "fd:x",
            "unix:",
            "file:",
            "file:,offset=0",
            "file:x,offset=",
            "file:x,offset=4096",
            "file:x,offset=0x1000",
            "exec:",
        ] {
            let error = text.parse::<Uri>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")), "{error}");
        }
    }
}
