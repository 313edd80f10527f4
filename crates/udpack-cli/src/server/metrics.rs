//! The server's counters, in the text format of Prometheus.

use udpack::{Pool, Server};
use udpack_transfer::Receiver;

use crate::server::place::Place;

/// The counters of the sockets, of the store, of what is pushed and of what the clients share.
pub(super) fn text(server: &Server, receiver: &Receiver, place: &Place) -> String {
    let mut text = server.metrics().prometheus();
    let ((files, bytes), usage) = receiver
        .store()
        .map_or_else(Default::default, |store| (store.stored(), store.usage()));
    let counters = [
        (
            "udpack_files_stored_total",
            "counter",
            "Files stored since the start.",
            files,
        ),
        (
            "udpack_files_stored_bytes_total",
            "counter",
            "Bytes of the files stored since the start.",
            bytes,
        ),
        (
            "udpack_uploads_open",
            "gauge",
            "Uploads under way.",
            usage.open as u64,
        ),
        (
            "udpack_uploads_suspended_bytes",
            "gauge",
            "Bytes held by interrupted uploads.",
            usage.suspended,
        ),
    ];
    for (name, kind, help, value) in counters.into_iter().chain(place.counters()) {
        text.push_str(&format!(
            "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n"
        ));
    }
    type Read = fn(&Pool) -> u64;
    let kinds: [(&str, &str, &str, Read); 3] = [
        (
            "udpack_places_used",
            "gauge",
            "Places for the work of clients that are taken.",
            |pool| pool.used() as u64,
        ),
        (
            "udpack_places_waiting",
            "gauge",
            "Those who wait for a place.",
            |pool| pool.waiting() as u64,
        ),
        (
            "udpack_places_refused_total",
            "counter",
            "Refusals because there was no place and no room to wait for one.",
            Pool::refused,
        ),
    ];
    for (name, kind, help, read) in kinds {
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        for (pool, places) in receiver.pools() {
            text.push_str(&format!("{name}{{pool=\"{pool}\"}} {}\n", read(places)));
        }
    }
    text
}
