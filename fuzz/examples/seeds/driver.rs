//! Drivers of virtio devices that mean well.

/// Steps of a driver, in the words of `vmferry_vmm::fuzz`.
#[derive(Default)]
struct Driver(Vec<u8>);

/// Where a driver has its buffers: behind all rings.
const BUFFERS: u32 = 0x6_0000;
const NEXT: u8 = 1;
const WRITE: u8 = 2;

impl Driver {
    /// Brings the device up, with all features.
    fn started() -> Self {
        Driver([&[5][..], &[0xff; 8]].concat())
    }

    fn then(mut self, step: &[u8]) -> Self {
        self.0.extend(step);
        self
    }

    fn address(address: u32) -> [u8; 3] {
        [(address >> 16) as u8, address as u8, (address >> 8) as u8]
    }

    fn put(self, address: u32, data: &[u8]) -> Self {
        self.then(&[3])
            .then(&Self::address(address))
            .then(&[data.len() as u8])
            .then(data)
    }

    /// Offers a request of these buffers (address, length, whether the device writes) and has it served.
    fn request(mut self, queue: u8, buffers: &[(u32, u32, u8)]) -> Self {
        let last = buffers.len() as u8 - 1;
        for (index, (address, len, flags)) in (0..).zip(buffers) {
            let flags = flags | if index < last { NEXT } else { 0 };
            self = self
                .then(&[6, queue, index])
                .then(&Self::address(*address))
                .then(&len.to_le_bytes())
                .then(&[flags, index + 1]);
        }
        self.then(&[7, queue, 0, 4, queue])
    }

    /// A request to a disk: 512 bytes of data.
    fn disk(self, kind: u32, sector: u64, data: u8) -> Self {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()];
        self.put(BUFFERS, &header.concat()).request(
            0,
            &[
                (BUFFERS, 16, 0),
                (BUFFERS + 0x1000, 512, data),
                (BUFFERS + 0x2000, 1, WRITE),
            ],
        )
    }
}

/// What drivers of each device do when they mean well.
pub fn drivers() -> [(&'static str, Vec<u8>); 5] {
    /// The number of a step that comes from outside.
    const OUTSIDE: u8 = 13;
    let segments = [0u8; 16];
    let disk = Driver::started()
        .disk(0, 1, WRITE)
        .disk(1, 2, 0)
        .disk(8, 0, WRITE)
        .disk(4, 0, WRITE)
        .put(BUFFERS + 0x1000, &segments)
        .disk(11, 0, 0)
        .disk(13, 0, 0)
        .then(&[8]);
    let net = Driver::started()
        .put(BUFFERS, &[0; 72])
        .request(1, &[(BUFFERS, 12, 0), (BUFFERS + 12, 60, 0)])
        .then(&[OUTSIDE, 0, 100, 0])
        .request(0, &[(BUFFERS, 1526, WRITE)])
        .then(&[OUTSIDE, 0, 0, 8])
        .request(0, &[(BUFFERS, 1024, WRITE)])
        .request(0, &[(BUFFERS + 0x1000, 2048, WRITE)])
        .then(&[OUTSIDE, 3, 4, 1, OUTSIDE, 2, 8]);
    let console = Driver::started()
        .request(1, &[(BUFFERS, 100, 0), (BUFFERS + 0x1000, 5000, 0)])
        .then(&[10, 5])
        .then(b"input")
        .request(0, &[(BUFFERS, 3, WRITE)])
        .request(0, &[(BUFFERS, 64, WRITE)]);
    let rng = Driver::started()
        .request(0, &[(BUFFERS, 64, WRITE), (BUFFERS + 0x1000, 4096, WRITE)])
        .then(&[8])
        .request(0, &[(BUFFERS + 0x800, 16, WRITE)]);
    let numbers = [0x70u32, 0x71, 0x73].map(u32::to_le_bytes);
    let balloon = Driver::started()
        .put(BUFFERS, numbers.as_flattened())
        .request(0, &[(BUFFERS, 12, 0)])
        .request(1, &[(BUFFERS, 12, 0)])
        .request(2, &[(BUFFERS, 100, 0)])
        .then(&[OUTSIDE, 1, 4, 2])
        // A question, and the answer.
        .then(&[OUTSIDE, 2])
        .put(BUFFERS, &2u32.to_le_bytes())
        .request(3, &[(BUFFERS, 4, 0)])
        .request(3, &[(BUFFERS + 0x1_0000, 0x8000, WRITE)])
        .then(&[OUTSIDE, 3])
        .request(3, &[(BUFFERS + 0x1_0000, 0x8000, WRITE)])
        .request(4, &[(BUFFERS + 0x1_0000, 0x4000, WRITE)])
        .then(&[8, OUTSIDE, 0, 0, 0, 4, 0]);
    [
        ("virtio_blk", disk.0),
        ("virtio_net", net.0),
        ("virtio_console", console.0),
        ("virtio_rng", rng.0),
        ("virtio_balloon", balloon.0),
    ]
}
