//! The ends of a Linux guest: it panics, it resets itself, somebody presses the power button.

use std::fs;

use serde_json::Value;

use crate::common::eventually;
use crate::common::say;
use crate::common::vm::Vm;
use crate::host::{self, RISEN};

#[test]
fn a_guest_resets_itself_and_powers_off() {
    let test = "a_guest_resets_itself_and_powers_off";
    let Some((lab, images)) = host::lab(test) else {
        return;
    };
    let image = lab.path("lives");
    let mut lives = vec![0; 1 << 20];
    lives[0] = b'0';
    fs::write(&image, &lives).expect("the test's directory is writable");
    let disk = format!("path={}", image.display());
    let options = images.options(RISEN, "");
    let options = options.iter().map(String::as_str);
    let machine = ["--memory", "128M", "--disk", &disk];
    let args: Vec<_> = machine.into_iter().chain(options).collect();
    let mut vm = Vm::start(&lab, &args);

    // After the panic, and after `reboot -f`.
    for life in ["0", "1"] {
        assert_eq!(vm.events_until("RESET").last().unwrap(), "RESET");
        eventually("its last words of that life", || {
            let said = fs::read_to_string(&vm.serial).unwrap();
            said.contains(&format!("linux: life={life}")).then_some(())
        });
    }
    let text = eventually("the third life", || {
        let text = fs::read_to_string(&vm.serial).ok()?;
        text.contains("linux: life=2").then_some(text)
    });
    assert!(text.contains("sysrq triggered crash"), "{text}");
    assert!(!text.contains("linux: boot="), "{text}");

    vm.execute("system_powerdown", Value::Null);
    let events = vm.events_until("SHUTDOWN");
    assert!(events.contains(&"POWERDOWN".to_owned()), "{events:?}");
    assert!(vm.ends().success());
    let text = fs::read_to_string(&vm.serial).unwrap();
    assert!(text.contains("linux: button"), "{text}");
    say(&format!(
        "{test}: reset after a panic and after reboot -f; off by the button"
    ));
}
