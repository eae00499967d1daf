//! The map of an archive that can be read at any offset.

use crate::base::{Bytes, Result};
use crate::format::archive::map::MapCursor;
use crate::format::archive::{ArchiveError, Block, MapEntry, MapState, frame};
use crate::secondary::archive_read::ArchiveFile;
use crate::sys::aligned::AlignedBuffer;

/// Passes the whole map to `take`, in order, until `take` returns an error.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a damaged map; I/O errors; any error that the
/// interrupt or `take` returns.
pub fn read_map(
    archive: &ArchiveFile,
    interrupt: &dyn Fn() -> Result<()>,
    take: &mut dyn FnMut(MapEntry) -> Result<()>,
) -> Result<()> {
    let layout = archive.superblock().layout();
    let totals = archive.totals();
    let shown = archive.path().display().to_string();
    let mut memory = AlignedBuffer::zeroed(layout.frame_bytes().as_len());
    let mut cursor = MapCursor::new(layout.origin_size, layout.is_increment);
    let mut present = Bytes::ZERO;
    let mut offset = archive.map_offset();
    for sequence in totals.first_map()..totals.sequence_end() {
        interrupt()?;
        let length = archive.read_frame(sequence, offset, &mut memory)?;
        let mut taken = Ok(());
        let read = frame::open(&layout, sequence, &memory).and_then(|frame| {
            cursor.read(frame.control.facts.origin_offset, frame.payload, |entry| {
                if entry.state == MapState::Present {
                    present += entry.extent.length();
                }
                if taken.is_ok() {
                    taken = take(entry);
                }
            })
        });
        taken?;
        read.map_err(|error| error.at(Block::Frame(sequence), offset, &shown))?;
        offset += length;
    }
    let seen = present.get();
    let agreed = cursor.finish().and_then(|()| match totals.present_bytes.get() {
        tail if tail == seen => Ok(()),
        tail => Err(ArchiveError::Totals { field: "the count of present bytes", tail, seen }),
    });
    let agreed = agreed.and_then(|()| match archive.tail_offset() {
        tail if tail == offset || layout.origin_size == Bytes::ZERO => Ok(()),
        tail => {
            let field = "the end of the map";
            Err(ArchiveError::Totals { field, tail: tail.get(), seen: offset.get() })
        }
    });
    agreed.map_err(|error| error.at(Block::TailSuperblock, archive.tail_offset(), &shown))
}
