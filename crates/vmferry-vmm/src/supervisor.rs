//! The thread that does what vCPUs ask for. They cannot do it themselves: a reset needs all of them to stand
//! still.

use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::MachineError;
use crate::machine::Machine;

/// How long is waited before a vCPU's request is tried again: others want the machine's run state, too.
const RETRY: Duration = Duration::from_millis(100);

/// Starts the supervisor of `machine`. It ends with the machine and does not keep it alive.
pub(crate) fn start(machine: &Arc<Machine>) -> Result<JoinHandle<()>, MachineError> {
    let gate = machine.gate.clone();
    let machine: Weak<Machine> = Arc::downgrade(machine);
    thread::Builder::new()
        .name("supervisor".into())
        .spawn(move || {
            while gate.wait_for_request() {
                let Some(machine) = machine.upgrade() else {
                    return;
                };
                let answered = machine.answer();
                drop(machine);
                if !answered {
                    thread::sleep(RETRY);
                }
            }
        })
        .map_err(|source| MachineError::Os {
            action: "start the machine's supervisor".into(),
            source,
        })
}
