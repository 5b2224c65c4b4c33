//! Where unpacked packages are kept.

use std::env;
use std::path::{Path, PathBuf};

/// `rig` in the build's target directory.
pub fn default_cache() -> PathBuf {
    let target = match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .expect("the rig is a member of a workspace")
            .join("target"),
    };
    target.join("rig")
}
