//! Bare forwarders: what a proxy on this machine could do if it looked at nothing. They are what
//! the side-by-side runs call the floor.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{Timespec, epoll};
use slab::Slab;

use super::{Address, Scheme};
use crate::runtime::sys::{RecvBatch, SendBatch};

const BATCH: usize = 64;

/// What one read takes: as much as the edge's own scratch.
const READ_BYTES: usize = 64 << 10;

/// A bare forwarder.
#[derive(clap::Args, Clone, Debug)]
pub struct FloorOptions {
    /// Where clients come.
    #[arg(long, value_name = "ADDRESS")]
    listen: Address,
    /// Where everything goes. Over UDP what comes from there goes to the last client.
    #[arg(long, value_name = "ADDRESS")]
    to: Address,
    /// How long.
    #[arg(long = "for", default_value = "1h", value_name = "TIME", value_parser = super::duration)]
    lasting: Duration,
}

/// Runs it.
pub(crate) fn run(options: &FloorOptions) -> Result<()> {
    let end = Instant::now() + options.lasting;
    match (options.listen.scheme, options.to.scheme) {
        (Scheme::Udp, Scheme::Udp) => datagrams(options.listen.address, options.to.address, end),
        (Scheme::Tcp, Scheme::Tcp) => streams(options.listen.address, options.to.address, end),
        _ => bail!("--listen and --to must both be udp:// or both tcp://"),
    }
}

fn datagrams(listen: SocketAddr, to: SocketAddr, end: Instant) -> Result<()> {
    let socket = UdpSocket::bind(listen).with_context(|| format!("cannot bind {listen}"))?;
    let options = socket2::SockRef::from(&socket);
    options.set_recv_buffer_size(8 << 20)?;
    options.set_send_buffer_size(8 << 20)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let (mut receive, mut send) = (RecvBatch::new(BATCH), SendBatch::new(BATCH));
    let mut client = None;
    while Instant::now() < end {
        let count = match receive.receive(socket.as_fd()) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Blocks until there is something, or the time-out.
                let _nothing = socket.peek_from(&mut [0; 1]);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        for index in 0..count {
            if let Some((remote, _)) = receive.datagram(index)
                && remote != to
            {
                client = Some(remote);
            }
        }
        let mut done = 0;
        while done < count {
            let mut rest = (done..count).filter_map(|index| {
                let (remote, bytes) = receive.datagram(index)?;
                Some((if remote == to { client? } else { to }, bytes))
            });
            match send.send(socket.as_fd(), &mut rest) {
                Ok(0) => break,
                Ok(sent) => done += sent,
                Err(_) => done += 1,
            }
        }
    }
    Ok(())
}

struct Side {
    socket: TcpStream,
    other: usize,
    /// What the kernel did not yet take for this side; while there is any, the other side is not
    /// read.
    waiting: Vec<u8>,
}

const LISTENER: u64 = u64::MAX;

fn streams(listen: SocketAddr, to: SocketAddr, end: Instant) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("cannot bind {listen}"))?;
    listener.set_nonblocking(true)?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let read = epoll::EventFlags::IN;
    epoll::add(&poll, &listener, epoll::EventData::new_u64(LISTENER), read)?;
    let mut sides: Slab<Side> = Slab::new();
    let mut events = Vec::with_capacity(256);
    let mut scratch = vec![0; READ_BYTES];
    while Instant::now() < end {
        events.clear();
        let timeout = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        match epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &events {
            let key = event.data.u64();
            if key == LISTENER {
                accept(&listener, to, &poll, &mut sides)?;
            } else if !forward(key as usize, event.flags, &poll, &mut sides, &mut scratch) {
                drop_pair(key as usize, &mut sides);
            }
        }
    }
    Ok(())
}

fn accept(
    listener: &TcpListener,
    to: SocketAddr,
    poll: &OwnedFd,
    sides: &mut Slab<Side>,
) -> Result<()> {
    while let Ok((client, _)) = listener.accept() {
        // On loopback a connect is answered at once or refused at once.
        let Ok(server) = TcpStream::connect(to) else { continue };
        let first = sides.vacant_key();
        for (place, socket) in [client, server].into_iter().enumerate() {
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            let entry = sides.vacant_entry();
            let key = entry.key();
            epoll::add(
                poll,
                &socket,
                epoll::EventData::new_u64(key as u64),
                epoll::EventFlags::IN,
            )?;
            entry.insert(Side { socket, other: first, waiting: Vec::new() });
            if place == 1 {
                sides[first].other = key;
            }
        }
    }
    Ok(())
}

/// Moves what there is; whether the pair lives on. The end of one side ends both.
fn forward(
    key: usize,
    flags: epoll::EventFlags,
    poll: &OwnedFd,
    sides: &mut Slab<Side>,
    scratch: &mut [u8],
) -> bool {
    let Some(side) = sides.get_mut(key) else { return true };
    if flags.contains(epoll::EventFlags::OUT) {
        let waiting = std::mem::take(&mut side.waiting);
        let goes_on = write(key, &waiting, poll, sides);
        if sides.get(key).is_some_and(|side| side.waiting.is_empty()) {
            arm_both(poll, sides, key);
        }
        if !goes_on {
            return false;
        }
    }
    let Some(side) = sides.get_mut(key) else { return true };
    if !flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
        return true;
    }
    let other = side.other;
    match side.socket.read(scratch) {
        Ok(0) => false,
        Ok(count) => write(other, &scratch[..count], poll, sides),
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

fn write(key: usize, bytes: &[u8], poll: &OwnedFd, sides: &mut Slab<Side>) -> bool {
    let Some(side) = sides.get_mut(key) else { return false };
    let mut done = 0;
    while done < bytes.len() {
        match side.socket.write(&bytes[done..]) {
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(_) => return false,
        }
    }
    if done < bytes.len() {
        side.waiting.extend_from_slice(&bytes[done..]);
        arm_both(poll, sides, key);
    }
    true
}

/// A side with something waiting wants room, and its other side is not read.
fn arm_both(poll: &OwnedFd, sides: &Slab<Side>, key: usize) {
    let waits = |key: usize| sides.get(key).is_some_and(|side| !side.waiting.is_empty());
    let Some(other) = sides.get(key).map(|side| side.other) else { return };
    for (key, other) in [(key, other), (other, key)] {
        let Some(side) = sides.get(key) else { continue };
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN, !waits(other));
        flags.set(epoll::EventFlags::OUT, waits(key));
        let data = epoll::EventData::new_u64(key as u64);
        // The descriptor is ours and open.
        let _known = epoll::modify(poll, &side.socket, data, flags);
    }
}

fn drop_pair(key: usize, sides: &mut Slab<Side>) {
    if let Some(side) = sides.try_remove(key) {
        sides.try_remove(side.other);
    }
}
