//! `--web`: the pages for browsers, and the link to them.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;
use udpack::{Origins, Server, Web, WebCertificate, WebCertificateError};
use udpack_web::{HttpListener, Pages, Site};

use super::url;
use crate::args::ServerArgs;
use crate::exit::{Failure, Kind};
use crate::output;
use crate::qr;

/// The port for browsers, and how the server is to treat them.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) listener: HttpListener,
    pub(super) web: Web,
    host: Option<String>,
    certificate: Option<WebCertificate>,
}

/// The port that the arguments ask for. `udp` is where the server listens.
pub(super) async fn bind(args: &ServerArgs, udp: SocketAddr) -> anyhow::Result<Option<Port>> {
    let Some(address) = &args.web else {
        return Ok(None);
    };
    let address = address.clone().unwrap_or_else(|| udp.to_string());
    let listener = HttpListener::bind(&*address).await.map_err(|error| {
        let text = format!("cannot serve pages at {address}: {error}");
        Failure::new(Kind::Other, text)
            .hint("choose another address with --web, such as 127.0.0.1:8080")
    })?;
    let origins: Vec<String> = args.web_origin.iter().map(|one| one.0.clone()).collect();
    let hosts = origins.iter().filter_map(|origin| Origins::host(origin));
    let hosts = hosts.chain(args.public_host.as_deref());
    let web = Web::new().hosts(hosts);
    let host = match origins.is_empty() {
        true => None,
        false => args.public_host.clone(),
    };
    let web = web.origins(match origins.is_empty() {
        true => Origins::SameHost,
        false => Origins::SameHostAnd(origins),
    });
    let certificate = args.tls_cert.as_deref().zip(args.tls_key.as_deref());
    let certificate = certificate.map(certificate_of).transpose()?;
    let web = match &certificate {
        Some(certificate) => web.certificate(certificate.clone()),
        None => web,
    };
    if certificate.is_some() && args.public_host.is_none() {
        tracing::warn!(
            "--tls-cert without --public-host: the link has an address, and the certificate a name"
        );
    }
    Ok(Some(Port {
        listener,
        web,
        host,
        certificate,
    }))
}

fn certificate_of((chain, key): (&Path, &Path)) -> anyhow::Result<WebCertificate> {
    WebCertificate::load(chain, key).map_err(|error| {
        Failure::new(Kind::LocalFile, said(error))
            .hint("give --tls-cert the chain (certbot's fullchain.pem) and --tls-key its key (privkey.pem)")
            .into()
    })
}

/// With its cause.
fn said(error: WebCertificateError) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

/// Serves the pages for ever, if there are any, and WebSockets for clients beside them.
pub(super) async fn serve(
    port: Option<Port>,
    site: Site,
    server: &Server,
    websockets: bool,
) -> anyhow::Result<()> {
    let Some(port) = port else {
        return std::future::pending().await;
    };
    let site = site.pages(port.pages(server));
    let site = match websockets {
        true => site.websockets(server.clone(), port.web),
        false => site,
    };
    tokio::select! {
        ended = port.listener.serve(site) => Ok(ended?),
        failed = follow(port.certificate) => failed,
    }
}

/// Reads a certificate again when its files have changed, and on SIGHUP. Runs for ever.
async fn follow(certificate: Option<WebCertificate>) -> anyhow::Result<()> {
    let Some(certificate) = certificate else {
        return std::future::pending().await;
    };
    let mut asked = signal(SignalKind::hangup())?;
    let mut ticks = tokio::time::interval(FOLLOW);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The two files are not replaced together: they are read once nothing has changed since the last look.
    let mut changing = false;
    loop {
        let due = tokio::select! {
            _ = asked.recv() => true,
            _ = ticks.tick() => std::mem::replace(&mut changing, certificate.has_changed()) && changing,
        };
        if !due {
            continue;
        }
        changing = false;
        let reading = certificate.clone();
        match tokio::task::spawn_blocking(move || reading.reload()).await {
            Ok(Ok(())) => tracing::info!("the certificate for browsers was read again"),
            Ok(Err(error)) => {
                let error = said(error);
                tracing::error!(error, "the certificate for browsers stays as it was");
            }
            Err(error) => tracing::error!(%error, "the certificate for browsers was not read"),
        }
    }
}

/// How often it is looked whether the certificate has changed.
const FOLLOW: Duration = Duration::from_secs(2);

impl Port {
    pub(super) fn pages(&self, server: &Server) -> Pages {
        Pages::new(server.clone(), self.web.clone()).host(self.host.clone())
    }

    /// The address of the pages, without a token.
    pub(super) fn link(&self, args: &ServerArgs) -> String {
        let address = self.listener.local_addr();
        let (scheme, host) = match &args.public_host {
            Some(host) => ("https", host.clone()),
            None if address.ip().is_loopback() => ("http", address.ip().to_string()),
            None => ("https", url::reachable(address.ip()).to_string()),
        };
        let host = match host.contains(':') {
            true => format!("[{host}]"),
            false => host,
        };
        format!("{scheme}://{host}:{}/", address.port())
    }
}

/// With this token, which the page takes out of the address bar at once. It is behind the `#`, so that the browser sends it to
/// nobody.
pub(super) fn with_token(link: &str, token: &str) -> String {
    format!("{link}#t={token}")
}

/// Leaves the link for [`left`], or takes away that of an earlier start.
pub(super) fn leave(link: Option<&str>, keys: &Path) {
    url::leave_line(keys, LINK, link);
}

/// The link that the last start left.
pub(super) fn left(keys: &Path) -> anyhow::Result<String> {
    url::left_line(keys, LINK).ok_or_else(|| {
        Failure::new(Kind::LocalFile, "the server was not started with --web")
            .hint("start it with --web, or name the directory of its key with --keys")
            .into()
    })
}

/// Prints a link, and on a terminal a picture of it for a telephone.
pub(super) fn show(link: &str, json: bool) -> anyhow::Result<()> {
    if json {
        return output::unless_gone(output::json(&json!({ "web": link })));
    }
    output::unless_gone(output::line(link))?;
    output::unless_gone(qr::show(link))
}

const LINK: &str = "web";
