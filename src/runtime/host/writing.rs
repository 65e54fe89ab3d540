//! How streams are written: when all that was ready is read.

use std::rc::Rc;

use strowger_contract::Protocol;

use super::{Host, State, first_message};
use crate::runtime::stream::Connection;

impl<P: Protocol> Host<P> {
    /// Writes a connection's queue outside of a batch.
    pub(crate) fn write(&self, connection: &Rc<Connection>) {
        let mut state = self.cell.borrow_mut();
        self.write_in(&mut state, connection);
    }

    /// Writes what streams got, each in one call, behind all tasks that were ready before: messages that
    /// came over several connections leave together, and those who get them wake up once.
    pub(crate) async fn write_later(self: Rc<Self>) {
        loop {
            self.written.notified().await;
            self.write_dirty(&mut self.cell.borrow_mut());
        }
    }

    pub(super) fn write_dirty(&self, state: &mut State<P>) {
        state.write_is_due = false;
        let mut dirty = std::mem::take(&mut state.dirty);
        for connection in dirty.drain(..) {
            self.write_in(state, &connection);
        }
        state.dirty = dirty;
    }

    pub(super) fn write_in(&self, state: &mut State<P>, connection: &Rc<Connection>) {
        let progress = connection.write(first_message::<P>);
        if progress.written > 0 {
            state.metrics.sent(0, progress.written as u64);
        }
        if let Some((backend, _)) = connection.endpoint.as_link() {
            let limit = self.queued_bytes_max.get();
            let congested = connection.congested.get();
            if !congested && progress.queued > limit || congested && progress.queued < limit / 2 {
                connection.congested.set(!congested);
                self.shared.core.set_congested(backend, !congested);
            }
        }
    }
}
