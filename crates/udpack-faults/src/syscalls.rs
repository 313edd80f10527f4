//! later
use crate::rig::Rig;
use crate::rng::Rng;
use clap::Args;
#[derive(Clone, Debug, Args)]
pub(crate) struct SyscallArgs {}
pub(crate) fn run(_args: &SyscallArgs, _rig: Rig, _rng: Rng) -> anyhow::Result<bool> {
    Ok(true)
}
