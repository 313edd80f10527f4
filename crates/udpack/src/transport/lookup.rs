//! Resolves hosts: names, addresses, and link-local addresses with a zone.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};

/// The addresses of a host, in the order in which the system would try them. The host is a name, an IPv4 address, or an IPv6 address
/// without brackets; a link-local one has its zone, which is the name or the number of a network interface of this machine:
/// `fe80::1%eth0`, `fe80::1%2`.
///
/// # Errors
/// The resolver's error. For an unknown zone, the error lists the existing interfaces; a link-local address without a
/// zone is refused.
///
/// # Cancel safety
/// After a dropped future the system's resolver finishes its query, and the result is ignored.
pub async fn lookup(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let (address, zone) = match host.split_once('%') {
        Some((address, zone)) => (address, Some(zone)),
        None => (host, None),
    };
    match (address.parse::<Ipv6Addr>(), zone) {
        (Ok(address), Some(zone)) => {
            let scope = interface(zone)?;
            Ok(vec![SocketAddrV6::new(address, port, 0, scope).into()])
        }
        (Ok(address), None) if address.is_unicast_link_local() => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a link-local address needs its network interface: {address}%{}",
                interfaces().first().map_or("eth0", String::as_str)
            ),
        )),
        _ => Ok(tokio::net::lookup_host((host, port)).await?.collect()),
    }
}

/// Converts the address of an IPv4 peer on an IPv6 socket, `::ffff:192.0.2.1`, into 192.0.2.1.
pub(crate) fn unmapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(ip) => SocketAddr::new(ip.into(), v6.port()),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}

/// The number of a network interface, by its name or its number.
#[cfg(target_os = "linux")]
fn interface(zone: &str) -> io::Result<u32> {
    use rustix::net::netdevice;
    let socket = any_socket()?;
    if let Ok(index) = netdevice::name_to_index(&socket, zone) {
        return Ok(index);
    }
    match zone.parse() {
        Ok(index) if netdevice::index_to_name(&socket, index).is_ok() => Ok(index),
        _ => Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!(
                "there is no network interface {zone} here, only {}",
                interfaces().join(", ")
            ),
        )),
    }
}

/// The number of a network interface; on other systems only by its number.
#[cfg(not(target_os = "linux"))]
fn interface(zone: &str) -> io::Result<u32> {
    zone.parse().map_err(|_| {
        let text = format!("a network interface goes by its number here, not by {zone}");
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })
}

/// The names of this machine's network interfaces with the smallest numbers.
#[cfg(target_os = "linux")]
fn interfaces() -> Vec<String> {
    let Ok(socket) = any_socket() else {
        return Vec::new();
    };
    let names = (1..64).filter_map(|index| {
        let name = rustix::net::netdevice::index_to_name(&socket, index);
        name.ok()
    });
    names.take(8).collect()
}

#[cfg(not(target_os = "linux"))]
fn interfaces() -> Vec<String> {
    Vec::new()
}

/// A socket through which the kernel is queried.
#[cfg(target_os = "linux")]
fn any_socket() -> io::Result<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketType};
    Ok(rustix::net::socket(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_peer_is_shown_as_such() {
        for (address, shown) in [
            ("[::ffff:192.0.2.1]:9", "192.0.2.1:9"),
            ("192.0.2.1:9", "192.0.2.1:9"),
            ("[2001:db8::1]:9", "[2001:db8::1]:9"),
            ("[fe80::1%3]:9", "[fe80::1%3]:9"),
            ("[::1]:9", "[::1]:9"),
        ] {
            assert_eq!(unmapped(address.parse().unwrap()).to_string(), shown);
        }
    }

    #[tokio::test]
    async fn a_link_local_address_needs_its_interface() {
        let error = lookup("fe80::1", 9).await.expect_err("no zone");
        let text = error.to_string();
        assert!(text.contains("network interface: fe80::1%"), "{text}");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_zone_is_a_name_or_a_number() {
        let by_name = lookup("fe80::1%lo", 9).await.unwrap();
        let [SocketAddr::V6(address)] = by_name[..] else {
            panic!("{by_name:?}");
        };
        assert_ne!(address.scope_id(), 0);
        let number = format!("fe80::1%{}", address.scope_id());
        assert_eq!(lookup(&number, 9).await.unwrap(), by_name);
        for missing in ["nothing", "4294967295", "99999999999", "0"] {
            let error = lookup(&format!("fe80::1%{missing}"), 9).await;
            let text = error.expect_err("no such interface").to_string();
            let start = format!("there is no network interface {missing} here, only ");
            assert!(text.starts_with(&start) && text.contains("lo"), "{text}");
        }
    }
}
