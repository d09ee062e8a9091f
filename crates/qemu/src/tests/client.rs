//! The QMP client against a peer that does not behave.

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream};

use super::*;
use crate::qmp::{CLOSED_EVENT, LINE_BYTES_MAX, QmpError};

const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

/// A client, and the other ends of its streams: what it says, what it hears.
async fn fake() -> (Qmp, BufReader<DuplexStream>, DuplexStream) {
    let (said, writer) = tokio::io::duplex(1 << 16);
    let (mut heard, reader) = tokio::io::duplex(1 << 16);
    let mut said = BufReader::new(said);
    let serve = async {
        heard.write_all(GREETING.as_bytes()).await.expect("it listens");
        let first = next(&mut said).await;
        assert_eq!(first["execute"], "qmp_capabilities");
        answer(&mut heard, &json!({ "return": {}, "id": first["id"] })).await;
    };
    let (qmp, ()) = tokio::join!(Qmp::over(reader, writer, None, START_MAX), serve);
    (qmp.expect("a connection"), said, heard)
}

async fn next(said: &mut BufReader<DuplexStream>) -> Value {
    let mut line = String::new();
    said.read_line(&mut line).await.expect("a line");
    serde_json::from_str(&line).expect("a command")
}

async fn answer(heard: &mut DuplexStream, value: &Value) {
    heard.write_all(format!("{value}\n").as_bytes()).await.expect("it listens");
}

/// Scenario: answers come in another order than the questions, with events and
/// nonsense in between.
#[tokio::test]
async fn answers_find_their_questions() {
    let (qmp, mut said, mut heard) = fake().await;
    let mut events = qmp.events();
    let serve = async {
        let (first, second) = (next(&mut said).await, next(&mut said).await);
        let time = json!({ "seconds": 7, "microseconds": 9 });
        answer(&mut heard, &json!({ "event": "STOP", "timestamp": time })).await;
        answer(&mut heard, &json!({ "return": "for nobody", "id": 99 })).await;
        answer(&mut heard, &json!({ "return": "for nobody" })).await;
        let error = json!({ "class": "GenericError", "desc": "no" });
        answer(&mut heard, &json!({ "error": error, "id": second["id"] })).await;
        answer(&mut heard, &json!({ "return": first["execute"], "id": first["id"] })).await;
    };
    let (first, second, ()) =
        tokio::join!(qmp.execute("one", json!({})), qmp.execute("two", json!({})), serve);
    assert_eq!(first.expect("an answer"), "one");
    match second {
        Err(QmpError::Command { command, class, desc }) => {
            assert_eq!((&*command, &*class, &*desc), ("two", "GenericError", "no"));
        }
        other => panic!("{other:?}"),
    }
    let event = events.recv().await.expect("an event");
    assert_eq!((&*event.name, event.at_us), ("STOP", 7_000_009));
}

/// Scenario: an asker gives up; the next command is whole and gets its answer.
#[tokio::test]
async fn one_who_gives_up_leaves_no_half_a_line() {
    let (qmp, mut said, mut heard) = fake().await;
    // More than the pipe holds, so that it is given up in the middle of writing.
    let long = "x".repeat(1 << 18);
    let given_up = tokio::time::timeout(
        Duration::from_millis(50),
        qmp.execute("long", json!({ "text": long })),
    );
    given_up.await.expect_err("nobody answers");
    let serve = async {
        assert_eq!(next(&mut said).await["arguments"]["text"], *long);
        let second = next(&mut said).await;
        answer(&mut heard, &json!({ "return": 2, "id": second["id"] })).await;
    };
    let (second, ()) = tokio::join!(qmp.execute("short", json!({})), serve);
    assert_eq!(second.expect("an answer"), 2);
}

#[tokio::test]
async fn the_end_of_the_connection_ends_every_wait() {
    let (qmp, mut said, heard) = fake().await;
    let mut events = qmp.events();
    let end = async {
        next(&mut said).await;
        drop(heard);
    };
    let (waiting, ()) = tokio::join!(qmp.execute("one", json!({})), end);
    assert!(matches!(waiting, Err(QmpError::Closed)), "{waiting:?}");
    qmp.wait_closed().await;
    assert!(qmp.is_closed());
    assert_eq!(events.recv().await.expect("the last event").name, CLOSED_EVENT);
    assert!(matches!(qmp.execute("two", json!({})).await, Err(QmpError::Closed)));
}

/// Scenario: a peer sends a line without an end, or what is not JSON.
#[tokio::test]
async fn what_is_not_qmp_ends_the_connection() {
    for hostile in [vec![b' '; 1 << 20], b"not json\n".to_vec()] {
        let (qmp, _said, mut heard) = fake().await;
        let sent = async {
            let mut left = LINE_BYTES_MAX + 1;
            while left > 0 && heard.write_all(&hostile).await.is_ok() {
                left = left.saturating_sub(hostile.len().try_into().expect("it fits"));
            }
            heard
        };
        let (_heard, ()) = tokio::join!(sent, qmp.wait_closed());
        assert!(matches!(qmp.execute("one", json!({})).await, Err(QmpError::Closed)));
    }
}

#[tokio::test]
async fn another_greeting_is_refused() {
    let folder = folder();
    let path = folder.path().join("socket");
    let absent = Qmp::connect(&path, Duration::ZERO).await;
    assert!(matches!(absent, Err(QmpError::Connect { .. })), "{absent:?}");
    let listener = tokio::net::UnixListener::bind(&path).expect("a socket");
    let serve = async {
        let (mut stream, _) = listener.accept().await.expect("a client");
        stream.write_all(b"{\"hello\": 1}\n").await.expect("it listens");
    };
    let (refused, ()) = tokio::join!(Qmp::connect(&path, START_MAX), serve);
    assert!(matches!(refused, Err(QmpError::Protocol { .. })), "{refused:?}");
}

/// Goal: an answer of another shape is an error, whatever it is.
#[tokio::test]
async fn an_answer_of_another_shape_is_an_error() {
    let (qmp, mut said, mut heard) = fake().await;
    for shape in [json!("running"), json!(7), json!([]), json!({ "status": {} })] {
        for asks_migration in [false, true] {
            let serve = async {
                let id = next(&mut said).await["id"].take();
                answer(&mut heard, &json!({ "return": shape, "id": id })).await;
            };
            let ask = async {
                if asks_migration {
                    crate::migrate::status(&qmp).await.map(drop)
                } else {
                    crate::power::query_status(&qmp).await.map(drop)
                }
            };
            let (asked, ()) = tokio::join!(ask, serve);
            assert!(matches!(asked, Err(QmpError::Protocol { .. })), "{shape}: {asked:?}");
        }
    }
}
