//! virtio-rng: the host's random numbers.

use super::{Broken, Kind, Requests, VirtioDevice};

const QUEUE_SIZES: &[u16] = &[64];
/// The most that one request gets; the driver asks again.
const MOST: u64 = 64 << 10;

/// The device.
#[derive(Debug, Default)]
pub(crate) struct Rng;

impl Rng {
    /// Queues of the device.
    pub const QUEUES: usize = QUEUE_SIZES.len();
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn serve(&mut self, _: usize, requests: &mut Requests<'_>) -> Result<(), Broken> {
        while let Some(chain) = requests.next()? {
            let wanted = chain.writable.len().min(MOST);
            if wanted == 0 {
                return Err(chain.short("random numbers"));
            }
            let mut random = vec![0; wanted as usize];
            let given = match getrandom::fill(&mut random) {
                Ok(()) => chain.writable.write(requests.memory, 0, &random),
                Err(error) => {
                    tracing::warn!(%error, "the host gives no random numbers");
                    0
                }
            };
            requests.complete(&chain, given as u32)?;
        }
        Ok(())
    }
}
