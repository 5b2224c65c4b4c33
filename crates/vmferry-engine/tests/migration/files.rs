//! Snapshots and other one-way streams, and what a full disk or half a file does to them.

use std::ffi::{CStr, CString};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmferry_engine::{Destination, MigrationError, Status, Uri};

use crate::common::{
    Random, Watched, listen, move_on, parameters, running_guest, send, wait_until,
};
use crate::toy::Quiet;

fn uri(transport: &str, rest: impl std::fmt::Display) -> Uri {
    format!("{transport}:{rest}").parse().unwrap()
}

fn file(path: &Path) -> Uri {
    Uri::File(path.to_owned())
}

/// The guest that a stream from `from` brings.
fn load(here: &Arc<Watched>, from: &Uri) -> Arc<Watched> {
    let there = Watched::new(here.runners());
    listen(&there, from).wait().unwrap();
    there.verify_arrival();
    there
}

/// Goes through `to` and comes back through `from`, and is the same guest then.
fn there_and_back(to: &Uri, from: &Uri) {
    let here = running_guest();
    send(&here, to, parameters()).wait().unwrap();
    let saved = here.verify();
    let there = load(&here, from);
    assert!(there.is_running());
    there.run_some();
    assert!(there.stop_and_verify() > saved);
}

/// What went wrong with a migration of a running guest, which must run on.
fn fails(to: &Uri) -> String {
    let here = running_guest();
    let error = send(&here, to, parameters()).wait().unwrap_err();
    here.run_some();
    move_on(&here, parameters()).stop_and_verify();
    error.to_string()
}

#[test]
fn a_snapshot_can_be_loaded_more_than_once() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = file(&dir.path().join("snapshot"));
    let here = running_guest();
    send(&here, &snapshot, parameters()).wait().unwrap();
    let saved = here.verify();
    for _ in 0..2 {
        let there = load(&here, &snapshot);
        there.run_some();
        assert!(there.stop_and_verify() > saved);
    }
}

#[test]
fn a_second_snapshot_replaces_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = file(&dir.path().join("snapshot"));
    there_and_back(&snapshot, &snapshot);
    there_and_back(&snapshot, &snapshot);
    assert_eq!(dir.path().read_dir().unwrap().count(), 1);
}

#[test]
fn commands() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a file").display().to_string();
    there_and_back(
        &uri("exec", format!("cat > '{path}'")),
        &uri("exec", format!("cat '{path}'")),
    );
    there_and_back(
        &uri("exec", format!("gzip -1 > '{path}.gz'")),
        &uri("exec", format!("gzip -dc '{path}.gz'")),
    );
}

#[test]
fn a_command_that_fails() {
    let reads_all = fails(&uri("exec", "cat > /dev/null; exit 3"));
    assert!(reads_all.contains("exit status: 3"), "{reads_all}");
    let reads_nothing = fails(&uri("exec", "exit 3"));
    assert!(reads_nothing.contains("exec:exit 3"), "{reads_nothing}");
}

/// A command that has all of the guest and does not end: its user can end it, and then has to know what it did.
#[test]
fn a_command_that_does_not_end() {
    let dir = tempfile::tempdir().unwrap();
    let (snapshot, complete) = (dir.path().join("snapshot"), dir.path().join("complete"));
    let command = format!(
        "cat > {}; touch {}; exec sleep 60",
        snapshot.display(),
        complete.display()
    );
    let here = running_guest();
    let outgoing = send(&here, &uri("exec", command), parameters());
    wait_until("the whole stream", || complete.exists());
    assert!(!here.is_running());
    assert_eq!(outgoing.info().status, Status::Device);
    outgoing.cancel().unwrap();
    let error = outgoing.wait().unwrap_err();
    assert!(
        matches!(error, MigrationError::Undecided { .. }),
        "{error:?}"
    );
    let words = error.to_string();
    for part in ["cancelled during the hand-over", "exec:cat", "'cont'"] {
        assert!(words.contains(part), "{words}");
    }
    // It had the guest indeed, and its user decides for this side.
    here.verify();
    load(&here, &file(&snapshot)).stop_and_verify();
    here.run();
    here.run_some();
}

#[test]
fn inherited_descriptors() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &uri("fd", theirs.as_raw_fd()));
    send(&here, &uri("fd", ours.as_raw_fd()), parameters())
        .wait()
        .unwrap();
    incoming.wait().unwrap();
    here.verify();
    there.verify_arrival();
    there.run_some();

    let (reader, writer) = std::io::pipe().unwrap();
    let last = Watched::new(there.runners());
    let incoming = listen(&last, &uri("fd", reader.as_raw_fd()));
    send(&there, &uri("fd", writer.as_raw_fd()), parameters())
        .wait()
        .unwrap();
    incoming.wait().unwrap();
    there.verify();
    last.stop_and_verify();
}

#[test]
fn a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &Uri::Unix(path.clone()));
    send(&here, incoming.uri(), parameters()).wait().unwrap();
    incoming.wait().unwrap();
    assert!(!path.exists());
    here.verify();
    there.stop_and_verify();
}

#[test]
fn places_that_are_no_files() {
    let dir = tempfile::tempdir().unwrap();
    let there = Watched::new(&crate::common::Runners::none());
    let missing = file(&dir.path().join("missing"));
    let refused = Destination::start(there.clone(), &missing, Box::new(Quiet));
    let refused = refused.err().expect("there is no such file").to_string();
    assert!(
        refused.contains("missing") && refused.contains("No such file"),
        "{refused}"
    );
    let in_missing = fails(&file(&dir.path().join("missing/snapshot")));
    assert!(in_missing.contains("missing/snapshot"), "{in_missing}");
    let directory = file(dir.path());
    let to_directory = fails(&directory);
    assert!(to_directory.contains("is a directory"), "{to_directory}");
    let from_directory = Destination::start(there.clone(), &directory, Box::new(Quiet))
        .err()
        .expect("a directory holds no guest")
        .to_string();
    assert!(
        from_directory.contains("is a directory"),
        "{from_directory}"
    );
    let nobody = fails(&Uri::Unix(dir.path().join("nobody")));
    assert!(nobody.contains("nobody"), "{nobody}");
    let taken = file(Path::new("/dev/full"));
    let full = fails(&taken);
    assert!(full.contains("free some space"), "{full}");
}

/// A file system of its own, too small for the guest, that the kernel removes with its last user: only this
/// thread's mount namespace has it. `None` where the test may not mount.
fn small_disk(dir: &Path) -> Option<PathBuf> {
    // SAFETY: unshare changes only which mounts this thread sees.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return None;
    }
    let mount = |to: &CStr, kind: &CStr, flags, options: &CStr| {
        // SAFETY: all pointers are to strings that live until the call returns.
        let result = unsafe {
            libc::mount(
                c"none".as_ptr(),
                to.as_ptr(),
                kind.as_ptr(),
                flags,
                options.as_ptr().cast(),
            )
        };
        result == 0
    };
    let here = CString::new(dir.as_os_str().as_bytes()).unwrap();
    // Private first, or the mount would be seen outside of this namespace.
    let mounted = mount(c"/", c"", libc::MS_REC | libc::MS_PRIVATE, c"")
        && mount(&here, c"tmpfs", 0, c"size=6m");
    mounted.then(|| dir.join("snapshot"))
}

#[test]
fn a_full_disk_leaves_the_old_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = small_disk(dir.path()) else {
        println!("SKIPPED: mounting a small file system is not allowed here (it takes root)");
        return;
    };
    std::fs::write(&path, "old").unwrap();
    let error = fails(&file(&path));
    assert!(
        error.contains("free some space") && error.contains("snapshot"),
        "{error}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    // Half a snapshot must not go on filling the disk.
    assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 1);
}

#[test]
fn half_a_snapshot_is_refused() {
    let mut random = Random::new("half_a_snapshot_is_refused");
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let here = running_guest();
    send(&here, &file(&whole), parameters()).wait().unwrap();
    let bytes = std::fs::read(&whole).unwrap();
    // The last thing in the file is JSON for other tools, behind five bytes of section header. The guest is
    // complete without it.
    let text = b"{\"configuration\"";
    let json = bytes.windows(text.len()).rposition(|part| part == text);
    let end = json.expect("the JSON is there") - 5;
    let mut cuts = vec![0, 1, 4, 8, 20, 60, 100, 4096, end / 2, end - 100, end - 1];
    cuts.extend((0..10).map(|_| random.below(end as u64) as usize));
    for cut in cuts {
        let half = dir.path().join("half");
        std::fs::write(&half, &bytes[..cut]).unwrap();
        let there = Watched::new(here.runners());
        let error = listen(&there, &file(&half)).wait().unwrap_err().to_string();
        assert!(
            error.contains(&format!("ends at byte {cut}")),
            "{cut}: {error}"
        );
        assert!(!there.is_running());
    }
    let complete = dir.path().join("complete");
    std::fs::write(&complete, &bytes[..end]).unwrap();
    load(&here, &file(&complete)).stop_and_verify();
}
