//! Written forms of formats: read without a panic, and what is read is written again the same.
#![no_main]

use hbfp::BlockFormat;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(format) = text.parse::<BlockFormat>() {
        assert_eq!(format.to_string(), text);
    }
});
