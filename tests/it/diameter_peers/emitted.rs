//! Each kind of message that the edge emits.
