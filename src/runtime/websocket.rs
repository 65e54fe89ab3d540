//! WebSocket (RFC 6455): a protocol's messages, each in a message of its own. tungstenite knows the
//! handshake and the frames and does no input or output here; bytes go the way of all streams.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::rc::Rc;

use bytes::Bytes;
use strowger_contract::Protocol;
use tokio::io::Interest;
use tungstenite::error::{CapacityError, Error};
use tungstenite::handshake::machine::TryParse as _;
use tungstenite::handshake::server::{Request, Response, create_response, write_response};
use tungstenite::http::{HeaderMap, StatusCode};
use tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tungstenite::protocol::frame::{CloseFrame, Frame, FrameHeader};
use tungstenite::protocol::{Message, Role, WebSocketConfig, WebSocketContext};

use super::host::Host;
use super::socket::Stream;
use crate::routing::WebSocketSpec;

/// A handshake's request, at most: browsers send cookies along.
const REQUEST_BYTES_MAX: usize = 16 << 10;

/// What is read into before frames are cut; each connection holds it.
const READ_BUFFER_BYTES: usize = 4 << 10;

/// What the headers of a message's frames may take beside its bytes: a thousand fragments.
const FRAGMENTS_BYTES: usize = 14 << 10;

/// The frames of one connection.
pub(crate) struct WebSocket {
    inner: RefCell<Inner>,
}

struct Inner {
    context: WebSocketContext,
    memory: Memory,
    unfinished: Unfinished,
}

/// What came since the end of the last whole message, as it came: all that another process needs to
/// go on with the connection. Without memory most of the time.
#[derive(Default)]
struct Unfinished {
    bytes: Vec<u8>,
    /// Whole frames of a message that has not ended stand before this.
    looked_at: usize,
    /// Over this it is no message any more, however many frames it is cut into.
    limit: usize,
}

impl Unfinished {
    /// Takes what was read; whether it is within the limit.
    fn follow(&mut self, read: &[u8]) -> bool {
        let mut whole = std::mem::take(&mut self.bytes);
        whole.extend_from_slice(read);
        // Each frame is moved at most once, however many are left out.
        let (mut done, mut kept, mut next) = (0, self.looked_at, self.looked_at);
        while let Some((length, header)) = frame_at(&whole[next..]) {
            let is_control = matches!(header.opcode, OpCode::Control(_));
            if is_control && kept > done {
                // It was answered, and stands within a message: to be left out.
                next += length;
                continue;
            }
            whole.copy_within(next..next + length, kept);
            (kept, next) = (kept + length, next + length);
            if header.is_final || is_control {
                done = kept;
            }
        }
        whole.drain(kept..next);
        self.looked_at = kept - done;
        self.bytes = if done == whole.len() { Vec::new() } else { whole.split_off(done) };
        self.bytes.len() <= self.limit
    }
}

/// The whole frame at the front: its length, and its header.
fn frame_at(bytes: &[u8]) -> Option<(usize, FrameHeader)> {
    let mut cursor = io::Cursor::new(bytes);
    let (header, payload) = FrameHeader::parse(&mut cursor).ok().flatten()?;
    let end = cursor.position().checked_add(payload)?;
    let end = usize::try_from(end).ok().filter(|&end| end <= bytes.len())?;
    Some((end, header))
}

/// What tungstenite takes for its stream.
#[derive(Default)]
struct Memory {
    input: Vec<u8>,
    taken: usize,
    output: Vec<u8>,
}

impl Read for Memory {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = &self.input[self.taken..];
        if rest.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.taken += count;
        Ok(count)
    }
}

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why no more is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The other side closed in order.
    Closed,
    /// It broke a rule; the word is for counters.
    Broken(&'static str),
}

impl WebSocket {
    fn new(spec: &WebSocketSpec) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(Some(spec.message_bytes))
            .max_frame_size(Some(spec.message_bytes));
        let context = WebSocketContext::new(Role::Server, Some(config));
        let limit = spec.message_bytes.saturating_add(FRAGMENTS_BYTES);
        let unfinished = Unfinished { limit, ..Unfinished::default() };
        Self { inner: RefCell::new(Inner { context, memory: Memory::default(), unfinished }) }
    }

    /// As it was in another process, which has read so much of a message.
    pub(crate) fn resumed(spec: &WebSocketSpec, unfinished: &[u8]) -> Self {
        let websocket = Self::new(spec);
        // No message is whole in it, and what is wrong was found out there.
        let _nothing = websocket.receive(unfinished, &mut Vec::new());
        drop(websocket.take_output());
        websocket
    }

    /// What was read of a message that is not whole, for another process.
    pub(crate) fn unfinished(&self) -> Vec<u8> {
        self.inner.borrow().unfinished.bytes.clone()
    }

    /// Takes what was read; whole messages are appended to `messages`.
    pub(crate) fn receive(&self, bytes: &[u8], messages: &mut Vec<Bytes>) -> Result<(), Ended> {
        let Inner { context, memory, unfinished } = &mut *self.inner.borrow_mut();
        let fits = unfinished.follow(bytes);
        memory.input.extend_from_slice(bytes);
        let result = loop {
            match context.read(memory) {
                // All that was read is cut at once, so that it bounds the messages; empty ones are nobody's.
                Ok(Message::Text(text)) if !text.is_empty() => messages.push(text.into()),
                Ok(Message::Binary(bytes)) if !bytes.is_empty() => messages.push(bytes),
                // Answered within: pongs and the closing frame are in the output.
                Ok(_) => {}
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(Error::ConnectionClosed | Error::AlreadyClosed) => break Err(Ended::Closed),
                Err(Error::Capacity(CapacityError::MessageTooLong { .. })) => {
                    break Err(Ended::Broken("ws_message_too_long"));
                }
                Err(Error::Utf8(_)) => break Err(Ended::Broken("ws_not_utf8")),
                Err(_) => break Err(Ended::Broken("ws_frame_wrong")),
            }
        };
        memory.input.drain(..memory.taken);
        memory.taken = 0;
        if memory.input.is_empty() {
            memory.input = Vec::new();
        }
        // Empty fragments without end are within every limit of the reader's.
        if fits { result } else { result.and(Err(Ended::Broken("ws_message_too_long"))) }
    }

    /// Whether a message has begun and is not whole.
    pub(crate) fn has_begun(&self) -> bool {
        !self.inner.borrow().unfinished.bytes.is_empty()
    }

    /// What is to be sent besides messages: pongs, the answer to a closing frame.
    pub(crate) fn take_output(&self) -> Vec<u8> {
        let Inner { context, memory, .. } = &mut *self.inner.borrow_mut();
        // The memory takes all.
        let _written = context.flush(memory);
        std::mem::take(&mut memory.output)
    }
}

/// For the fuzz target: the messages that a connection's bytes hold as they come in these pieces, and
/// how it ended, if it did.
#[doc(hidden)]
#[must_use]
pub fn websocket_messages(
    pieces: &mut dyn Iterator<Item = &[u8]>,
) -> (Vec<Bytes>, Option<&'static str>) {
    let spec = WebSocketSpec { message_bytes: 4_096, ..WebSocketSpec::default() };
    let (websocket, mut messages) = (WebSocket::new(&spec), Vec::new());
    for piece in pieces {
        match websocket.receive(piece, &mut messages) {
            Ok(()) => {}
            Err(Ended::Closed) => return (messages, Some("closed")),
            Err(Ended::Broken(why)) => return (messages, Some(why)),
        }
    }
    (messages, None)
}

/// Appends a message as one frame. Text where it is text (RFC 7118 5: either may be sent, and
/// browsers' stacks expect text).
pub(crate) fn encode(message: &[u8], out: &mut Vec<u8>) {
    let kind = if std::str::from_utf8(message).is_ok() { Data::Text } else { Data::Binary };
    let header =
        FrameHeader { is_final: true, opcode: OpCode::Data(kind), ..FrameHeader::default() };
    // A vector takes all.
    let _written = header.format(message.len() as u64, out);
    out.extend_from_slice(message);
}

/// Asks whether the other side is there (RFC 6455 5.5.2).
pub(crate) fn ping() -> Vec<u8> {
    let mut out = Vec::new();
    // A vector takes all.
    let _written = Frame::ping(Bytes::new()).format(&mut out);
    out
}

/// The closing frame: we go away (RFC 6455 7.4.1).
pub(crate) fn goodbye() -> Vec<u8> {
    let mut out = Vec::new();
    let reason = CloseFrame { code: CloseCode::Away, reason: "".into() };
    // A vector takes all.
    let _written = Frame::close(Some(reason)).format(&mut out);
    out
}

/// Does the handshake on an open stream; `early` is what was read already, and becomes what came
/// behind the request.
///
/// # Errors
/// The word for the counter; the other side was told.
pub(crate) async fn accept<P: Protocol>(
    host: &Rc<Host<P>>,
    stream: &Stream,
    early: &mut Vec<u8>,
) -> Result<WebSocket, &'static str> {
    let spec = host.state().spec.websocket.clone();
    let outcome = tokio::time::timeout(spec.handshake, request(stream, early)).await;
    let request = match outcome {
        Ok(Ok(request)) => request,
        Ok(Err(why)) => {
            refuse(stream, StatusCode::BAD_REQUEST).await;
            return Err(why);
        }
        Err(_) => return Err("ws_handshake_late"),
    };
    let response = match judge(&spec, P::WEBSOCKET_PROTOCOL, &request) {
        Ok(response) => response,
        Err((status, why)) => {
            refuse(stream, status).await;
            return Err(why);
        }
    };
    let mut bytes = Vec::new();
    write_response(&mut bytes, &response).map_err(|_| "ws_handshake_wrong")?;
    match tokio::time::timeout(spec.handshake, write(stream, &bytes)).await {
        Ok(Ok(())) => Ok(WebSocket::new(&spec)),
        Ok(Err(_)) => Err("ws_handshake_wrong"),
        Err(_) => Err("ws_handshake_late"),
    }
}

/// Reads until the request is whole.
async fn request(stream: &Stream, early: &mut Vec<u8>) -> Result<Request, &'static str> {
    let mut looked_at = 0;
    loop {
        // The parser begins anew each time: it is asked only once the end is there.
        let from = looked_at.min(early.len()).saturating_sub(3);
        let end = memchr::memmem::find(&early[from..], b"\r\n\r\n");
        looked_at = early.len();
        if end.is_some() {
            let parsed = Request::try_parse(early).map_err(|_| "ws_handshake_wrong")?;
            let (length, request) = parsed.ok_or("ws_handshake_wrong")?;
            early.drain(..length);
            return Ok(request);
        }
        if early.len() >= REQUEST_BYTES_MAX {
            return Err("ws_handshake_too_long");
        }
        let mut room = [0; 2_048];
        stream.ready(Interest::READABLE).await.map_err(|_| "ws_handshake_wrong")?;
        match stream.try_read(&mut room) {
            Ok(0) => return Err("ws_handshake_wrong"),
            Ok(count) => early.extend_from_slice(&room[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return Err("ws_handshake_wrong"),
        }
    }
}

/// RFC 6455 4.2, RFC 7118 4.1, and the operator's list of origins.
fn judge(
    spec: &WebSocketSpec,
    subprotocol: &'static str,
    request: &Request,
) -> Result<Response, (StatusCode, &'static str)> {
    let headers = request.headers();
    let mut response =
        create_response(request).map_err(|_| (StatusCode::BAD_REQUEST, "ws_handshake_wrong"))?;
    let origin = headers.get("Origin").and_then(|origin| origin.to_str().ok());
    let is_listed =
        |origin: &str| spec.origins.iter().any(|known| known.eq_ignore_ascii_case(origin));
    if !spec.origins.is_empty() && !origin.is_some_and(is_listed) {
        return Err((StatusCode::FORBIDDEN, "ws_origin_refused"));
    }
    if !offers(headers, subprotocol) {
        return Err((StatusCode::BAD_REQUEST, "ws_subprotocol_missing"));
    }
    let name = tungstenite::http::HeaderValue::from_static(subprotocol);
    response.headers_mut().insert("Sec-WebSocket-Protocol", name);
    Ok(response)
}

fn offers(headers: &HeaderMap, subprotocol: &str) -> bool {
    let lists = headers.get_all("Sec-WebSocket-Protocol").iter();
    lists
        .filter_map(|list| list.to_str().ok())
        .flat_map(|list| list.split(','))
        .any(|name| name.trim().eq_ignore_ascii_case(subprotocol))
}

async fn refuse(stream: &Stream, status: StatusCode) {
    let text = format!(
        "HTTP/1.1 {} {}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        status.as_str(),
        status.canonical_reason().unwrap_or("Refused")
    );
    // A courtesy: whoever does not take it at once misses it.
    let _gone = stream.try_write(text.as_bytes());
}

async fn write(stream: &Stream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stream.ready(Interest::WRITABLE).await?;
            }
            Err(error) => return Err(error),
        }
    }
    while stream.has_unsent() {
        stream.ready(Interest::WRITABLE).await?;
        stream.flush()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(message_bytes: usize) -> WebSocket {
        WebSocket::new(&WebSocketSpec { message_bytes, ..WebSocketSpec::default() })
    }

    /// A client's frame: masked (RFC 6455 5.3).
    fn frame(head: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [7, 1, 9, 3];
        let mut bytes = vec![head];
        match payload.len() {
            short @ 0..=125 => bytes.push(0x80 | short as u8),
            long => {
                bytes.push(0x80 | 126);
                bytes.extend_from_slice(&(long as u16).to_be_bytes());
            }
        }
        bytes.extend_from_slice(&mask);
        bytes.extend(payload.iter().enumerate().map(|(at, byte)| byte ^ mask[at % 4]));
        bytes
    }

    #[test]
    fn messages_come_whole_however_they_are_cut() {
        let mut stream = frame(0x01, b"INVITE ");
        stream.extend(frame(0x89, b"are you there"));
        stream.extend(frame(0x80, b"sip:bob"));
        stream.extend(frame(0x82, &[0xff; 300]));
        for step in [1, 2, 7, stream.len()] {
            let socket = socket(1_000);
            let mut messages = Vec::new();
            for part in stream.chunks(step) {
                socket.receive(part, &mut messages).expect("all is in order");
            }
            assert_eq!(messages, [Bytes::from("INVITE sip:bob"), Bytes::from(vec![0xff; 300])]);
            assert_eq!(socket.take_output(), [&[0x8a, 13][..], b"are you there"].concat());
        }
    }

    /// A read full of the smallest frames leaves nothing behind, and is not looked at over and over.
    #[test]
    fn the_smallest_frames_are_all_taken() {
        let socket = socket(1_000);
        let mut messages = Vec::new();
        let empty: Vec<u8> = (0..10_000).flat_map(|_| frame(0x81, b"")).collect();
        socket.receive(&empty, &mut messages).expect("all is in order");
        assert!(messages.is_empty());
        assert!(!socket.has_begun());
        assert_eq!(socket.inner.borrow().memory.input.capacity(), 0, "nothing is kept");
        // Pings within a message: all are answered, and none is kept for another process.
        let mut stream = frame(0x01, b"INVITE ");
        stream.extend((0..10_000).flat_map(|_| frame(0x89, b"")));
        socket.receive(&stream, &mut messages).expect("all is in order");
        assert_eq!(socket.take_output().len(), 20_000);
        assert_eq!(socket.unfinished(), frame(0x01, b"INVITE "));
        stream.truncate(0);
        stream.extend(frame(0x80, b"sip:bob"));
        stream.extend(frame(0x81, b"x"));
        socket.receive(&stream, &mut messages).expect("all is in order");
        assert_eq!(messages, [Bytes::from("INVITE sip:bob"), Bytes::from("x")]);
        assert!(!socket.has_begun());
    }

    #[test]
    fn what_breaks_the_rules_ends_it() {
        let broken = |bytes: &[u8]| socket(1_000).receive(bytes, &mut Vec::new());
        assert_eq!(broken(&frame(0x82, &[1; 1_001])), Err(Ended::Broken("ws_message_too_long")));
        let mut parts = frame(0x02, &[1; 600]);
        parts.extend(frame(0x80, &[1; 600]));
        assert_eq!(broken(&parts), Err(Ended::Broken("ws_message_too_long")), "in fragments");
        assert_eq!(broken(&[0x81, 2, b'h', b'i']), Err(Ended::Broken("ws_frame_wrong")), "no mask");
        assert_eq!(broken(&frame(0x81, &[0xff])), Err(Ended::Broken("ws_not_utf8")));
        assert_eq!(
            broken(&frame(0x80, b"x")),
            Err(Ended::Broken("ws_frame_wrong")),
            "no beginning"
        );
        assert_eq!(
            broken(&frame(0xf1, b"x")),
            Err(Ended::Broken("ws_frame_wrong")),
            "reserved bits"
        );
        let mut huge = vec![0x82, 0x80 | 127];
        huge.extend_from_slice(&u64::MAX.to_be_bytes());
        huge.extend_from_slice(&[0; 4]);
        assert!(matches!(broken(&huge), Err(Ended::Broken(_))));
    }

    /// Wherever it is cut, another process goes on from there and all messages come once.
    #[test]
    fn another_process_goes_on_in_the_middle_of_a_message() {
        let mut stream = frame(0x01, b"INVITE ");
        stream.extend(frame(0x89, b"ping"));
        stream.extend(frame(0x80, b"sip:bob"));
        stream.extend(frame(0x8a, b"pong"));
        stream.extend(frame(0x82, &[0xff; 300]));
        let spec = WebSocketSpec { message_bytes: 1_000, ..WebSocketSpec::default() };
        for step in [1, 3, stream.len()] {
            for cut in 0..=stream.len() {
                let old = WebSocket::new(&spec);
                let mut messages = Vec::new();
                for part in stream[..cut].chunks(step) {
                    old.receive(part, &mut messages).expect("all is in order");
                }
                let mut output = old.take_output();
                let unfinished = old.unfinished();
                assert!(unfinished.len() <= 320, "only what is not whole");
                let new = WebSocket::resumed(&spec, &unfinished);
                new.receive(&stream[cut..], &mut messages).expect("all is in order");
                output.extend(new.take_output());
                assert_eq!(messages, [Bytes::from("INVITE sip:bob"), Bytes::from(vec![0xff; 300])]);
                assert_eq!(output, [&[0x8a, 4][..], b"ping"].concat(), "answered once");
            }
        }
    }

    #[test]
    fn empty_fragments_without_end_are_a_message_that_is_too_long() {
        let socket = socket(1_000);
        let mut result = socket.receive(&frame(0x01, b""), &mut Vec::new());
        let mut count = 0;
        while result.is_ok() && count < 100_000 {
            result = socket.receive(&frame(0x00, b""), &mut Vec::new());
            count += 1;
        }
        assert_eq!(result, Err(Ended::Broken("ws_message_too_long")));
        assert!(count > 1_000, "{count}");
    }

    #[test]
    fn a_closing_frame_is_answered() {
        let socket = socket(1_000);
        let code = 1_000_u16.to_be_bytes();
        let mut messages = Vec::new();
        let _ended = socket.receive(&frame(0x88, &code), &mut messages);
        assert_eq!(socket.take_output(), [0x88, 2, code[0], code[1]]);
    }

    #[test]
    fn what_we_send_is_text_where_it_can_be() {
        let mut out = Vec::new();
        encode(b"SIP/2.0 200 OK", &mut out);
        assert_eq!(out[..2], [0x81, 14]);
        out.clear();
        encode(&[0xff; 70_000], &mut out);
        assert_eq!((out[0], out[1], out.len()), (0x82, 127, 70_010));
    }
}
