//! Browsers' sessions, made by a WebTransport client of other authors: what an idle one costs the server.

use anyhow::{bail, ensure};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::Serialize;
use udpack::wire::PREFIX;
use web_transport_quinn::{Client, ClientBuilder, RecvStream, SendStream, Session};

use crate::args::{Load, Scenario};
use crate::ours::{self, AT_ONCE, TOKEN};
use crate::peer::{Marks, Ready, Report};

/// A session that was let in, and its control stream: without that stream it ends.
type Page = (Session, SendStream, RecvStream);

#[derive(Serialize)]
struct Hello {
    v: u32,
    token: &'static str,
    agent: &'static str,
}

/// Runs the one scenario that this client has.
pub(crate) async fn drive(
    scenario: Scenario,
    ready: &Ready,
    load: &Load,
    marks: Marks,
) -> anyhow::Result<Report> {
    let Scenario::Idle = scenario else {
        bail!("browsers are measured by idle only");
    };
    // The certificate is made for this run, and this process was told where the server is.
    let client = ClientBuilder::new().dangerous();
    let client = client.with_no_certificate_verification()?;
    let many = async |count: usize| {
        let pages = stream::iter(0..count).map(|_| page(&client, ready));
        pages
            .buffer_unordered(AT_ONCE)
            .try_collect::<Vec<_>>()
            .await
    };
    ours::idle(load, marks, many).await
}

/// Connects, says hello and waits for the welcome.
async fn page(client: &Client, ready: &Ready) -> anyhow::Result<Page> {
    let url = format!("https://{}/udpack", ready.address);
    let session = client.connect(url.parse::<url::Url>()?).await?;
    let (mut send, mut recv) = session.open_bi().await?;
    let data = Hello {
        v: 1,
        token: TOKEN,
        agent: "udpack-bench",
    };
    let body = rmp_serde::to_vec_named(&("$hello", data))?;
    let length = u32::try_from(body.len())?.to_be_bytes();
    send.write_all(&[&length[..], &body].concat()).await?;
    let mut prefix = [0; PREFIX];
    recv.read_exact(&mut prefix).await?;
    let mut welcome = vec![0; u32::from_be_bytes(prefix) as usize];
    recv.read_exact(&mut welcome).await?;
    let (event, _): (String, serde::de::IgnoredAny) = rmp_serde::from_slice(&welcome)?;
    ensure!(event == "$welcome", "the server said {event}");
    Ok((session, send, recv))
}
