//! Requests in both directions on one channel, one answered with a typed fault, and one that is
//! not waited for any longer.
//!
//! Run it with `cargo run --example request`.

use std::error::Error;
use std::time::Duration;

use udpack::{Channel, Client, Context, Fault, Hello, Identity, Peer};
use udpack::{RecvError, RequestError, Server};

async fn serve(channel: Channel) -> Result<(), RecvError> {
    channel
        .on("greet", async |(): (), cx: Context| {
            // The one who asks is asked back before the answer.
            let name = cx.channel().request::<_, String>("name", &()).await;
            let name = name.map_err(|error| error.to_string())?;
            Ok::<_, Fault>(format!("good day, {name}"))
        })
        .on("divide", async |(a, b): (i64, i64), _: Context| {
            let quotient = a.checked_div(b);
            quotient.ok_or_else(|| Fault::new("undefined", "that has no answer"))
        })
        .on("ponder", |(): (), _: Context| std::future::pending::<()>())
        .run()
        .await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(async |_: Hello| Ok(Peer::new("guest")))
        .channel("desk", serve)
        .bind("127.0.0.1:0")
        .await?;
    let client = Client::builder().pin(server.fingerprint());
    let socket = client.connect(&server.local_addr().to_string()).await?;

    let desk = socket.open("desk").await?;
    let handlers = desk.on("name", async |(): (), _: Context| Ok::<_, Fault>("Ann"));
    tokio::spawn(handlers.run());

    println!("{}", desk.request::<_, String>("greet", &()).await?);
    let third: i64 = desk.request("divide", &(126, 3)).await?;
    println!("126 / 3 = {third}");
    match desk.request::<_, i64>("divide", &(1, 0)).await {
        Err(RequestError::Fault(fault)) => println!("1 / 0: {fault}"),
        other => return Err(format!("expected a fault, got {other:?}").into()),
    }
    let patience = Duration::from_millis(50);
    match desk.request::<_, ()>("ponder", &()).timeout(patience).await {
        Err(error) if error.is_timeout() => println!("ponder: {error}"),
        other => return Err(format!("expected a timeout, got {other:?}").into()),
    }
    Ok(())
}
