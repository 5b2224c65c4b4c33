//! Where a migration goes to or comes from: QEMU's two ways to say it, read into one type.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// Where a migration stream goes to or comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MigrationAddress {
    /// `tcp:host:port`. The host has no brackets around an IPv6 address; the port may be a service's name.
    Tcp {
        /// Name or address; empty to listen on all.
        host: String,
        /// Number or service name.
        port: String,
    },
    /// `unix:path`.
    Unix {
        /// Path of the socket.
        path: PathBuf,
    },
    /// `exec:command`.
    Exec {
        /// Program and its arguments; a URI's command becomes one for `/bin/sh -c`.
        args: Vec<String>,
    },
    /// `file:path` or `file:path,offset=N`.
    File {
        /// Path of the file.
        path: PathBuf,
        /// Byte in the file at which the stream starts.
        offset: u64,
    },
    /// `fd:name`, a descriptor that was passed before.
    Fd {
        /// Name or number of the descriptor.
        name: String,
    },
}

impl fmt::Display for MigrationAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MigrationAddress::Tcp { host, port } if host.contains(':') => {
                write!(f, "tcp:[{host}]:{port}")
            }
            MigrationAddress::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            MigrationAddress::Unix { path } => write!(f, "unix:{}", path.display()),
            MigrationAddress::Exec { args } => match args.as_slice() {
                [shell, dash_c, command] if shell == "/bin/sh" && dash_c == "-c" => {
                    write!(f, "exec:{command}")
                }
                args => write!(f, "exec:{}", args.join(" ")),
            },
            MigrationAddress::File { path, offset: 0 } => write!(f, "file:{}", path.display()),
            MigrationAddress::File { path, offset } => {
                write!(f, "file:{},offset={offset}", path.display())
            }
            MigrationAddress::Fd { name } => write!(f, "fd:{name}"),
        }
    }
}

/// A migration URI that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUri {
    /// None of the known schemes.
    #[error("unknown migration protocol: {0}")]
    UnknownProtocol(String),
    /// Not `host:port`.
    #[error("error parsing address '{0}'")]
    Tcp(String),
    /// No path.
    #[error("invalid Unix socket address")]
    Unix,
    /// No path.
    #[error("file URI lacks a path")]
    File,
    /// An offset that is no number of bytes.
    #[error("file URI has bad offset {0}: use a number of bytes, in decimal or as 0x...")]
    Offset(String),
    /// No name.
    #[error("invalid file descriptor address")]
    Fd,
    /// No command.
    #[error("exec URI lacks a command")]
    Exec,
}

impl FromStr for MigrationAddress {
    type Err = InvalidUri;

    fn from_str(uri: &str) -> Result<Self, InvalidUri> {
        let unknown = || InvalidUri::UnknownProtocol(uri.to_owned());
        let (scheme, rest) = uri.split_once(':').ok_or_else(unknown)?;
        match scheme {
            "tcp" => parse_tcp(rest),
            "unix" if rest.is_empty() => Err(InvalidUri::Unix),
            "unix" => Ok(MigrationAddress::Unix { path: rest.into() }),
            "exec" if rest.is_empty() => Err(InvalidUri::Exec),
            "exec" => Ok(MigrationAddress::Exec {
                args: vec!["/bin/sh".into(), "-c".into(), rest.into()],
            }),
            "file" => parse_file(rest),
            "fd" if rest.is_empty() => Err(InvalidUri::Fd),
            "fd" => Ok(MigrationAddress::Fd { name: rest.into() }),
            _ => Err(unknown()),
        }
    }
}

fn parse_tcp(text: &str) -> Result<MigrationAddress, InvalidUri> {
    let split = match text.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once("]:"),
        None => text.split_once(':').filter(|(_, port)| !port.contains(':')),
    };
    match split {
        Some((host, port)) if !port.is_empty() => Ok(MigrationAddress::Tcp {
            host: host.into(),
            port: port.into(),
        }),
        _ => Err(InvalidUri::Tcp(text.to_owned())),
    }
}

fn parse_file(text: &str) -> Result<MigrationAddress, InvalidUri> {
    let (path, offset) = match text.rsplit_once(",offset=") {
        Some((path, offset)) => {
            let number = match offset.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => offset.parse(),
            };
            (
                path,
                number.map_err(|_| InvalidUri::Offset(offset.to_owned()))?,
            )
        }
        None => (text, 0),
    };
    if path.is_empty() {
        return Err(InvalidUri::File);
    }
    Ok(MigrationAddress::File {
        path: path.into(),
        offset,
    })
}

/// Arguments of `migrate`.
///
/// Read from `uri`, or from `channels` with one entry of type `main`. QEMU's `detach` is taken and has no effect, as in
/// QMP it always is in force; `resume` is refused, as there is no migration to resume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrate {
    /// Where to.
    pub address: MigrationAddress,
}

/// Arguments of `migrate-incoming`, read as for [`Migrate`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateIncoming {
    /// Where from.
    pub address: MigrationAddress,
    /// Whether the process ends if the migration fails; QEMU's default is yes.
    pub exit_on_error: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MigrateMembers {
    uri: Option<String>,
    channels: Option<Vec<Channel>>,
    #[serde(rename = "detach")]
    _detach: Option<bool>,
    resume: Option<bool>,
}

impl<'de> Deserialize<'de> for Migrate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let members = MigrateMembers::deserialize(deserializer)?;
        let address = one_address(members.uri, members.channels)?;
        if members.resume == Some(true) {
            return Err(D::Error::custom(
                "Cannot resume if there is no paused migration",
            ));
        }
        Ok(Migrate { address })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct MigrateIncomingMembers {
    uri: Option<String>,
    channels: Option<Vec<Channel>>,
    exit_on_error: Option<bool>,
}

impl<'de> Deserialize<'de> for MigrateIncoming {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let members = MigrateIncomingMembers::deserialize(deserializer)?;
        Ok(MigrateIncoming {
            address: one_address(members.uri, members.channels)?,
            exit_on_error: members.exit_on_error.unwrap_or(true),
        })
    }
}

fn one_address<E: serde::de::Error>(
    uri: Option<String>,
    channels: Option<Vec<Channel>>,
) -> Result<MigrationAddress, E> {
    // An empty list counts as absent, as in QEMU.
    let mut channels = channels.unwrap_or_default();
    match (uri, channels.pop()) {
        (Some(uri), None) => uri.parse().map_err(E::custom),
        (None, Some(_)) if !channels.is_empty() => {
            Err(E::custom("Channel list has more than one main entry"))
        }
        (None, Some(channel)) => Ok(channel.addr),
        _ => Err(E::custom("need either 'uri' or 'channels' argument")),
    }
}

/// One entry of `channels`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Channel {
    #[serde(rename = "channel-type")]
    _channel_type: ChannelType,
    #[serde(deserialize_with = "channel_address")]
    addr: MigrationAddress,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ChannelType {
    Main,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Transport {
    Socket,
    Exec,
    File,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SocketType {
    Inet,
    Unix,
    Fd,
}

/// The members of every kind of address side by side. QEMU's address is a union within a union, for which serde's
/// derive would lose track of which member an error is about.
#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct AddressMembers {
    transport: Option<Transport>,
    r#type: Option<SocketType>,
    host: Option<String>,
    port: Option<String>,
    path: Option<String>,
    str: Option<String>,
    args: Option<Vec<String>>,
    filename: Option<String>,
    offset: Option<u64>,
}

impl AddressMembers {
    /// The name of a member that is still there once an address has taken what it needs.
    fn left_over(&self) -> Option<&'static str> {
        [
            ("type", self.r#type.is_some()),
            ("host", self.host.is_some()),
            ("port", self.port.is_some()),
            ("path", self.path.is_some()),
            ("str", self.str.is_some()),
            ("args", self.args.is_some()),
            ("filename", self.filename.is_some()),
            ("offset", self.offset.is_some()),
        ]
        .into_iter()
        .find_map(|(name, present)| present.then_some(name))
    }
}

fn channel_address<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<MigrationAddress, D::Error> {
    let mut members = AddressMembers::deserialize(deserializer)?;
    let missing = D::Error::missing_field;
    let transport = members
        .transport
        .take()
        .ok_or_else(|| missing("transport"))?;
    let address = match transport {
        Transport::Socket => match members.r#type.take().ok_or_else(|| missing("type"))? {
            SocketType::Inet => MigrationAddress::Tcp {
                host: members.host.take().ok_or_else(|| missing("host"))?,
                port: members.port.take().ok_or_else(|| missing("port"))?,
            },
            SocketType::Unix => MigrationAddress::Unix {
                path: members.path.take().ok_or_else(|| missing("path"))?.into(),
            },
            SocketType::Fd => MigrationAddress::Fd {
                name: members.str.take().ok_or_else(|| missing("str"))?,
            },
        },
        Transport::Exec => MigrationAddress::Exec {
            args: members.args.take().ok_or_else(|| missing("args"))?,
        },
        Transport::File => MigrationAddress::File {
            path: members
                .filename
                .take()
                .ok_or_else(|| missing("filename"))?
                .into(),
            offset: members.offset.take().ok_or_else(|| missing("offset"))?,
        },
    };
    match members.left_over() {
        Some(name) => Err(D::Error::unknown_field(name, &[])),
        None => Ok(address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read_and_written() {
        for uri in [
            "tcp:host:4444",
            "tcp::4444",
            "tcp:[::1]:4444",
            "unix:/tmp/a:b",
            "exec:cat > a:b",
            "file:/tmp/a",
            "file:/tmp/a,offset=4096",
            "fd:7",
        ] {
            let address: MigrationAddress = uri.parse().expect(uri);
            assert_eq!(address.to_string(), uri);
        }
        assert_eq!(
            "file:a,offset=0x1000".parse(),
            Ok(MigrationAddress::File {
                path: "a".into(),
                offset: 4096
            })
        );
    }

    #[test]
    fn bad_uris_are_named() {
        for (uri, complaint) in [
            ("", "unknown migration protocol: "),
            ("bogus:x", "unknown migration protocol: bogus:x"),
            ("tcp:nohost", "error parsing address 'nohost'"),
            ("tcp:", "error parsing address ''"),
            ("tcp:::1:2", "error parsing address '::1:2'"),
            ("unix:", "invalid Unix socket address"),
            ("fd:", "invalid file descriptor address"),
            ("exec:", "exec URI lacks a command"),
            ("file:,offset=1", "file URI lacks a path"),
        ] {
            let error = uri.parse::<MigrationAddress>().unwrap_err();
            assert_eq!(error.to_string(), complaint, "for {uri}");
        }
        let error = "file:a,offset=zz".parse::<MigrationAddress>().unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("file URI has bad offset zz: ")
        );
    }
}
