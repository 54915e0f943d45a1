//! A file as the body of a request, read as it is sent.

use std::fs::File;
use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, SizeHint};

use super::progress::Bar;

const CHUNK: u64 = 128 << 10;

/// A file of `left` more bytes.
pub(super) struct Upload {
    file: File,
    left: u64,
    size: u64,
    bar: Arc<Bar>,
}

impl Upload {
    pub(super) fn new(file: File, size: u64, bar: Arc<Bar>) -> Self {
        Self { file, left: size, size, bar }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        if this.left == 0 {
            return Poll::Ready(None);
        }
        let mut chunk = vec![];
        // A local file answers at once, or about as fast as another thread would.
        let read = (&this.file).take(this.left.min(CHUNK)).read_to_end(&mut chunk);
        Poll::Ready(Some(match read {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                this.left = this.left.saturating_sub(count as u64);
                this.bar.set(this.size.saturating_sub(this.left));
                Ok(Frame::data(chunk.into()))
            }
            Err(error) => Err(error),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
