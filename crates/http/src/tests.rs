//! The client against a server of a few lines, over a pipe in memory.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;

const LIMITS: Limits = Limits { wait: Duration::from_secs(60), answer_bytes: 64 };

fn over(connection: DuplexStream) -> Client {
    Client::over("test", connection)
}

/// Reads the head of a request and sends an answer.
async fn answer(server: &mut DuplexStream, answer: &[u8]) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(server.read_u8().await.unwrap());
    }
    server.write_all(answer).await.unwrap();
    String::from_utf8(head).unwrap()
}

/// Goal: two calls in a row use one connection, and the answer may come in chunks.
#[tokio::test]
async fn a_connection_is_kept() {
    let (ours, mut server) = tokio::io::duplex(4096);
    let client = over(ours);
    let serving = tokio::spawn(async move {
        let head = answer(&mut server, b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n7").await;
        assert!(head.starts_with("GET /v1/x HTTP/1.1\r\n"), "{head}");
        let chunked =
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n4\r\n1\r\n2\r\n0\r\n\r\n";
        answer(&mut server, chunked).await;
        server
    });
    for expected in [7, 42] {
        let got: u32 = client.call(Method::GET, "/v1/x", Bytes::new(), LIMITS).await.unwrap();
        assert_eq!(got, expected);
    }
    drop(serving.await.unwrap());
    // The one connection is gone, and the client opens no other.
    let none = client.call::<u32>(Method::GET, "/v1/x", Bytes::new(), LIMITS).await;
    assert!(matches!(none, Err(Error::Connect(_))), "{none:?}");
}

/// Goal: a refusal, a status without a reason, a large and a cut answer are told apart.
#[tokio::test]
async fn failures_are_told_apart() {
    let refused = br#"{"code":"conflict","message":"busy"}"#;
    let head = format!("HTTP/1.1 409 Conflict\r\ncontent-length: {}\r\n\r\n", refused.len());
    let refused = [head.as_bytes(), refused].concat();
    let large = b"HTTP/1.1 200 OK\r\ncontent-length: 65\r\n\r\n".iter().copied();
    let large: Vec<u8> = large.chain(std::iter::repeat_n(b'1', 65)).collect();
    for (bytes, expected) in [
        (&refused[..], "busy"),
        (b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n", "502"),
        (&large, "broke off"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n1", "broke off"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx", "not understood"),
        (b"", "broke"),
    ] {
        let (ours, mut server) = tokio::io::duplex(4096);
        let client = over(ours);
        let bytes = bytes.to_vec();
        let serving = tokio::spawn(async move {
            answer(&mut server, &bytes).await;
        });
        let error =
            client.call::<u32>(Method::POST, "/v1/x", Bytes::new(), LIMITS).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error:?}");
        serving.await.unwrap();
    }
}
