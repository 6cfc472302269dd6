//! The committed vectors, made by the exact-arithmetic Python oracle, against the core: packing and the generator here,
//! encodings, products and training steps in `tests/python/test_vectors.py`, which reaches the same core.

use hbfp::encode::{decode, pack_codes, unpack_codes};
use hbfp::rng::philox4x32;
use hbfp::shape::PlaneLayout;
use hbfp::{BlockFormat, Context};
use serde_json::Value;

fn cases(file: &str) -> Vec<Value> {
    let path = format!("{}/tests/vectors/{file}.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let page: Value = serde_json::from_str(&text).unwrap();
    let cases = page["cases"].as_array().unwrap().clone();
    assert!(cases.len() > 5, "{file}: an empty file tests nothing");
    cases
}

fn numbers(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|x| x.as_i64().unwrap()).collect()
}

fn hex(value: &Value) -> Vec<u8> {
    let text = value.as_str().unwrap();
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn words(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|x| u32::from_str_radix(x.as_str().unwrap(), 16).unwrap()).collect()
}

#[test]
fn philox() {
    for case in cases("philox") {
        let (Some(counter), Some(key)) = (case.get("counter"), case.get("key")) else { continue };
        let (counter, key) = (words(counter), words(key));
        let found = philox4x32(counter.try_into().unwrap(), key.try_into().unwrap());
        assert_eq!(found.to_vec(), words(&case["words"]), "{}", case["name"]);
    }
}

#[test]
fn packing() {
    for case in cases("pack") {
        let format: BlockFormat = case["format"].as_str().unwrap().parse().unwrap();
        let shape: Vec<usize> = numbers(&case["shape"]).into_iter().map(|n| n as usize).collect();
        let rank = shape.len().max(1) as i64;
        let axis = case["axis"].as_i64().unwrap().rem_euclid(rank) as usize;
        let layout = PlaneLayout::new(format, &shape, axis).unwrap();
        let plane_shape = |key: &str| numbers(&case[key]).into_iter().map(|n| n as usize).collect::<Vec<_>>();
        assert_eq!(layout.exponents().to_vec(), plane_shape("exponent_plane_shape"), "{}", case["name"]);
        assert_eq!(layout.mantissas().to_vec(), plane_shape("mantissa_plane_shape"), "{}", case["name"]);
        let codes: Vec<i16> = numbers(&case["codes"]).into_iter().map(|q| q as i16).collect();
        let (exponents, mantissas) = (hex(&case["exponent_plane"]), hex(&case["mantissa_plane"]));
        let planes = pack_codes(&layout, &codes, &exponents).unwrap();
        assert_eq!((planes.exponents, planes.mantissas), (exponents.clone(), mantissas.clone()), "{}", case["name"]);
        assert_eq!(unpack_codes(&layout, &exponents, &mantissas).unwrap(), codes, "{}", case["name"]);
        assert_eq!(decode(&Context::serial(), &layout, &exponents, &mantissas).unwrap().len(), codes.len());
    }
}
