//! `send` and `listen`: events, between the server's clients; `request`: a question to any channel.

use serde::Serialize;
use udpack::{Channel, Fault, Timeouts};

use crate::args::{ListenArgs, RequestArgs, Seconds, SendArgs};
use crate::exit::{Failure, Kind};
use crate::logging::Console;
use crate::output;
use crate::signals::Interrupts;
use crate::target::Target;
use crate::value::{Json, Value};

/// One event as `listen` prints it.
#[derive(Serialize)]
struct Line<'a> {
    event: &'a str,
    data: Json<'a>,
}

pub(super) async fn send(args: SendArgs, interrupts: Interrupts) -> anyhow::Result<()> {
    let timeout = Timeouts::default().request;
    request(
        RequestArgs {
            event: args.event,
            json: args.json,
            channel: args.channel,
            timeout: Seconds(timeout),
            connect: args.connect,
            log: args.log,
        },
        interrupts,
    )
    .await
}

pub(super) async fn request(args: RequestArgs, mut interrupts: Interrupts) -> anyhow::Result<()> {
    let data = Value::from_json(&args.json).map_err(|error| {
        Failure::new(Kind::Usage, format!("the data is not JSON: {error}"))
            .hint("quote it for the shell, as in '{\"text\":\"hello\"}' or '\"hello\"'")
    })?;
    let target = Target::find(&args.connect)?;
    let reply: Value = target
        .run(&mut interrupts, async |socket| {
            let channel = socket.open(&args.channel).await?;
            let request = channel.request(&args.event, &data);
            let reply = request.timeout(args.timeout.0).await?;
            finish(&channel).await;
            Ok(reply)
        })
        .await?;
    output::unless_gone(output::json(&reply.json()))
}

pub(super) async fn listen(
    args: ListenArgs,
    console: &Console,
    mut interrupts: Interrupts,
) -> anyhow::Result<()> {
    let target = Target::find(&args.connect)?;
    target
        .run(&mut interrupts, async |socket| {
            let channel = socket.open(&args.channel).await?;
            if !args.log.quiet {
                console.line(&format!(
                    "listening on {} at {}",
                    args.channel,
                    target.address()
                ));
            }
            let mut left = args.count.unwrap_or(u64::MAX);
            while left > 0
                && let Some(message) = channel.recv().await?
            {
                let data: Value = message.data()?;
                let written = output::json(&Line {
                    event: message.event(),
                    data: data.json(),
                });
                match written {
                    Err(error) if output::is_gone(&error) => break,
                    other => output::unless_gone(other)?,
                }
                left -= 1;
                let fault = Fault::new(Fault::NO_HANDLER, "this client only listens");
                let _ = channel.fault(&message, &fault).await;
            }
            finish(&channel).await;
            Ok(())
        })
        .await
}

/// Ends a channel in good order; whether the peer still cares is its own business.
pub(super) async fn finish(channel: &Channel) {
    let _ = tokio::time::timeout(std::time::Duration::from_secs(1), channel.finish()).await;
}
