//! What the fuzz targets share: reading must cost no more memory than the input can pay for, and
//! nothing of it may stay.
//!
//! libFuzzer sees the memory of the process only from outside and finds leaks only with a sanitizer
//! that stable Rust does not have, so the targets count what they allocate themselves.

use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Runs `read` and panics if it holds more than `budget` bytes at any moment, or keeps some.
pub fn within(budget: usize, read: impl Fn()) {
    let mut before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    read();
    let peak = MEMORY.peak_usage() - before;
    assert!(peak <= budget, "held {peak} bytes, may hold {budget}");

    // What is made once for the whole process looks like a leak, but only once.
    for _ in 0..3 {
        let after = MEMORY.current_usage();
        if after <= before {
            return;
        }
        before = after;
        read();
    }
    panic!("memory is lost each time");
}

/// Bytes that are allocated now; the highest number from here on is what [`peak`] tells.
pub fn held() -> usize {
    MEMORY.reset_peak_usage();
    MEMORY.current_usage()
}

/// The most bytes that were allocated at any moment since [`held`].
pub fn peak() -> usize {
    MEMORY.peak_usage()
}

/// Panics unless `text`, which quotes a stranger, is safe and short enough for a log line.
pub fn assert_printable(text: &str) {
    assert!(text.len() <= 512, "{} bytes of text", text.len());
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
