//! HTTP/1.1 on the control socket, with bounds on all that a client can send or leave open.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::routes::{self, Answer, Fault, Route, Shape};
use super::setup::Setup;
use crate::mmds::Store;
use crate::vm::control::{self, Command, Control, Load};
use crate::{metrics, sandbox};

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

/// What the server's connections share.
pub(super) struct Shared {
    /// What `GET /` calls the VM.
    pub(super) id: String,
    pub(super) phase: Mutex<Phase>,
    /// What the metadata service tells, before and after the start.
    pub(super) metadata: Arc<Store>,
}

/// What requests are about.
pub(super) enum Phase {
    /// A VM that is being put together.
    Setup(Box<Setup>, UnboundedSender<Start>),
    /// One that has started.
    Running(Control),
}

/// A start that was asked for, and who waits for what comes of it.
pub(super) struct Start {
    pub(super) setup: Setup,
    pub(super) load: Option<Box<Load>>,
    pub(super) answer: oneshot::Sender<Result<(), String>>,
}

/// What serves clients.
pub(super) fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()
}

/// Has clients accepted whenever the runtime runs.
pub(super) fn listen(runtime: &Runtime, listener: UnixListener, shared: Arc<Shared>) -> io::Result<()> {
    let _entered = runtime.enter();
    let listener = tokio::net::UnixListener::from_std(listener)?;
    runtime.spawn(accept(listener, shared));
    Ok(())
}

/// Serves clients until the process ends.
pub(super) fn run(runtime: &Runtime) -> io::Result<()> {
    sandbox::enter(sandbox::Kind::Api).map_err(io::Error::other)?;
    runtime.block_on(std::future::pending())
}

async fn accept(listener: tokio::net::UnixListener, shared: Arc<Shared>) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    connection(stream, shared).await;
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

async fn connection(stream: UnixStream, shared: Arc<Shared>) {
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(response(respond(request, &shared).await)) }
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
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(answer.content_type));
    }
    response
}

async fn respond(request: Request<Incoming>, shared: &Shared) -> Answer {
    let method = metrics::API_METHODS.iter().position(|method| *method == request.method().as_str());
    let method = method.unwrap_or(metrics::API_METHODS.len() - 1);
    let count = |counters: &[metrics::Counter]| {
        if let Some(counter) = counters.get(method) {
            counter.add(1);
        }
    };
    count(&metrics::API_REQUESTS);
    try_respond(request, shared).await.unwrap_or_else(|fault| {
        count(&metrics::API_FAULTS);
        fault.answer()
    })
}

/// What is left to do for a request when the phase is known.
enum Next {
    Send(Control, Command, Shape),
    Start(oneshot::Receiver<Result<(), String>>),
}

/// Asks for a start.
fn start(starts: &UnboundedSender<Start>, setup: &Setup, load: Option<Box<Load>>) -> Result<Next, Fault> {
    let (answer, receiver) = oneshot::channel();
    let start = Start { setup: setup.clone(), load, answer };
    starts.send(start).map_err(|_| Fault::from(control::Error::Ended))?;
    Ok(Next::Start(receiver))
}

async fn try_respond(request: Request<Incoming>, shared: &Shared) -> Result<Answer, Fault> {
    let (head, body) = request.into_parts();
    let body = read_body(body).await?;
    tracing::debug!(method = %head.method, path = head.uri.path(), "a request to the control socket");
    let route = routes::route(head.method.as_str(), head.uri.path(), &body)?;
    let next = {
        let mut phase = shared.phase.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *phase, route) {
            (_, Route::Answer(answer)) => return Ok(answer),
            (_, Route::Metadata(request)) => return request.carry_out(&shared.metadata),
            (Phase::Running(control), Route::Command(command, shape)) => {
                Next::Send(control.clone(), command, shape)
            }
            (Phase::Running(_), Route::Part(_) | Route::Start | Route::Load(_)) => {
                return Err(routes::after_start());
            }
            (Phase::Setup(setup, _), Route::Command(command, shape)) => {
                return Answer::of_setup(&command, shape, &setup.config, &shared.id);
            }
            (Phase::Setup(setup, _), Route::Part(part)) => {
                return setup.add(part).map(|()| Answer::nothing()).map_err(Fault::bad_request);
            }
            (Phase::Setup(setup, starts), Route::Start) => {
                if setup.config.kernel.is_none() {
                    return Err(Fault::bad_request("Cannot start microvm without kernel configuration."));
                }
                setup.check().map_err(Fault::bad_request)?;
                start(starts, setup, None)?
            }
            (Phase::Setup(setup, starts), Route::Load(load)) => {
                if setup.has_parts {
                    return Err(Fault::bad_request(
                        "Loading a microVM snapshot not allowed after configuring boot-specific resources.",
                    ));
                }
                start(starts, setup, Some(load))?
            }
        }
    };
    match next {
        Next::Send(control, command, shape) => {
            let (sender, receiver) = oneshot::channel();
            // A client that has gone does not hear the answer.
            control.send(command, Box::new(move |result| drop(sender.send(result))));
            let result = receiver.await.unwrap_or(Err(control::Error::Ended));
            routes::answer(result?, shape, &shared.id)
        }
        Next::Start(receiver) => {
            let result = receiver.await.unwrap_or_else(|_| Err(control::Error::Ended.to_string()));
            result.map(|()| Answer::nothing()).map_err(Fault::bad_request)
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
