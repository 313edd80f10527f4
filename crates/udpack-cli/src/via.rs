//! `--via`: the interfaces or local addresses that a transfer is spread over.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use udpack::ClientBuilder;

use crate::exit::{Failure, Kind};

/// The most paths of one transfer: each is a connection.
const MOST: usize = 8;

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Via {
    /// Every interface that has a default route.
    Auto,
    These(Vec<Path>),
}

/// One path to the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Path {
    Address(IpAddr),
    Interface(String),
}

impl FromStr for Via {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let mut paths = Vec::new();
        for name in text.split(',').map(str::trim) {
            let path = match name.parse() {
                Ok(address) => Path::Address(address),
                Err(_) if is_interface(name) => Path::Interface(name.to_owned()),
                Err(_) => {
                    return Err(format!(
                        "{name:?} is neither an interface nor a local address"
                    ));
                }
            };
            if paths.contains(&path) {
                return Err(format!("{name} is named twice"));
            }
            paths.push(path);
        }
        match paths.len() {
            0..=MOST => Ok(Self::These(paths)),
            count => Err(format!("{count} paths; at most {MOST}")),
        }
    }
}

/// Whether an interface may have this name, by Linux's rules.
fn is_interface(name: &str) -> bool {
    let sound = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
    (1..=15).contains(&name.len()) && name.chars().all(sound) && name != "." && name != ".."
}

impl Via {
    /// The paths, each with its name.
    pub(crate) fn paths(&self) -> anyhow::Result<Vec<Path>> {
        match self {
            Self::These(paths) => {
                for path in paths {
                    path.check()?;
                }
                Ok(paths.clone())
            }
            Self::Auto => {
                let paths = default_routes();
                if let [] | [_] = &paths[..] {
                    tracing::warn!(
                        "--via auto finds no two interfaces with a default route: one path is used"
                    );
                    return Ok(Vec::new());
                }
                Ok(paths)
            }
        }
    }
}

impl Path {
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Address(address) => address.to_string(),
            Self::Interface(name) => name.clone(),
        }
    }

    /// The same client over this path.
    pub(crate) fn set(&self, client: ClientBuilder) -> ClientBuilder {
        match self {
            Self::Address(address) => client.local_address(SocketAddr::new(*address, 0)),
            Self::Interface(name) => client.interface(name),
        }
    }

    /// What cannot become right by waiting is told before anything is sent.
    fn check(&self) -> anyhow::Result<()> {
        match self {
            Self::Interface(name) if cfg!(target_os = "linux") => {
                match fs::metadata(format!("/sys/class/net/{name}")) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        let text = format!("this machine has no interface {name}");
                        Err(Failure::new(Kind::Usage, text)
                            .hint("`ip link` lists them; local addresses will do, too")
                            .into())
                    }
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }
}

/// The interfaces with a default route, those of IPv4 first, as Linux lists them.
fn default_routes() -> Vec<Path> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let (v4, v6) = (read("/proc/net/route"), read("/proc/net/ipv6_route"));
    let mut paths = Vec::new();
    for name in ipv4(&v4).chain(ipv6(&v6)) {
        let path = Path::Interface(name.to_owned());
        if paths.len() < MOST && !paths.contains(&path) {
            paths.push(path);
        }
    }
    paths
}

/// A route that leads nowhere.
const REJECTS: u32 = 0x200;
/// A route that is in use.
const UP: u32 = 1;

fn ipv4(table: &str) -> impl Iterator<Item = &str> {
    table.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [name, "00000000", _, flags, _, _, _, "00000000", ..] = fields[..] else {
            return None;
        };
        leads(flags).then_some(name)
    })
}

fn ipv6(table: &str) -> impl Iterator<Item = &str> {
    table.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [to, "00", .., flags, name] = fields[..] else {
            return None;
        };
        let anywhere = to.bytes().all(|digit| digit == b'0');
        (anywhere && name != "lo" && leads(flags)).then_some(name)
    })
}

fn leads(flags: &str) -> bool {
    let flags = u32::from_str_radix(flags, 16).unwrap_or(0);
    flags & UP != 0 && flags & REJECTS == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_told_apart() {
        let via: Via = "eth0, 192.0.2.7,2001:db8::7".parse().expect("three");
        let names = |via: &Via| match via {
            Via::These(paths) => paths.iter().map(Path::name).collect::<Vec<_>>(),
            Via::Auto => vec!["auto".to_owned()],
        };
        assert_eq!(names(&via), ["eth0", "192.0.2.7", "2001:db8::7"]);
        assert_eq!("auto".parse(), Ok(Via::Auto));
        for bad in [
            "",
            "eth0,",
            "eth0,eth0",
            "a name",
            "../lo",
            "a/b",
            "..",
            "an-interface-name-of-more-than-15",
            "a,b,c,d,e,f,g,h,i",
        ] {
            bad.parse::<Via>().expect_err(bad);
        }
    }

    #[test]
    fn interfaces_with_a_default_route_are_found() {
        let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                  eth0\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
                  wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
                  eth1\t00000000\t00000000\t0200\t0\t0\t0\t00000000\t0\t0\t0\n\
                  eth0\t0000A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0\n";
        assert_eq!(ipv4(v4).collect::<Vec<_>>(), ["eth0", "wlan0"]);
        let zeros = "0".repeat(32);
        let v6 = format!(
            "fe800000000000000000000000000000 40 {zeros} 00 {zeros} 00000100 00000001 00000000 00000001     eth0\n\
             {zeros} 00 {zeros} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00450003     wlan0\n\
             {zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200       lo\n"
        );
        assert_eq!(ipv6(&v6).collect::<Vec<_>>(), ["wlan0"]);
    }
}
