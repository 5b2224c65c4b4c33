//! Writes the seed corpora: `cargo run --example seeds`, in this folder.

mod driver;

use std::fs;

use vmferry_wire::{
    Command, DescribedSection, DeviceState, Encoder, RamLayout, ReturnPathMessage, vm_description,
};

/// A complete stream for the layout of the `decoder` target, of a few small sections.
fn stream(two_way: bool) -> Vec<u8> {
    let layout = RamLayout::new([("microvm.ram", 0x10000), ("pc.bios", 0x2000)]).expect("valid");
    let device = DeviceState {
        idstr: "vmferry/cpu".to_owned(),
        instance_id: 0,
        version_id: 1,
        data: vec![0x5a; 24],
    };
    let json = vm_description("microvm", &[DescribedSection::from(&device)]);
    let mut enc = Encoder::new(layout);
    let mut out = Vec::new();
    enc.stream_header(&mut out);
    enc.configuration(&mut out, "microvm").expect("valid");
    if two_way {
        enc.command(&mut out, Command::OpenReturnPath);
        enc.command(&mut out, Command::Ping(1));
    }
    enc.ram_start(&mut out);
    enc.ram_part(&mut out);
    enc.zero_page(&mut out, 0, 0);
    enc.page(&mut out, 0, 0x1000);
    out.extend_from_slice(&[0; 4096]);
    enc.zero_page(&mut out, 1, 0x1000);
    enc.end_of_ram_records(&mut out);
    enc.command(&mut out, Command::SwitchoverStart);
    enc.ram_end(&mut out);
    enc.zero_page(&mut out, 0, 0xf000);
    enc.end_of_ram_records(&mut out);
    enc.device_state(&mut out, &device).expect("valid");
    if two_way {
        enc.vm_description(&mut out, &json).expect("valid");
        enc.command(&mut out, Command::HandoverRun);
    }
    enc.eof(&mut out);
    if !two_way {
        enc.vm_description(&mut out, &json).expect("valid");
    }
    out
}

fn main() -> std::io::Result<()> {
    fs::create_dir_all("seeds/decoder")?;
    fs::write("seeds/decoder/one-way", stream(false))?;
    fs::write("seeds/decoder/two-way", stream(true))?;
    fs::create_dir_all("seeds/return_path")?;
    let mut messages = Vec::new();
    ReturnPathMessage::Pong(1).encode(&mut messages);
    ReturnPathMessage::HandoverLoaded.encode(&mut messages);
    ReturnPathMessage::Error("no room for the guest".to_owned()).encode(&mut messages);
    ReturnPathMessage::Shut(1).encode(&mut messages);
    fs::write("seeds/return_path/all", messages)?;
    for (target, steps) in driver::drivers() {
        fs::create_dir_all(format!("seeds/{target}"))?;
        fs::write(format!("seeds/{target}/all"), steps)?;
    }
    Ok(())
}
