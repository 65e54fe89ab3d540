//! One direction of a relay: bytes pass from one stream to another, copied or through a pipe.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use tokio::io::Interest;

use super::descriptors::is_one_of_the_last;
use super::handover::SavedWay;
use super::socket::Stream;

/// Reads from one side before the other has its turn, and then other flows theirs.
const READS_PER_TURN: usize = 4;

/// A pipe's room, and so what one splice(2) moves: the kernel's default (pipe(7)).
const PIPE_BYTES: usize = 64 << 10;

/// A splice that brings less is not in bulk any more.
const BULK_BYTES: usize = 16 << 10;

/// Empty pipes that are kept, each of two descriptors.
const PIPES_KEPT: usize = 16;

/// A pipe that bytes pass through without a copy in this process.
pub(crate) struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    held: usize,
}

/// Empty pipes: who has moved what there was gives its pipe back.
#[derive(Default)]
pub(crate) struct Pipes(Vec<Pipe>);

impl Pipes {
    fn take(&mut self) -> io::Result<Pipe> {
        if let Some(pipe) = self.0.pop() {
            return Ok(pipe);
        }
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        if is_one_of_the_last(writer.as_fd()) {
            // Those are for what cannot do without.
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        Ok(Pipe { reader, writer, held: 0 })
    }

    fn give_back(&mut self, pipe: Pipe) {
        if pipe.held == 0 && self.0.len() < PIPES_KEPT {
            self.0.push(pipe);
        }
    }
}

impl Pipe {
    /// What is in it, for whom it cannot be handed to. It is empty then.
    fn drain(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.held];
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::read(&self.reader, &mut bytes[done..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.held = 0;
        Ok(bytes)
    }
}

/// One direction.
#[derive(Default)]
pub(super) struct Direction {
    /// Read and not yet taken by the other side.
    pub(super) rest: Vec<u8>,
    pub(super) written: usize,
    /// The same, in the kernel; after `rest`.
    pipe: Option<Box<Pipe>>,
    /// The last read was as long as it can be: more will follow.
    bulk: bool,
    /// The reading side has ended.
    pub(super) ended: bool,
    /// The end was passed on.
    pub(super) shut: bool,
}

impl Direction {
    /// One that nothing passes through any more.
    pub(super) fn over() -> Self {
        Self { ended: true, shut: true, ..Self::default() }
    }

    /// With something that was read before.
    pub(super) fn holding(rest: Vec<u8>) -> Self {
        Self { rest, ..Self::default() }
    }

    /// As it was in another process.
    pub(super) fn restored(saved: SavedWay) -> Self {
        Self { rest: saved.rest, ended: saved.ended, shut: saved.shut, ..Self::default() }
    }

    /// For another process. A pipe's content goes over as bytes, and stays so if the flow stays.
    pub(super) fn saved(&mut self) -> io::Result<SavedWay> {
        if let Some(mut pipe) = self.pipe.take() {
            self.rest.extend_from_slice(&pipe.drain()?);
        }
        let rest = self.rest[self.written..].to_vec();
        Ok(SavedWay { rest, ended: self.ended, shut: self.shut })
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.written < self.rest.len() || self.pipe.as_ref().is_some_and(|pipe| pipe.held > 0)
    }
}

/// What a side is waited for: `from` it, and `to` it.
pub(super) fn interest(from: &Direction, to: &Direction, stream: &Stream) -> Option<Interest> {
    let reads = !from.ended && !from.is_blocked();
    let writes = to.is_blocked() || stream.has_unsent();
    match (reads, writes) {
        (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
        (true, false) => Some(Interest::READABLE),
        (false, true) => Some(Interest::WRITABLE),
        (false, false) => None,
    }
}

/// Which side ended a direction before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// The one that is read from: the flow is over.
    Reader,
    /// The one that is written to: it takes no more, and may have said something.
    Writer,
}

/// Moves bytes one way until one side blocks or its turn is over; how many the writer took, and whether
/// there may be more to move at once. With `pipes`, what comes in bulk is not copied.
pub(super) fn pass(
    from: &Stream,
    to: &Stream,
    way: &mut Direction,
    scratch: &mut [u8],
    mut pipes: Option<&mut Pipes>,
) -> Result<(u64, bool), Broken> {
    let to_writer = |_| Broken::Writer;
    let mut moved = 0;
    let mut more = true;
    for _ in 0..READS_PER_TURN {
        if way.is_blocked() {
            moved += write_rest(to, way).map_err(to_writer)?;
            if way.is_blocked() {
                return Ok((moved, false));
            }
        }
        if way.ended {
            break;
        }
        let count = match pipes.as_deref_mut().filter(|_| way.bulk) {
            Some(pipes) => read_to_pipe(from, way, pipes),
            None => None,
        };
        let result = match count {
            Some(result) => result,
            None => match from.try_read(scratch) {
                Ok(count) => {
                    way.bulk = count == scratch.len();
                    let taken = write(to, &scratch[..count]).map_err(to_writer)?;
                    moved += taken as u64;
                    way.rest.extend_from_slice(&scratch[taken..count]);
                    Ok(count)
                }
                failed => failed,
            },
        };
        match result {
            Ok(0) => way.ended = true,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                more = false;
                break;
            }
            Err(_) => return Err(Broken::Reader),
        }
    }
    // What the last read brought may be in the pipe.
    if way.is_blocked() {
        moved += write_rest(to, way).map_err(to_writer)?;
    }
    if let Some(pipes) = pipes
        && let Some(pipe) = way.pipe.take_if(|pipe| pipe.held == 0)
    {
        pipes.give_back(*pipe);
    }
    if way.ended && !way.is_blocked() && !way.shut {
        to.flush().map_err(to_writer)?;
        if to.has_unsent() {
            return Ok((moved, false));
        }
        way.shut = true;
        to.shutdown_write().map_err(to_writer)?;
    }
    Ok((moved, more && !way.ended && !way.is_blocked()))
}

/// Writes what was read before; how much was taken.
fn write_rest(to: &Stream, way: &mut Direction) -> io::Result<u64> {
    let mut moved = 0;
    if way.written < way.rest.len() {
        let count = write(to, &way.rest[way.written..])?;
        way.written += count;
        moved += count as u64;
        if way.written < way.rest.len() {
            return Ok(moved);
        }
        (way.rest, way.written) = (Vec::new(), 0);
    }
    let Some(pipe) = way.pipe.as_deref_mut() else { return Ok(moved) };
    while pipe.held > 0 {
        let held = pipe.held;
        let call = |to: BorrowedFd<'_>| Ok(splice(&pipe.reader, None, to, None, held, FLAGS)?);
        let Some(result) = to.try_io(Interest::WRITABLE, call) else {
            // It has become something else than a socket: the bytes go as others do.
            way.rest = pipe.drain()?;
            break;
        };
        match result {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                pipe.held = held.saturating_sub(count);
                moved += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(moved)
}

const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// Moves what is there into a pipe; `None` if that cannot be, and the bytes must be copied.
fn read_to_pipe(
    from: &Stream,
    way: &mut Direction,
    pipes: &mut Pipes,
) -> Option<io::Result<usize>> {
    if way.pipe.is_none() {
        // Without a descriptor left there is the other way.
        way.pipe = Some(Box::new(pipes.take().ok()?));
    }
    let pipe = way.pipe.as_deref_mut()?;
    let call =
        |from: BorrowedFd<'_>| Ok(splice(from, None, &pipe.writer, None, PIPE_BYTES, FLAGS)?);
    let result = from.try_io(Interest::READABLE, call)?;
    if let Ok(count) = result {
        pipe.held += count;
        way.bulk = count >= BULK_BYTES;
    }
    Some(result)
}

/// Writes what the kernel takes; 0 if nothing.
fn write(to: &Stream, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while written < bytes.len() {
        match to.try_write(&bytes[written..]) {
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}
