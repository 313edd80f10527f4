//! Programs on the hosts of a network of their own, and a proxy between them.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use crate::common::{Running, quiet, until};
use crate::namespaces::{Host, Hosts};

/// A program on a host.
pub(crate) fn on(host: &Host, program: &str, dir: &Path) -> Command {
    let mut command = quiet(Command::new("ip"), dir);
    command.args(["netns", "exec", host.name(), program]);
    command
}

/// A proxy on the server's host, for `anna` with `secret`, as the only way out of the client's.
pub(crate) fn only_by_proxy(hosts: &Hosts, dir: &Path) -> Running {
    let config = "Port 3128\nListen 10.203.0.2\nTimeout 600\nMaxClients 20\nLogLevel Connect\n\
                  BasicAuth anna secret\nConnectPort 4433\n";
    std::fs::write(dir.join("proxy.conf"), config).expect("written");
    let mut proxy = on(&hosts.server, "tinyproxy", dir);
    let mut proxy = Running::spawn(proxy.args(["-d", "-c", "proxy.conf"]));
    until("the proxy listens", || {
        assert!(!proxy.has_ended(), "{:?}", proxy.exited());
        let reached = hosts
            .client
            .run(|| TcpStream::connect("10.203.0.2:3128").is_ok());
        reached.join().expect("no panic")
    });
    hosts.server.nft("iifname eth0 meta l4proto udp", "drop");
    hosts.server.nft("iifname eth0 tcp dport != 3128", "drop");
    proxy
}
