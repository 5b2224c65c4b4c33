//! What the driver of a balloon says when, in answer to a question for free pages.

/// No question: free pages are of no use now, and may be wanted later.
const STOP: u32 = 0;
/// No question, and none is to be expected.
const DONE: u32 = 1;

/// The question that is being answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Answer(Option<u32>);

impl Answer {
    /// Whether the VMM wants to know which pages are free.
    pub fn is_under_way(self) -> bool {
        self.0.is_some()
    }

    /// The VMM's configuration has this `question`. Returns what is to be said: STOP at the end of an answer, and at
    /// the beginning of one the question that it is to.
    pub fn to(&mut self, question: u32) -> impl Iterator<Item = u32> + use<> {
        let new = match question {
            STOP | DONE => None,
            question => Some(question),
        };
        let before = core::mem::replace(&mut self.0, new);
        let changed = before != new;
        let end = before.map(|_| STOP).filter(|_| changed);
        let beginning = new.filter(|_| changed);
        end.into_iter().chain(beginning)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_question_is_answered_once() {
        let mut answer = Answer::default();
        let mut said = |question| answer.to(question).collect::<Vec<_>>();
        assert_eq!(said(DONE), []);
        assert_eq!(said(2), [2]);
        assert_eq!(said(2), []);
        assert_eq!(said(STOP), [STOP]);
        assert_eq!(said(STOP), []);
        assert_eq!(said(3), [3]);
        assert_eq!(said(5), [STOP, 5], "it was not seen that 3 was taken back");
        assert_eq!(said(DONE), [STOP]);
    }
}
