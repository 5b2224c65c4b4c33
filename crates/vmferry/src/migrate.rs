//! `vmferry migrate`.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};
use vmferry_control::schema::{MigrationInfo, MigrationStatus};
use vmferry_control::{ClientError, QmpClient};
use vmferry_engine::Uri;

use crate::cli;
use crate::output::print;
use crate::progress::{Audience, PATIENCE, follow};
use crate::report;

/// Moves a guest, and returns when it runs on the other side.
pub fn migrate(options: &cli::Migrate) -> anyhow::Result<()> {
    let mut vm = QmpClient::connect(&options.monitor.qmp, PATIENCE)?;
    set_parameters(&mut vm, options)?;
    let uri = seen_from_the_vm(&options.uri)?;
    vm.execute("migrate", json!({"uri": uri.to_string()}))?;
    if options.detach {
        return report_detached(options);
    }
    let audience = match options.json {
        true => Audience::Nobody,
        false => Audience::Person,
    };
    let info = follow(&mut vm, audience)
        .context("lost sight of the migration; it may go on: see vmferry status")?;
    let result = succeed(&info);
    let printed = match (options.json, &result) {
        (true, _) => print(format!("{}\n", serde_json::to_value(&info)?)),
        (false, Ok(())) => print(format!(
            "The guest has moved to {}.\n{}",
            options.uri,
            report::migration_table(&info)
        )),
        (false, Err(_)) => Ok(()),
    };
    result?;
    // Whether or not anybody reads that the guest has left, it has.
    if !options.keep_source {
        quit(&mut vm)?;
    }
    printed
}

/// The same address for a process with another working directory.
fn seen_from_the_vm(uri: &Uri) -> anyhow::Result<Uri> {
    let absolute = |path: &PathBuf| {
        std::path::absolute(path).with_context(|| format!("cannot tell where {uri} is"))
    };
    Ok(match uri {
        Uri::File(path) => Uri::File(absolute(path)?),
        Uri::Unix(path) => Uri::Unix(absolute(path)?),
        uri => uri.clone(),
    })
}

/// Lets a VM end. Its connection closing before the answer is its way of having done so.
pub fn quit(vm: &mut QmpClient) -> Result<(), ClientError> {
    match vm.execute("quit", Value::Null) {
        Err(error @ (ClientError::Command { .. } | ClientError::Timeout { .. })) => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// An error unless the guest has arrived.
pub fn succeed(info: &MigrationInfo) -> anyhow::Result<()> {
    match info.status {
        Some(MigrationStatus::Completed) => Ok(()),
        Some(MigrationStatus::Cancelled) => {
            bail!("the migration was cancelled; the guest is as it was")
        }
        _ => {
            let why = info.error_desc.as_deref().unwrap_or("no reason was given");
            Err(anyhow!("{why}").context("the migration failed"))
        }
    }
}

fn set_parameters(vm: &mut QmpClient, options: &cli::Migrate) -> Result<(), ClientError> {
    let mut parameters = serde_json::Map::new();
    if let Some(limit) = options.downtime_limit {
        let ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        parameters.insert("downtime-limit".to_owned(), ms.into());
    }
    if let Some(bandwidth) = options.max_bandwidth {
        parameters.insert("max-bandwidth".to_owned(), bandwidth.into());
    }
    if let Some(discipline) = options.discipline {
        parameters.insert(
            "x-vmferry-discipline".to_owned(),
            discipline.as_str().into(),
        );
    }
    if !parameters.is_empty() {
        vm.execute("migrate-set-parameters", parameters.into())?;
    }
    Ok(())
}

fn report_detached(options: &cli::Migrate) -> anyhow::Result<()> {
    if options.json {
        print(format!("{}\n", json!({"status": "setup"})))
    } else {
        let qmp: &Path = &options.monitor.qmp;
        print(format!(
            "The migration has begun. Follow it with: vmferry status --watch --qmp unix:{}\n",
            qmp.display()
        ))
    }
}
