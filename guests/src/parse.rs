//! The host's side of the guests' heartbeats.

use crate::Heartbeat;

impl Heartbeat {
    /// Reads one line of a guest's serial output. `None` if it is anything but a whole heartbeat: the
    /// guests print other lines too.
    pub fn parse(line: &str) -> Option<Self> {
        let (_guest, fields) = line.trim().split_once(": ")?;
        let mut fields = fields.split(' ');
        let mut field = |name| -> Option<u64> {
            let value = fields.next()?.strip_prefix(name)?.strip_prefix('=')?;
            value.parse().ok()
        };
        let heartbeat = Self {
            vcpu: field("vcpu")?.try_into().ok()?,
            t: field("t")?,
            written: field("written")?,
            verified: field("verified")?,
            corrupt: field("corrupt")?,
            gap_us: field("gap_us")?,
            maxgap_us: field("maxgap_us")?,
            sweeps: field("sweeps")?,
            rate: field("rate")?,
        };
        fields.next().is_none().then_some(heartbeat)
    }
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
        };
        assert_eq!(Heartbeat::parse(LINE), Some(heartbeat));
        assert_eq!(Heartbeat::parse(&format!("{LINE}\r\n")), Some(heartbeat));
        assert_eq!(format!("dirtier: {heartbeat}"), LINE);
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
