//! Presence: who is in a room. A peer whose connection is lost and resumed stays present; the others see
//! it neither leave nor join.
//!
//! The network is in memory and its clock jumps: half a minute of silence takes no time.
//!
//! Run it with `cargo run --example presence`.

use std::error::Error;
use std::time::Duration;

use udpack::testing::{Net, server};
use udpack::{Channel, Client, Hello, Peer, PresenceDiff, PresenceMap, Reconnect};
use udpack::{Server, Socket, SocketState};

async fn lobby(channel: Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
    channel.track("lobby", "online")?;
    while channel.recv().await?.is_some() {}
    Ok(())
}

async fn enter(
    net: &Net,
    server: &Server,
    name: &str,
) -> Result<(Socket, Channel), Box<dyn Error>> {
    let client = Client::builder().pin(server.fingerprint()).token(name);
    let client = client.reconnect(Reconnect::default());
    let socket = net.connect(client, server).await?;
    let channel = socket.channel("lobby").resumable().open().await?;
    Ok((socket, channel))
}

/// The next change, and who is there after it.
async fn change(channel: &Channel, here: &mut PresenceMap) -> Result<PresenceDiff, Box<dyn Error>> {
    loop {
        let message = channel.recv().await?.ok_or("the channel is over")?;
        if let Some(diff) = here.apply(&message) {
            println!("here: {}", here.peers().collect::<Vec<_>>().join(", "));
            return Ok(diff);
        }
    }
}

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> Result<(), Box<dyn Error>> {
    let net = Net::new(1).delay(Duration::from_millis(20));
    let server = server()
        .auth(async |hello: Hello| Ok(Peer::new(hello.token())))
        .channel("lobby", lobby);
    let server = net.bind(server).await?;
    let (_ann, lobby) = enter(&net, &server, "ann").await?;
    let mut here = PresenceMap::new("lobby");
    change(&lobby, &mut here).await?;

    let (bob, _channel) = enter(&net, &server, "bob").await?;
    let came = change(&lobby, &mut here).await?;
    assert_eq!(came.joins[0].peer(), "bob");

    net.cut_client_for(&bob, Duration::from_secs(45));
    let mut states = bob.states();
    while let Some(state) = states.next().await {
        println!("bob: {state:?}");
        if matches!(state, SocketState::Connected { resumed: true, .. }) {
            break;
        }
    }
    bob.close(udpack::CloseCode::NORMAL, "good night").await;
    let left = change(&lobby, &mut here).await?;
    assert!(left.joins.is_empty() && left.leaves[0].peer() == "bob");
    assert_eq!(here.peers().collect::<Vec<_>>(), ["ann"]);
    Ok(())
}
