//! Where a migration goes to or comes from: QEMU's ways to say it, and the engine's [`Uri`] for all of them.

use std::path::PathBuf;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use vmferry_engine::Uri;

/// A socket that a destination listens at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum SocketAddress {
    /// TCP.
    Inet {
        /// Name or address; IPv6 addresses without brackets.
        host: String,
        /// The port's number, which QEMU gives as text.
        port: String,
    },
    /// A unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
    },
}

impl SocketAddress {
    /// What `query-migrate` shows of a destination that listens at `uri`; nothing if that is no socket to connect to.
    pub fn list(uri: &Uri) -> Option<Vec<SocketAddress>> {
        let address = match uri {
            Uri::Tcp { host, port } => SocketAddress::Inet {
                host: host.clone(),
                port: port.to_string(),
            },
            Uri::Unix(path) => SocketAddress::Unix { path: path.clone() },
            Uri::Fd(_) | Uri::Exec(_) | Uri::File(_) => return None,
        };
        Some(vec![address])
    }
}

/// Arguments of `migrate`.
///
/// Read from `uri`, or from `channels` with one entry of type `main`. QEMU's `detach` is taken and has no effect, as in
/// QMP it always is in force; `resume` is refused, as there is no migration to resume.
///
/// A channel's `exec` becomes a command for the shell that runs just that program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrate {
    /// Where to.
    pub uri: Uri,
}

/// Arguments of `migrate-incoming`, read as for [`Migrate`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateIncoming {
    /// Where from.
    pub uri: Uri,
    /// Whether the process ends if the migration fails; QEMU's default is yes.
    pub exit_on_error: bool,
    /// Resume a snapshot even if its disks have changed since it was taken. QEMU does not have this.
    pub x_vmferry_allow_changed_disks: bool,
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
        let uri = one_uri(members.uri, members.channels)?;
        if members.resume == Some(true) {
            return Err(D::Error::custom(
                "Cannot resume if there is no paused migration",
            ));
        }
        Ok(Migrate { uri })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct MigrateIncomingMembers {
    uri: Option<String>,
    channels: Option<Vec<Channel>>,
    exit_on_error: Option<bool>,
    x_vmferry_allow_changed_disks: Option<bool>,
}

impl<'de> Deserialize<'de> for MigrateIncoming {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let members = MigrateIncomingMembers::deserialize(deserializer)?;
        Ok(MigrateIncoming {
            uri: one_uri(members.uri, members.channels)?,
            exit_on_error: members.exit_on_error.unwrap_or(true),
            x_vmferry_allow_changed_disks: members.x_vmferry_allow_changed_disks.unwrap_or(false),
        })
    }
}

fn one_uri<E: serde::de::Error>(
    uri: Option<String>,
    channels: Option<Vec<Channel>>,
) -> Result<Uri, E> {
    // An empty list counts as absent, as in QEMU.
    let mut channels = channels.unwrap_or_default();
    match (uri, channels.pop()) {
        (Some(uri), None) => read_uri(&uri),
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
    addr: Uri,
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

fn channel_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uri, D::Error> {
    let mut members = AddressMembers::deserialize(deserializer)?;
    let missing = D::Error::missing_field;
    let transport = members
        .transport
        .take()
        .ok_or_else(|| missing("transport"))?;
    let uri = match transport {
        Transport::Socket => match members.r#type.take().ok_or_else(|| missing("type"))? {
            SocketType::Inet => {
                let host = members.host.take().ok_or_else(|| missing("host"))?;
                let port = members.port.take().ok_or_else(|| missing("port"))?;
                tcp(host, &port)
            }
            SocketType::Unix => {
                let path = members.path.take().ok_or_else(|| missing("path"))?;
                read_uri(&format!("unix:{path}"))
            }
            SocketType::Fd => {
                let number = members.str.take().ok_or_else(|| missing("str"))?;
                read_uri(&format!("fd:{number}"))
            }
        },
        Transport::Exec => {
            let args = members.args.take().ok_or_else(|| missing("args"))?;
            read_uri(&format!("exec:{}", shell_command(&args)))
        }
        Transport::File => {
            let name = members.filename.take().ok_or_else(|| missing("filename"))?;
            let offset = members.offset.take().ok_or_else(|| missing("offset"))?;
            read_uri(&format!("file:{name},offset={offset}"))
        }
    };
    match members.left_over() {
        Some(name) => Err(D::Error::unknown_field(name, &[])),
        // A value that does not fit is only named once no member is out of place.
        None => uri,
    }
}

fn read_uri<E: serde::de::Error>(text: &str) -> Result<Uri, E> {
    text.parse().map_err(E::custom)
}

/// Not read as a URI, as a name with colons or brackets in it would not stay what it is.
fn tcp<E: serde::de::Error>(host: String, port: &str) -> Result<Uri, E> {
    match port.parse() {
        Ok(port) => Ok(Uri::Tcp { host, port }),
        Err(_) => Err(E::custom(format!(
            "'{port}' is not a port: use a number from 0 to 65535"
        ))),
    }
}

/// What `sh -c` takes to run this program with these arguments: the command itself, if they are just that.
fn shell_command(args: &[String]) -> String {
    match args {
        [] => String::new(),
        [shell, dash_c, command] if shell == "/bin/sh" && dash_c == "-c" => command.clone(),
        args => args.iter().fold("exec".to_owned(), |command, arg| {
            format!("{command} '{}'", arg.replace('\'', r"'\''"))
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn from_channel(addr: Value) -> Result<Uri, String> {
        let arguments = json!({"channels": [{"channel-type": "main", "addr": addr}]});
        serde_json::from_value(arguments)
            .map(|Migrate { uri }| uri)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn any_program_becomes_a_shells_command() {
        for (args, command) in [
            (json!(["/bin/sh", "-c", "cat > x"]), "cat > x"),
            (json!(["/bin/cat"]), "exec '/bin/cat'"),
            (
                json!(["/bin/echo", "it's", "$HOME", ""]),
                r"exec '/bin/echo' 'it'\''s' '$HOME' ''",
            ),
        ] {
            let uri = from_channel(json!({"transport": "exec", "args": args}));
            assert_eq!(uri, Ok(Uri::Exec(command.into())));
        }
    }

    #[test]
    fn what_no_uri_can_say_is_refused() {
        let inet =
            |port| json!({"transport": "socket", "type": "inet", "host": "::1", "port": port});
        let fd = |number| json!({"transport": "socket", "type": "fd", "str": number});
        let file = |offset| json!({"transport": "file", "filename": "/a,b", "offset": offset});
        assert_eq!(from_channel(inet("1")).unwrap().to_string(), "tcp:[::1]:1");
        assert_eq!(from_channel(fd("7")), Ok(Uri::Fd(7)));
        assert_eq!(from_channel(file(0)), Ok(Uri::File("/a,b".into())));
        for (addr, complaint) in [
            (inet("http"), "'http' is not a port"),
            (inet("65536"), "'65536' is not a port"),
            (fd("name"), "'fd:name' is not of the form fd:N"),
            (file(1), "'file:/a,b,offset=1' gives an offset"),
            (
                json!({"transport": "exec", "args": []}),
                "'exec:' lacks what comes after the colon",
            ),
            (
                json!({"transport": "socket", "type": "unix", "path": ""}),
                "'unix:' lacks what comes after the colon",
            ),
        ] {
            let error = from_channel(addr).unwrap_err();
            assert!(error.starts_with(complaint), "{error}");
        }
    }

    #[test]
    fn sockets_are_listed_as_qemu_does() {
        for (uri, expected) in [
            (
                "tcp:[::1]:4444",
                json!([{"type": "inet", "host": "::1", "port": "4444"}]),
            ),
            ("unix:/a", json!([{"type": "unix", "path": "/a"}])),
            ("fd:7", Value::Null),
        ] {
            let addresses = SocketAddress::list(&uri.parse().unwrap());
            assert_eq!(serde_json::to_value(addresses).unwrap(), expected);
        }
    }
}
