//! Escapes text from outside (names in archives, of devices, files and mount points) before it reaches a
//! terminal.
//!
//! Control characters are shown as escapes, never sent, so that no such name can control the terminal.
//! [`word`] is for a string within a line; [`text`] is for text of our own, whose line ends are layout.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::path::PathBuf;

use serde::Serializer;

/// True for characters that a terminal may obey or that change the order in which text is shown: C0 and C1
/// controls, DEL, line and paragraph separators, and the marks and overrides of text direction (Unicode, UAX
/// #9).
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `string` with every unsafe character as `\x1b` or `\u{202e}`.
#[must_use]
pub fn word(string: &str) -> Cow<'_, str> {
    escape(string, is_unsafe)
}

/// As [`word`], but line ends and tabs stay.
#[must_use]
pub fn text(string: &str) -> Cow<'_, str> {
    escape(string, |c| is_unsafe(c) && c != '\n' && c != '\t')
}

/// JSON text without unsafe characters in its strings: those that JSON permits are replaced by JSON escapes.
#[must_use]
pub fn json(text: String) -> String {
    // All of these are in the basic plane. Outside of strings JSON has none of them.
    let is_left = |c: char| is_unsafe(c) && c >= '\u{7f}';
    if !text.contains(is_left) {
        return text;
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_left(c) {
            // Writing to a String does not fail.
            let _ = write!(escaped, "\\u{:04x}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Paths as strings in JSON. Bytes that are not UTF-8 become U+FFFD.
///
/// # Errors
/// The serializer's.
pub fn paths<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

fn escape(string: &str, is_unsafe: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !string.contains(&is_unsafe) {
        return Cow::Borrowed(string);
    }
    let mut escaped = String::with_capacity(string.len() + 16);
    for c in string.chars() {
        // Writing to a String does not fail.
        let _ = match u32::from(c) {
            _ if !is_unsafe(c) => escaped.write_char(c),
            code @ 0..=0xff => write!(escaped, "\\x{code:02x}"),
            code => write!(escaped, "\\u{{{code:x}}}"),
        };
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(word("plain, \u{e4}\u{4e16}"), "plain, \u{e4}\u{4e16}");
        assert_eq!(word("a\u{1b}[2J\n\u{7f}\u{9b}1m"), "a\\x1b[2J\\x0a\\x7f\\x9b1m");
        assert_eq!(word("\u{202e}txt"), "\\u{202e}txt");
        assert_eq!(text("a\tb\nc\r"), "a\tb\nc\\x0d");
    }

    #[test]
    fn json_stays_json_of_the_same_string() {
        let string = "a\u{1b}\u{9b}\u{7f}\u{202e}\u{e4}";
        let escaped = json(serde_json::to_string(string).unwrap());
        assert!(!escaped.contains(is_unsafe), "{escaped}");
        assert_eq!(serde_json::from_str::<String>(&escaped).unwrap(), string);
    }
}
