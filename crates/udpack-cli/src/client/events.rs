//! `send` and `listen`: events, between the server's clients; `request`: a question to any channel.

use std::io;

use serde::Serialize;
use serde_json::json;
use tokio::sync::mpsc;
use udpack::{Channel, ConnectError, Fault, OpenError, RecvError, Socket, SocketState};

use crate::args::{AskArgs, ChannelArgs, ListenArgs, RequestArgs, Seconds, SendArgs};
use crate::exit::{Failure, Kind};
use crate::hub::PING;
use crate::logging::Console;
use crate::output;
use crate::signals::Interrupts;
use crate::target::{Target, retry};
use crate::value::{Json, Value};

/// One event as `listen` prints it.
#[derive(Serialize)]
struct Line<'a> {
    event: &'a str,
    data: Json<'a>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    volatile: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
}

/// What becomes of an answer.
#[derive(Clone, Copy)]
enum Answer {
    /// It is printed.
    Reply,
    /// Each of its items is printed.
    Items,
    /// That there is one is enough.
    Any,
}

pub(super) async fn send(args: SendArgs, interrupts: Interrupts) -> anyhow::Result<()> {
    let answer = if args.acked {
        Answer::Any
    } else {
        Answer::Reply
    };
    let target = asking(&args.connect, &args.ask)?;
    let values = Values::of(&args.json)?;
    if args.volatile {
        return send_volatile(&target, args.event, values, args.ask, interrupts).await;
    }
    ask(
        &target, args.event, values, answer, None, args.ask, interrupts,
    )
    .await
}

/// Sends each of the values as a volatile message; the channel makes the server's hub pass them on.
async fn send_volatile(
    target: &Target,
    event: String,
    mut values: Values,
    args: AskArgs,
    mut interrupts: Interrupts,
) -> anyhow::Result<()> {
    target
        .run(&mut interrupts, async |socket| {
            let channel = open(&socket, &args.channel, args.resumable).await?;
            // Volatile messages wait for the admission; a question would overtake them.
            if let Err(reason) = socket.admitted().await {
                return Err(ConnectError::Denied(reason).into());
            }
            while let Some(data) = values.next().await? {
                socket.send_volatile(&event, &data)?;
            }
            // They go out ahead of a question, whatever its answer.
            if let Ok(ping) = socket.open(PING).await {
                let asked = ping.send_acked("ping", &());
                let _ = asked.timeout(std::time::Duration::from_secs(5)).await;
            }
            // The hub ends its side when it has passed all of them on. Leaving earlier could end the channel before it is served.
            let served = async {
                let _ = channel.finish().await;
                while channel.recv().await?.is_some() {}
                Ok(())
            };
            let served = tokio::time::timeout(std::time::Duration::from_secs(5), served).await;
            served.unwrap_or(Ok(()))
        })
        .await
}

pub(super) async fn request(args: RequestArgs, interrupts: Interrupts) -> anyhow::Result<()> {
    let answer = if args.items {
        Answer::Items
    } else {
        Answer::Reply
    };
    let target = asking(&args.connect, &args.ask)?;
    let values = Values::of(&args.json)?;
    ask(
        &target,
        args.event,
        values,
        answer,
        args.timeout,
        args.ask,
        interrupts,
    )
    .await
}

fn asking(connect: &crate::args::ConnectArgs, ask: &AskArgs) -> anyhow::Result<Target> {
    if ask.resumable {
        Target::find_reconnecting(connect, retry(ask.retries))
    } else {
        Target::find(connect)
    }
}

/// Asks with each of the values, one after the other, and prints what comes back.
async fn ask(
    target: &Target,
    event: String,
    mut values: Values,
    answer: Answer,
    timeout: Option<Seconds>,
    args: AskArgs,
    mut interrupts: Interrupts,
) -> anyhow::Result<()> {
    let within = |request: udpack::Request<()>| match timeout {
        Some(timeout) => request.timeout(timeout.0),
        None => request,
    };
    target
        .run(&mut interrupts, async |socket| {
            let channel = open(&socket, &args.channel, args.resumable).await?;
            while let Some(data) = values.next().await? {
                let written = match answer {
                    Answer::Any => {
                        within(channel.send_acked(&event, &data)).await?;
                        Ok(())
                    }
                    Answer::Reply => {
                        let request = channel.request(&event, &data);
                        let reply: Value = match timeout {
                            Some(timeout) => request.timeout(timeout.0).await?,
                            None => request.await?,
                        };
                        output::json(&reply.json())
                    }
                    Answer::Items => {
                        let mut items = within(channel.request(&event, &data)).items().await?;
                        let mut written = Ok(());
                        while written.is_ok()
                            && let Some(item) = items.next().await
                        {
                            let item: Value = item?;
                            written = output::json(&item.json());
                        }
                        written
                    }
                };
                if !output::goes_on(written)? {
                    break;
                }
            }
            Ok(())
        })
        .await
}

async fn open(socket: &Socket, args: &ChannelArgs, resumable: bool) -> Result<Channel, OpenError> {
    let channel = socket.channel(&args.channel).priority(args.priority.into());
    if resumable {
        channel.resumable().open().await
    } else {
        channel.open().await
    }
}

/// The data of one event after the other.
enum Values {
    One(Option<Value>),
    Many(mpsc::Receiver<anyhow::Result<Value>>),
}

impl Values {
    /// This JSON, or, for `-`, what standard input holds.
    fn of(json: &str) -> anyhow::Result<Self> {
        if json != "-" {
            return Ok(Self::One(Some(Value::from_json(json).map_err(no_json)?)));
        }
        let (sender, values) = mpsc::channel(1);
        // Blocked in a read for as long as nothing comes: no task of the runtime, whose end would wait for it.
        std::thread::Builder::new()
            .name("stdin".to_owned())
            .spawn(move || {
                for value in Value::all_of(io::stdin().lock()) {
                    let value = value.map_err(|error| match error.io_error_kind() {
                        Some(_) => anyhow::Error::new(error).context("cannot read standard input"),
                        None => no_json(error).into(),
                    });
                    if sender.blocking_send(value).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self::Many(values))
    }

    async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        match self {
            Self::One(value) => Ok(value.take()),
            Self::Many(values) => values.recv().await.transpose(),
        }
    }
}

fn no_json(error: serde_json::Error) -> Failure {
    Failure::new(Kind::Usage, format!("the data is not JSON: {error}"))
        .hint("quote it for the shell, as in '{\"text\":\"hello\"}' or '\"hello\"'")
}

pub(super) async fn listen(
    args: ListenArgs,
    console: &Console,
    mut interrupts: Interrupts,
) -> anyhow::Result<()> {
    let target = match args.retries {
        Some(0) => Target::find(&args.connect)?,
        retries => Target::find_reconnecting(&args.connect, retry(retries))?,
    };
    target
        .run(&mut interrupts, async |socket| {
            // Who is told that this listens may send at once.
            if let Err(reason) = socket.admitted().await {
                return Err(ConnectError::Denied(reason).into());
            }
            let mut states = socket.states();
            // Where it stands now; the changes come behind.
            states.next().await;
            let told = async {
                let mut before = None;
                while let Some(state) = states.next().await {
                    if let Some(text) = change(before.as_ref(), &state) {
                        console.note(&text);
                    }
                    before = Some(state);
                }
                std::future::pending().await
            };
            let heard = async {
                let mut left = args.count.unwrap_or(u64::MAX);
                let mut attempt = 0;
                while left > 0 {
                    let channel = match open(&socket, &args.channel, true).await {
                        Ok(channel) => channel,
                        // It ends with the attempts to get one.
                        Err(OpenError::NoConnection(_)) => continue,
                        Err(error) => return Err(error.into()),
                    };
                    let told = async {
                        if attempt == 0 && accepted(&socket, &channel).await {
                            let (name, address) = (&args.channel.channel, target.address());
                            console.note(&format!("listening on {name} at {address}"));
                        }
                        std::future::pending().await
                    };
                    let before = left;
                    let ended = tokio::select! {
                        biased;
                        ended = hear(&socket, &channel, &mut left) => ended,
                        never = told => never,
                    };
                    match ended {
                        Ok(()) => {
                            finish(&channel).await;
                            break;
                        }
                        Err(error) if !socket.reconnects() => return Err(error),
                        Err(error) => match error.downcast_ref::<RecvError>() {
                            Some(ended) if ended.reason().retry => {}
                            _ => return Err(error),
                        },
                    }
                    attempt = if left < before { 1 } else { attempt + 1 };
                    tokio::time::sleep(retry(None).delay(attempt)).await;
                }
                Ok(())
            };
            tokio::select! {
                result = heard => result,
                () = told => Ok(()),
            }
        })
        .await
}

/// Waits until the server has taken the channel; returns whether it has. No message of the protocol says so, but a refusal comes
/// at once: two questions on another channel, one after the other, are answered behind it. Any answer will do.
async fn accepted(socket: &Socket, channel: &Channel) -> bool {
    while let Ok(ping) = socket.open(PING).await {
        for _ in 0..2 {
            let _ = ping.send_acked("ping", &()).await;
        }
        match ping.close_reason() {
            // The connection is lost, and the questions with it.
            Some(reason) if reason.retry => tokio::time::sleep(retry(None).delay(1)).await,
            _ => return channel.close_reason().is_none(),
        }
    }
    false
}

/// Prints the channel's events, and the socket's volatile ones, until it ends, or none are left to be printed.
async fn hear(socket: &Socket, channel: &Channel, left: &mut u64) -> anyhow::Result<()> {
    while *left > 0 {
        let message = tokio::select! {
            Some(message) = socket.recv_volatile() => {
                *left -= 1;
                let data: Value = message.data()?;
                let written = output::json(&Line {
                    event: message.event(),
                    data: data.json(),
                    volatile: true,
                    key: message.key(),
                });
                if !output::goes_on(written)? {
                    break;
                }
                continue;
            }
            message = channel.recv() => message?,
        };
        let Some(message) = message else { break };
        let written = if let Some(gap) = message.gap() {
            output::json(&json!({ "gap": { "room": gap.room, "lost": gap.lost } }))
        } else {
            *left -= 1;
            let data: Value = message.data()?;
            output::json(&Line {
                event: message.event(),
                data: data.json(),
                volatile: false,
                key: None,
            })
        };
        if !output::goes_on(written)? {
            break;
        }
        let fault = Fault::new(Fault::NO_HANDLER, "this client only listens");
        let _ = channel.fault(&message, &fault).await;
    }
    Ok(())
}

/// What there is to say of a change.
fn change(before: Option<&SocketState>, state: &SocketState) -> Option<String> {
    match state {
        SocketState::Reconnecting { attempt: 1, .. } => {
            // Who goes away has said so.
            let expected = matches!(before, Some(SocketState::GoingAway(_)));
            (!expected).then(|| "the connection is lost; connecting again".to_owned())
        }
        SocketState::GoingAway(goaway) => {
            let text = output::printable(&goaway.text);
            Some(format!("{text}; connecting again"))
        }
        SocketState::Silent { .. } => Some("the server does not answer".to_owned()),
        SocketState::Connected { .. } if matches!(before, Some(SocketState::Silent { .. })) => {
            Some("the server answers again; nothing is lost".to_owned())
        }
        SocketState::TransportChanged { to, why, .. } => {
            Some(format!("connected over {}: {why}", to.name()))
        }
        SocketState::Connected { resumed: true, .. } => {
            Some("connected again: the session is resumed, nothing is lost".to_owned())
        }
        SocketState::Connected { reason, .. } => {
            let reason = output::printable(reason.as_deref().unwrap_or("unknown"));
            Some(format!(
                "connected again: the session could not be resumed ({reason}), events may be lost"
            ))
        }
        _ => None,
    }
}

/// Ends a channel in good order; whether the peer still cares is its own business.
async fn finish(channel: &Channel) {
    let _ = tokio::time::timeout(std::time::Duration::from_secs(1), channel.finish()).await;
}
