//! The data after the header of a device-mapper call: bytes <-> values, pure.
//!
//! Layouts: Linux `include/uapi/linux/dm-ioctl.h`; integers in native byte order. Invariant: decoding never
//! panics; a payload that ends too early or points outside is an error.

use crate::base::{DeviceNumber, Error, Result};

use super::table::{LINES_MAX, Table};

/// `struct dm_target_spec`: start, length, status, next, type.
const SPEC_BYTES: usize = 40;
const KIND_FIELD_BYTES: usize = 16;
/// Most entries in a list of devices, targets or dependencies.
const ENTRIES_MAX: usize = 1 << 20;

/// A line of a status reply: start, length, kind, text.
pub(super) type Row = (u64, u64, String, String);

/// The payload that loads a table.
pub(super) fn encode_table(table: &Table) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (start, length, kind, params) in table.to_kernel() {
        let text_bytes = (params.len() + 1).next_multiple_of(8);
        let next = u32::try_from(SPEC_BYTES + text_bytes).expect("a table's parameters are bounded");
        bytes.extend_from_slice(&start.to_ne_bytes());
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&0i32.to_ne_bytes());
        bytes.extend_from_slice(&next.to_ne_bytes());
        let mut field = [0u8; KIND_FIELD_BYTES];
        field[..kind.len()].copy_from_slice(kind.as_bytes());
        bytes.extend_from_slice(&field);
        let end = bytes.len() + text_bytes;
        bytes.extend_from_slice(params.as_bytes());
        bytes.resize(end, 0);
    }
    bytes
}

/// The lines of a table or status reply. `next` is relative to the start of the first line.
pub(super) fn decode_rows(payload: &[u8], count: u32) -> Result<Vec<Row>> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > LINES_MAX {
        return Err(bad("it has too many lines"));
    }
    let mut rows = Vec::with_capacity(count);
    let mut at = 0;
    for _ in 0..count {
        let spec = part(payload, at, SPEC_BYTES)?;
        let params = text(payload, at + SPEC_BYTES)?;
        rows.push((number64(spec, 0)?, number64(spec, 8)?, text(&spec[24..], 0)?, params));
        at = offset(spec, 20)?;
    }
    Ok(rows)
}

/// The devices of a list: name and number. `next` is relative to the entry itself; 0 ends the list.
pub(super) fn decode_names(payload: &[u8]) -> Result<Vec<(String, DeviceNumber)>> {
    let mut names = Vec::new();
    let mut at = 0usize;
    while !payload.is_empty() && names.len() < ENTRIES_MAX {
        let entry = part(payload, at, 12)?;
        let dev = number64(entry, 0)?;
        if dev == 0 {
            break;
        }
        names.push((text(payload, at + 12)?, DeviceNumber::from_dev(dev)));
        match offset(entry, 8)? {
            0 => break,
            next => at = at.checked_add(next).ok_or_else(|| bad("it points outside"))?,
        }
    }
    Ok(names)
}

/// Text up to its final zero.
pub(super) fn text(bytes: &[u8], at: usize) -> Result<String> {
    let rest = bytes.get(at..).ok_or_else(|| bad("it ends too early"))?;
    let end = rest.iter().position(|byte| *byte == 0).ok_or_else(|| bad("a text has no final zero"))?;
    std::str::from_utf8(&rest[..end]).map(ToOwned::to_owned).map_err(|_| bad("a text is not UTF-8"))
}

fn part(bytes: &[u8], at: usize, length: usize) -> Result<&[u8]> {
    at.checked_add(length).and_then(|end| bytes.get(at..end)).ok_or_else(|| bad("it ends too early"))
}

fn number64(bytes: &[u8], at: usize) -> Result<u64> {
    let field = part(bytes, at, 8)?;
    Ok(u64::from_ne_bytes(field.try_into().map_err(|_| bad("a number is cut"))?))
}

fn number32(bytes: &[u8], at: usize) -> Result<u32> {
    let field = part(bytes, at, 4)?;
    Ok(u32::from_ne_bytes(field.try_into().map_err(|_| bad("a number is cut"))?))
}

fn offset(bytes: &[u8], at: usize) -> Result<usize> {
    usize::try_from(number32(bytes, at)?).map_err(|_| bad("it points outside"))
}

fn bad(what: &str) -> Error {
    Error::new(
        crate::base::ErrorKind::Kernel,
        format!("the reply of device-mapper cannot be decoded: {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_loaded_table_reads_back() {
        let table: Table = "0 8 linear 8:16 2048\n8 8 zero\n16 24 striped 2 16 8:1 0 8:2 0".parse().unwrap();
        let bytes = encode_table(&table);
        // In a load `next` is relative to the line itself, in a reply to the first line.
        let mut answer = bytes.clone();
        let mut at = 0;
        for _ in 0..3 {
            let next = at + offset(&bytes, at + 20).unwrap();
            answer[at + 20..at + 24].copy_from_slice(&u32::try_from(next).unwrap().to_ne_bytes());
            at = next;
        }
        assert_eq!(at, bytes.len());
        assert_eq!(Table::from_kernel(&decode_rows(&answer, 3).unwrap()).unwrap(), table);
        for cut in 0..answer.len() - 8 {
            assert!(decode_rows(&answer[..cut], 3).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_list_ends_at_its_last_entry() {
        assert!(decode_names(&[]).unwrap().is_empty());
        assert!(decode_names(&[0; 16]).unwrap().is_empty());
        let mut entry = DeviceNumber { major: 253, minor: 300 }.to_dev().to_ne_bytes().to_vec();
        entry.extend_from_slice(&0u32.to_ne_bytes());
        entry.extend_from_slice(b"data\0");
        assert_eq!(
            decode_names(&entry).unwrap(),
            [("data".to_owned(), DeviceNumber { major: 253, minor: 300 })]
        );
    }

    proptest! {
        #[test]
        fn any_payload_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), count in 0u32..9) {
            let _ = decode_rows(&bytes, count);
            let _ = decode_names(&bytes);
        }
    }
}
