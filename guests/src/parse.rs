//! The host's side of the guests' heartbeats.

use crate::{Heartbeat, Hints};

impl Heartbeat {
    /// Reads one line of a guest's serial output. `None` if it is anything but a whole heartbeat: the
    /// guests print other lines too.
    pub fn parse(line: &str) -> Option<Self> {
        let (_guest, fields) = line.trim().split_once(": ")?;
        let mut fields = fields.split(' ').peekable();
        let heartbeat = Self {
            vcpu: number(&mut fields, "vcpu")?.try_into().ok()?,
            t: number(&mut fields, "t")?,
            written: number(&mut fields, "written")?,
            verified: number(&mut fields, "verified")?,
            corrupt: number(&mut fields, "corrupt")?,
            gap_us: number(&mut fields, "gap_us")?,
            maxgap_us: number(&mut fields, "maxgap_us")?,
            sweeps: number(&mut fields, "sweeps")?,
            rate: number(&mut fields, "rate")?,
            hints: match fields.peek() {
                None => None,
                Some(_) => Some(Hints {
                    hinted: number(&mut fields, "hinted")?,
                    rounds: number(&mut fields, "rounds")?,
                }),
            },
        };
        fields.next().is_none().then_some(heartbeat)
    }
}

/// The next field, which has this name.
fn number<'a>(fields: &mut impl Iterator<Item = &'a str>, name: &str) -> Option<u64> {
    let value = fields.next()?.strip_prefix(name)?.strip_prefix('=')?;
    value.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "dirtier: vcpu=0 t=12 written=600000 verified=612345 corrupt=0 gap_us=1234 \
                        maxgap_us=56789 sweeps=1 rate=50000";

    #[test]
    fn reads_every_field() {
        let heartbeat = Heartbeat {
            vcpu: 0,
            t: 12,
            written: 600_000,
            verified: 612_345,
            corrupt: 0,
            gap_us: 1234,
            maxgap_us: 56_789,
            sweeps: 1,
            rate: 50_000,
            hints: None,
        };
        assert_eq!(Heartbeat::parse(LINE), Some(heartbeat));
        assert_eq!(Heartbeat::parse(&format!("{LINE}\r\n")), Some(heartbeat));
        assert_eq!(format!("dirtier: {heartbeat}"), LINE);

        let hints = Hints {
            hinted: 17,
            rounds: 3,
        };
        let line = format!("{LINE} hinted=17 rounds=3");
        let heartbeat = Heartbeat {
            hints: Some(hints),
            ..heartbeat
        };
        assert_eq!(Heartbeat::parse(&line), Some(heartbeat));
        assert_eq!(format!("dirtier: {heartbeat}"), line);
    }

    #[test]
    fn refuses_everything_else() {
        for cut in 0..LINE.len() - "50000".len() {
            assert_eq!(Heartbeat::parse(&LINE[..cut]), None, "{}", &LINE[..cut]);
        }
        for line in [
            "dirtier: ready filled_pages=16384",
            "dirtier: CORRUPT vcpu=0 page=1",
            &LINE.replace("t=12", "t=-1"),
            &LINE.replace("vcpu=0", "vcpu=4294967296"),
            &format!("{LINE} more=1"),
        ] {
            assert_eq!(Heartbeat::parse(line), None, "{line}");
        }
    }
}
