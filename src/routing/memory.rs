//! Memory of the tables: a look-up goes to a random place in it, and how the system maps it decides
//! what that costs.

use std::ops::Range;

/// Told of memory before anything is in it, so that the system may be asked for large pages there.
pub type Advise = fn(Range<*const u8>);

/// Has no wish.
pub fn no_advice(_: Range<*const u8>) {}

/// So many default values, in memory of which `advise` was told before it is touched.
pub(super) fn filled<T: Default + Clone>(count: usize, advise: Advise) -> Vec<T> {
    let mut slots = Vec::with_capacity(count);
    let Range { start, end } = slots.spare_capacity_mut().as_ptr_range();
    advise(start.cast()..end.cast());
    slots.resize(count, T::default());
    slots
}
