//! A chat that keeps its last messages: who was away for longer than its session was kept gets what it missed, and
//! after a restart of the server it is told that the messages of before are gone.
//!
//! The network is in memory and its clock jumps: minutes of silence take no time.
//!
//! Run it with `cargo run --example history`; with `--release --example history -- measure` it tells how long 10,000
//! missed messages take over this machine's own network.

use std::error::Error;
use std::time::{Duration, Instant};

use udpack::testing::{Net, client, server};
use udpack::{Channel, History, Identity, Reconnect, RoomPosition};
use udpack::{Server, ServerBuilder, Subscription, Why};

async fn chat(channel: Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
    // Where the client was, if it was here before.
    channel.join("hall")?;
    while channel.recv().await?.is_some() {}
    Ok(())
}

fn builder(identity: &Identity) -> ServerBuilder {
    server().identity(identity.clone()).channel("chat", chat)
}

fn say(server: &Server, words: &[&str]) -> Result<(), Box<dyn Error>> {
    for word in words {
        server.rooms().to("hall").send("said", word)?;
    }
    Ok(())
}

/// Reads up to this word; gives the words, and how many were told to be missing.
async fn until(hall: &mut Subscription, last: &str) -> Result<(Vec<String>, u64), Box<dyn Error>> {
    let (mut words, mut missing) = (Vec::new(), 0);
    while words.last().is_none_or(|word| word != last) {
        let message = hall.recv().await?.ok_or("the channel is over")?;
        match message.gap() {
            Some(gap) => {
                let other = gap.missing.is_some_and(|gap| gap.why == Why::Epoch);
                println!("{} are missing, another history: {other}", gap.lost);
                missing += gap.lost;
            }
            None => words.push(message.data()?),
        }
    }
    Ok((words, missing))
}

fn main() -> Result<(), Box<dyn Error>> {
    let measures = std::env::args().any(|arg| arg == "measure");
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(!measures).build()?;
    match measures {
        true => runtime.block_on(measure()),
        false => runtime.block_on(show()),
    }
}

/// How long a member that missed 10,000 messages of 100 bytes takes to have them.
async fn measure() -> Result<(), Box<dyn Error>> {
    const MISSED: u64 = 10_000;
    let server = builder(&Identity::generate()?).bind("127.0.0.1:0").await?;
    let bounds = History {
        messages: 20_000,
        bytes: 64 << 20,
        ..History::default()
    };
    server.rooms().history("hall", bounds)?;
    let text = "x".repeat(100);
    for number in 0..MISSED {
        server.rooms().to("hall").send("said", &(number, &text))?;
    }
    let address = server.local_addr().to_string();
    let socket = client(&server).connect(&address).await?;
    let begin = server.rooms().position("hall").map(|at| RoomPosition {
        room: "hall".to_owned(),
        epoch: at.epoch,
        offset: 0,
    });
    let begun = Instant::now();
    let channel = socket.channel("chat").since(begin).open().await?;
    for number in 0..MISSED {
        let message = channel.recv().await?.ok_or("the channel is over")?;
        assert_eq!(message.data::<(u64, String)>()?.0, number);
    }
    println!("{MISSED} missed messages in {:?}", begun.elapsed());
    Ok(())
}

async fn show() -> Result<(), Box<dyn Error>> {
    let net = Net::new(1).delay(Duration::from_millis(20));
    let identity = Identity::generate()?;
    let first = net.bind(builder(&identity)).await?;
    let last_three = History {
        messages: 3,
        ..History::default()
    };
    first.rooms().history("hall", last_three)?;
    let settings = client(&first).reconnect(Reconnect::default());
    let ann = net.connect(settings, &first).await?;
    let mut hall = ann.channel("chat").subscribe().await?;
    while first.rooms().members("hall").is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    say(&first, &["one"])?;
    println!("ann hears {:?}", until(&mut hall, "one").await?);

    // Two minutes: her session is forgotten.
    net.cut_client_for(&ann, Duration::from_secs(120));
    say(&first, &["two", "three", "four", "five"])?;
    let (words, missing) = until(&mut hall, "five").await?;
    assert_eq!((words.join(" "), missing), ("three four five".into(), 1));

    // The next server knows nothing of what this one kept.
    let address = first.local_addr();
    net.take_down(&first);
    let next = net.bind_at(builder(&identity), address).await?;
    next.rooms().history("hall", last_three)?;
    say(&next, &["six", "seven"])?;
    let (words, missing) = until(&mut hall, "seven").await?;
    println!("ann has heard {} and of {missing} gone", words.join(" "));
    Ok(())
}
