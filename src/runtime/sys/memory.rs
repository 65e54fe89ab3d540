//! Memory that the allocator holds.

// The rest of the project denies it; this folder is where it is allowed.
#![allow(unsafe_code)]

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
