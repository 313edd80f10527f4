//! Two network namespaces with a cable between them, for what the kernel does to packets.
//!
//! They need root and the programs `ip` and `nft`; where these are missing a test says so and ends.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Two hosts, each in a namespace of its own, with a cable between them: interface `eth0` at each end.
///
/// The client is 10.203.0.1, fd00:203::1 and fe80::1, the server 10.203.0.2, fd00:203::2 and fe80::2.
pub(crate) struct Hosts {
    pub(crate) client: Host,
    pub(crate) server: Host,
}

/// A host of its own network; removed when it is dropped.
pub(crate) struct Host(String);

impl Hosts {
    /// Makes them; says why it can't, and gives none then.
    pub(crate) fn new() -> Option<Self> {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = |side| format!("udpack-{}-{number}-{side}", std::process::id());
        match Self::make(name('c'), name('s')) {
            Ok(hosts) => Some(hosts),
            Err(why) => {
                let _ = writeln!(std::io::stderr(), "skipped: no network namespaces: {why}");
                None
            }
        }
    }

    fn make(client: String, server: String) -> Result<Self, String> {
        run("nft", &["--version"])?;
        run("ip", &["netns", "add", &client])?;
        let client = Host(client);
        run("ip", &["netns", "add", &server])?;
        let server = Host(server);
        let cable = ["link", "add", "eth0", "netns", &client.0, "type", "veth"];
        let other = ["peer", "name", "eth0", "netns", &server.0];
        run("ip", &[&cable[..], &other[..]].concat())?;
        for (host, number) in [(&client, 1), (&server, 2)] {
            host.ip("link set lo up")?;
            // Each datagram crosses the cable by itself, as on a real one.
            host.ip("link set eth0 addrgenmode none gso_max_segs 1")?;
            host.ip(&format!("address add 10.203.0.{number}/24 dev eth0"))?;
            host.ip(&format!("address add fd00:203::{number}/64 dev eth0 nodad"))?;
            host.ip(&format!("address add fe80::{number}/64 dev eth0 nodad"))?;
            host.ip("link set eth0 up")?;
        }
        Ok(Self { client, server })
    }

    /// Lets each end lose what arrives and matches this condition of nft, and tells nobody.
    pub(crate) fn lose(&self, what: &str) {
        self.client.nft(what, "drop");
        self.server.nft(what, "drop");
    }
}

impl Host {
    /// Its name, for `ip netns exec`.
    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    /// Does to each packet that arrives and matches this what nft calls `verdict`. No rule stands in for another one.
    pub(crate) fn nft(&self, what: &str, verdict: &str) {
        let rules = format!(
            "add table inet t; \
             add chain inet t c {{ type filter hook input priority -200; }}; \
             add rule inet t c {what} {verdict}"
        );
        run("ip", &["netns", "exec", &self.0, "nft", &rules]).expect("a rule");
    }

    /// Takes all rules away.
    pub(crate) fn pass_all(&self) {
        run("ip", &["netns", "exec", &self.0, "nft", "flush ruleset"]).expect("no rules");
    }

    /// A command of `ip`, within.
    pub(crate) fn ip(&self, command: &str) -> Result<String, String> {
        let mut words = vec!["-n", &self.0];
        words.extend(command.split(' '));
        run("ip", &words)
    }

    /// Runs this on a thread that lives in there.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let space = File::open(format!("/run/netns/{}", self.0)).expect("the namespace");
        thread::spawn(move || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(space.as_fd(), kind).expect("root may do so");
            body()
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = run("ip", &["netns", "del", &self.0]);
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let ran = Command::new(program).args(arguments).output();
    let ran = ran.map_err(|error| format!("{program}: {error}"))?;
    match ran.status.success() {
        true => Ok(String::from_utf8_lossy(&ran.stdout).into_owned()),
        false => {
            let why = String::from_utf8_lossy(&ran.stderr);
            Err(format!("{program} {}: {}", arguments.join(" "), why.trim()))
        }
    }
}
