//! Memory that the allocator holds.

// The rest of the project denies it; this folder is where it is allowed.
#![allow(unsafe_code)]

/// The largest page that a Linux of ours may be built with: what is a multiple of it is one of all others.
const PAGE_MAX: usize = 64 * 1_024;

/// Asks for large pages in this memory: a look-up at random then misses the address cache less often.
/// A wish; where the kernel has none, small ones do.
pub fn prefer_large_pages(memory: std::ops::Range<*const u8>) {
    // Outwards, so that neighbouring pieces become one piece that large pages fit into.
    let start = memory.start.addr() / PAGE_MAX * PAGE_MAX;
    let length = memory.end.addr().next_multiple_of(PAGE_MAX).saturating_sub(start);
    // SAFETY: madvise(2): "MADV_HUGEPAGE: Enable Transparent Huge Pages (THP) for pages in the range
    // specified by addr and length", of the kind of which it says that "the application semantics are
    // not changed". What it has no mapping for fails with ENOMEM and nothing else.
    let _small_ones_do = unsafe {
        rustix::mm::madvise(
            memory.start.with_addr(start).cast_mut().cast(),
            length,
            rustix::mm::Advice::LinuxHugepage,
        )
    };
}

/// Has the allocator give pages back that nothing is in.
pub(crate) fn return_memory() {
    // SAFETY: malloc_trim(3): "attempts to release free memory from the heap"; "MT-Safe". It touches only
    // memory that the allocator itself holds as free; its argument is the number of bytes to keep at
    // the top.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}
