//! The arm of the real programs: `udpack-server` and `udpack-client put`, from start to exit.

use anyhow::bail;
use tempfile::TempDir;

use crate::args::{Load, Options, Scenario};
use crate::driver::Bench;
use crate::peer::Told;

/// What is sent, and where to.
pub(crate) struct Files {
    dir: TempDir,
}

impl Files {
    pub(crate) fn of(
        _scenario: Scenario,
        _load: &Load,
        _options: &Options,
    ) -> anyhow::Result<Option<Self>> {
        Ok(None)
    }

    pub(crate) fn target(&self) -> anyhow::Result<TempDir> {
        Ok(TempDir::new_in(self.dir.path())?)
    }
}

pub(crate) fn run(_bench: &Bench<'_>) -> anyhow::Result<Told> {
    bail!("not yet")
}
