//! HTTP/1.1 on the control socket, with bounds on all that a client can send or leave open.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::routes::{self, Answer, Fault, Route};
use crate::sandbox;
use crate::vm::control::{self, Control};

/// Bytes of a request's body; Firecracker's limit.
pub(super) const BODY_BYTES_MAX: usize = 51_200;
/// Bytes of a body that is too large and read all the same.
const DISCARDED_BYTES_MAX: usize = 4 << 20;
/// Bytes of a request's line and headers, and their number.
const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;
/// Clients at once; further ones wait to be accepted.
const CLIENTS_MAX: usize = 128;
/// How long the head of a request, or its body, may take to come. A connection may be idle as long.
const CLIENT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection may last. A client that does not read its answers is rid of then.
const CONNECTION_LIMIT: Duration = Duration::from_secs(600);
/// How long to wait when the process has no descriptor for another client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves clients until the process ends.
pub(super) fn run(listener: UnixListener, control: Control) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    sandbox::enter(sandbox::Kind::Api).map_err(io::Error::other)?;
    runtime.block_on(accept(listener, control))
}

async fn accept(listener: UnixListener, control: Control) -> io::Result<()> {
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        match listener.accept().await {
            Ok((stream, _)) => {
                let control = control.clone();
                tokio::spawn(async move {
                    connection(stream, control).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "cannot accept a client of the control socket");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, control: Control) {
    let service = service_fn(|request| {
        let control = control.clone();
        async move { Ok::<_, Infallible>(response(respond(request, &control).await)) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(CLIENT_PATIENCE)
            .max_buf_size(HEAD_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .half_close(true)
            .serve_connection(TokioIo::new(stream), service)
    );
    let result = match timeout(CONNECTION_LIMIT, connection.as_mut()).await {
        Ok(result) => result,
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            timeout(CLIENT_PATIENCE, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = result {
        tracing::debug!("a client of the control socket: {}", crate::error_chain(&error));
    }
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if answer.status != routes::NO_CONTENT {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    response
}

async fn respond(request: Request<Incoming>, control: &Control) -> Answer {
    try_respond(request, control).await.unwrap_or_else(|fault| fault.answer())
}

async fn try_respond(request: Request<Incoming>, control: &Control) -> Result<Answer, Fault> {
    let (head, body) = request.into_parts();
    let body = read_body(body).await?;
    tracing::debug!(method = %head.method, path = head.uri.path(), "a request to the control socket");
    match routes::route(head.method.as_str(), head.uri.path(), &body)? {
        Route::Answer(answer) => Ok(answer),
        Route::Command(command, shape) => {
            let (sender, receiver) = oneshot::channel();
            // A client that has gone does not hear the answer.
            control.send(command, Box::new(move |result| drop(sender.send(result))));
            let result = receiver.await.unwrap_or(Err(control::Error::Ended));
            routes::answer(result?, shape)
        }
    }
}

async fn read_body(body: Incoming) -> Result<Vec<u8>, Fault> {
    if body.size_hint().lower() > DISCARDED_BYTES_MAX as u64 {
        return Err(Fault::too_large(BODY_BYTES_MAX));
    }
    timeout(CLIENT_PATIENCE, collect(body)).await.unwrap_or_else(|_| Err(Fault::timed_out()))
}

/// Reads a body. One that is somewhat too large is read to its end, or a client that is still writing would not see why
/// it is refused.
async fn collect(mut body: Incoming) -> Result<Vec<u8>, Fault> {
    let (mut bytes, mut len) = (Vec::new(), 0usize);
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|error| Fault::bad_request(format!("the request's body cannot be read: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        len = len.saturating_add(data.len());
        if len <= BODY_BYTES_MAX {
            bytes.extend_from_slice(&data);
        } else if len > DISCARDED_BYTES_MAX {
            break;
        }
    }
    if len <= BODY_BYTES_MAX { Ok(bytes) } else { Err(Fault::too_large(BODY_BYTES_MAX)) }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
