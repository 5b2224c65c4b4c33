//! Pages that are freed and allocated: mostly the same few, as with an allocator that gives away first what came back
//! last. Now and then one of them is exchanged for another and then stays as it is for long, so that what a migration
//! loses at any time is still lost at its end.

use super::order::Order;
use super::random::Random;

/// Pages that are freed and allocated all the time.
const HOT: usize = 1024;
/// One turn in so many exchanges a hot page.
const EXCHANGE: u64 = 256;

const NONE: u32 = u32::MAX;

/// See the module's documentation.
pub struct Churn {
    /// [`NONE`] where there is none yet.
    hot: [u32; HOT],
    order: Order,
    random: Random,
}

impl Churn {
    /// Pages become hot in this `order`.
    pub fn new(order: Order, random: Random) -> Self {
        Self {
            hot: [NONE; HOT],
            order,
            random,
        }
    }

    /// The page that is freed or allocated next.
    pub fn next(&mut self) -> usize {
        let hot = &mut self.hot[self.random.below(HOT as u64) as usize];
        if *hot == NONE || self.random.below(EXCHANGE) == 0 {
            *hot = self.order.next() as u32;
        }
        *hot as usize
    }

    /// Whether a page that was just freed is wanted again at once.
    pub fn wants_it_again(&mut self) -> bool {
        self.random.below(2) == 0
    }
}
