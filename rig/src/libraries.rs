//! What a dynamically linked program needs to run elsewhere.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::RigError;
use crate::process::raw_output;

/// The dynamic linker and the libraries of a program, where the program looks for them. None for what is no program
/// or statically linked.
pub(crate) fn of(program: &Path) -> Result<Vec<PathBuf>, RigError> {
    let done = raw_output(
        Command::new("ldd").arg(program),
        "install the package libc-bin",
    )?;
    parse(&String::from_utf8_lossy(&done.stdout)).map_err(|library| RigError::NoLibrary {
        program: program.to_owned(),
        library,
    })
}

/// Reads ldd's words; the error is a library that it has not found.
fn parse(text: &str) -> Result<Vec<PathBuf>, String> {
    let mut libraries = Vec::new();
    for line in text.lines() {
        let (name, path) = match line.trim().split_once(" => ") {
            Some((name, "not found")) => return Err(name.to_owned()),
            Some((name, path)) => (name, path),
            None => ("", line.trim()),
        };
        // Behind the path is the address; the kernel's own library has no path.
        let path = path.split(" (").next().unwrap_or_default();
        if path.starts_with('/') {
            libraries.push(path.into());
        }
        if name.starts_with('/') {
            libraries.push(name.into());
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_that_ldd_finds() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found = parse(text).unwrap();
        let expected = ["/lib/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(found, expected.map(PathBuf::from));
        assert_eq!(parse("\tstatically linked\n").unwrap(), [] as [PathBuf; 0]);
        assert_eq!(parse("\tlibx.so => not found\n"), Err("libx.so".to_owned()));
    }
}
