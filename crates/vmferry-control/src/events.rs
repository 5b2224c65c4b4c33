//! Carries events from the machine to every client.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::message;
use crate::outbox::Outbox;
use crate::schema::Event;

/// Where the machine drops its events. Clones are the same bus.
///
/// It is made before the server, so that the machine behind the [`Handler`](crate::Handler) can hold a clone; several
/// servers may share one.
#[derive(Clone, Debug, Default)]
pub struct EventBus {
    subscribers: Arc<Mutex<Vec<Weak<Outbox>>>>,
}

impl EventBus {
    /// A bus without listeners.
    pub fn new() -> Self {
        EventBus::default()
    }

    /// Tells every client that has negotiated. Never waits for one; all see events in the same order.
    pub fn emit(&self, event: Event) {
        // Stamped under the lock, so that the stamps are in order as well.
        let mut subscribers = self.lock();
        let message: Arc<[u8]> = message::event(&event).into();
        subscribers.retain(|subscriber| {
            subscriber
                .upgrade()
                .is_some_and(|outbox| outbox.push_event(message.clone()).is_ok())
        });
    }

    /// Adds a client.
    pub(crate) fn subscribe(&self, outbox: &Arc<Outbox>) {
        let mut subscribers = self.lock();
        // A VM without events, asked for its state again and again, would else collect the clients that are gone.
        subscribers.retain(|subscriber| subscriber.strong_count() > 0);
        subscribers.push(Arc::downgrade(outbox));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Outbox>>> {
        self.subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
