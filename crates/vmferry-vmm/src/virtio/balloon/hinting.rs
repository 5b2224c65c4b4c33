//! The conversation about free pages: the machine asks under a command id, the guest answers with that id, then its
//! free pages, then a stop.
//!
//! | the machine | command id in the configuration | the guest |
//! |---|---|---|
//! | asks | a new one, 2 or more | answers: this id, free pages, STOP |
//! | withdraws its question | STOP | stops, and keeps the pages it told of out of use |
//! | is done | DONE | uses its pages again |
//!
//! Pages count only between the id of the question in force and the next stop. Whatever the guest says out of turn
//! changes nothing, and harms nobody else.

use std::sync::Arc;

use vmferry_dirty::PageRange;

/// The command ids with a meaning of their own.
pub(crate) const STOP: u32 = 0;
pub(crate) const DONE: u32 = 1;
/// The first id of a question.
const FIRST: u32 = 2;

/// Takes the free pages that the guest tells of in answer to one question. It may wait for the migration's thread.
pub(crate) type Hints = Arc<dyn Fn(PageRange) + Send + Sync>;

/// Where the conversation is.
enum Turn {
    /// Nobody wants to know, and the guest may use its pages.
    Done,
    /// Nobody wants to know just now.
    Withdrawn,
    /// The guest has not begun to answer, or has come to an end.
    Asked(Hints),
    /// What the guest says is the answer.
    Answering(Hints),
}

/// The conversation, on the machine's side.
pub(crate) struct Hinting {
    turn: Turn,
    /// The id of the last question.
    last: u32,
}

impl Hinting {
    /// Nobody has asked yet. `last` is the id of the last question that the guest may know of.
    pub fn new(last: u32) -> Self {
        Hinting {
            turn: Turn::Done,
            last,
        }
    }

    /// The id of the last question.
    pub fn last(&self) -> u32 {
        self.last
    }

    /// The command id that the guest is to see.
    pub fn command(&self) -> u32 {
        match self.turn {
            Turn::Done => DONE,
            Turn::Withdrawn => STOP,
            Turn::Asked(_) | Turn::Answering(_) => self.last,
        }
    }

    /// Asks, under an id that no question had for a long time.
    pub fn ask(&mut self, hints: Hints) {
        self.last = self.last.wrapping_add(1).max(FIRST);
        self.turn = Turn::Asked(hints);
    }

    /// The answer is of no use any more.
    pub fn withdraw(&mut self) {
        self.turn = Turn::Withdrawn;
    }

    /// Nobody will ask again.
    pub fn finish(&mut self) {
        self.turn = Turn::Done;
    }

    /// The guest says which question it answers from here on, or that it stops.
    pub fn hear(&mut self, id: u32) {
        self.turn = match std::mem::replace(&mut self.turn, Turn::Done) {
            Turn::Asked(hints) | Turn::Answering(hints) if id == self.last => {
                Turn::Answering(hints)
            }
            Turn::Asked(hints) | Turn::Answering(hints) => Turn::Asked(hints),
            turn => turn,
        };
    }

    /// Who wants to know what the guest says now.
    pub fn listener(&self) -> Option<Hints> {
        match &self.turn {
            Turn::Answering(hints) => Some(hints.clone()),
            Turn::Done | Turn::Withdrawn | Turn::Asked(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nobody() -> Hints {
        Arc::new(|_| {})
    }

    #[test]
    fn only_the_answer_to_the_question_in_force_is_heard() {
        let mut hinting = Hinting::new(0);
        assert_eq!(hinting.command(), DONE);
        hinting.hear(DONE);
        hinting.hear(STOP);
        assert!(hinting.listener().is_none(), "nobody has asked");

        hinting.ask(nobody());
        assert_eq!(hinting.command(), 2);
        assert!(hinting.listener().is_none(), "the guest has not begun");
        hinting.hear(3);
        assert!(hinting.listener().is_none(), "no such question");
        hinting.hear(2);
        assert!(hinting.listener().is_some());
        hinting.hear(STOP);
        assert!(hinting.listener().is_none(), "the guest has come to an end");

        hinting.hear(2);
        hinting.withdraw();
        assert_eq!(hinting.command(), STOP);
        assert!(hinting.listener().is_none());
        hinting.hear(2);
        assert!(hinting.listener().is_none(), "the answer is late");

        hinting.ask(nobody());
        assert_eq!(hinting.command(), 3);
        hinting.hear(2);
        assert!(hinting.listener().is_none(), "the answer is late");
        hinting.hear(3);
        assert!(hinting.listener().is_some());
        hinting.finish();
        assert_eq!(hinting.command(), DONE);
        assert!(hinting.listener().is_none());
    }

    #[test]
    fn the_reserved_ids_are_never_those_of_a_question() {
        let mut hinting = Hinting::new(u32::MAX - 1);
        let ids = [0; 3].map(|_| {
            hinting.ask(nobody());
            hinting.command()
        });
        assert_eq!(ids, [u32::MAX, 2, 3]);
    }
}
