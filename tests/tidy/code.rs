//! Reads Rust source just well enough for the checks: which characters are code, and which modules a file uses. It
//! knows comments (nested), strings (raw ones too), characters and lifetimes; it does not expand macros.

/// Replaces comments, strings and characters by spaces, and keeps line breaks and thus line numbers.
pub fn blank_text(source: &str) -> String {
    let text: Vec<char> = source.chars().collect();
    let mut code = String::with_capacity(source.len());
    let mut at = 0;
    while at < text.len() {
        let end = end_of_text(&text, at);
        if end > at {
            code.extend(text[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        } else {
            code.push(text[at]);
            at += 1;
        }
    }
    code
}

/// The end of the comment, string or character that begins at `at`; `at` itself if none begins there.
fn end_of_text(text: &[char], at: usize) -> usize {
    let next = text.get(at + 1).copied();
    let joined = at > 0 && is_word(text[at - 1]);
    match text[at] {
        '/' if next == Some('/') => find(text, at, |i| text[i] == '\n'),
        '/' if next == Some('*') => end_of_block_comment(text, at),
        '"' => end_of_string(text, at),
        'b' | 'c' if !joined && next == Some('"') => end_of_string(text, at + 1),
        'b' if !joined && next == Some('\'') => end_of_character(text, at + 1),
        'b' | 'c' if !joined && next == Some('r') => end_of_raw_string(text, at + 2).unwrap_or(at),
        'r' if !joined => end_of_raw_string(text, at + 1).unwrap_or(at),
        '\'' => end_of_character(text, at),
        _ => at,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn find(text: &[char], from: usize, found: impl Fn(usize) -> bool) -> usize {
    (from..text.len()).find(|i| found(*i)).unwrap_or(text.len())
}

fn end_of_block_comment(text: &[char], at: usize) -> usize {
    let mut depth = 0_usize;
    let mut i = at;
    while i + 1 < text.len() {
        match (text[i], text[i + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                i += 1;
                continue;
            }
        }
        i += 2;
        if depth == 0 {
            return i;
        }
    }
    text.len()
}

fn end_of_string(text: &[char], quote: usize) -> usize {
    let mut i = quote + 1;
    while i < text.len() {
        match text[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    text.len()
}

/// `from` is the position after the `r`. None if no raw string follows (`r#type` is a word).
fn end_of_raw_string(text: &[char], from: usize) -> Option<usize> {
    let quote = find(text, from, |i| text[i] != '#');
    if text.get(quote) != Some(&'"') {
        return None;
    }
    let hashes = quote - from;
    let closes = |i: usize| text[i] == '"' && (1..=hashes).all(|n| text.get(i + n) == Some(&'#'));
    Some((find(text, quote + 1, closes) + 1 + hashes).min(text.len()))
}

/// A lifetime or label has no closing quote after its first character.
fn end_of_character(text: &[char], quote: usize) -> usize {
    match (text.get(quote + 1), text.get(quote + 2)) {
        (Some('\\'), Some(_)) => (find(text, quote + 3, |i| text[i] == '\'') + 1).min(text.len()),
        (Some(_), Some('\'')) => quote + 3,
        _ => quote,
    }
}

fn matching_brace(text: &[char], open: usize) -> usize {
    let mut depth = 0_usize;
    for (i, c) in text.iter().enumerate().skip(open) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i;
        }
    }
    text.len() - 1
}

fn word_positions(text: &[char], word: &str) -> Vec<usize> {
    let wanted: Vec<char> = word.chars().collect();
    let fits = |i: &usize| {
        text[*i..].starts_with(&wanted)
            && (*i == 0 || !is_word(text[*i - 1]))
            && text.get(*i + wanted.len()).is_none_or(|c| !is_word(*c))
    };
    (0..text.len()).filter(fits).collect()
}

/// The code without the bodies of `#[cfg(test)] mod NAME { ... }`.
pub fn without_tests(code: &str) -> String {
    let mut text: Vec<char> = code.chars().collect();
    let mark: Vec<char> = "#[cfg(test)]".chars().collect();
    for at in 0..text.len() {
        if !text[at..].starts_with(&mark) {
            continue;
        }
        let item = find(&text, at + mark.len(), |i| !text[i].is_whitespace());
        if !text[item..].starts_with(&['m', 'o', 'd', ' ']) {
            continue;
        }
        let open = find(&text, item, |i| text[i] == '{' || text[i] == ';');
        if text.get(open) == Some(&'{') {
            let close = matching_brace(&text, open);
            text[open..=close].iter_mut().filter(|c| **c != '\n').for_each(|c| *c = ' ');
        }
    }
    text.into_iter().collect()
}

/// The modules at the crate's root that the code names, with the line of each: `crate::X`, the first words of
/// `crate::{X, Y::Z}`, and enough `super::` to reach the root. `depth` is the file's own: 1 for `src/io/mod.rs`, 2 for
/// `src/io/engine.rs`.
pub fn root_modules(code: &str, depth: usize) -> Vec<(String, usize)> {
    let text: Vec<char> = code.chars().collect();
    let mut all = Vec::new();
    let line_of = |i: usize| text[..i].iter().filter(|c| **c == '\n').count() + 1;
    for at in word_positions(&text, "crate").into_iter().chain(word_positions(&text, "tidemark")) {
        let end = find(&text, at, |i| !is_word(text[i]));
        if let Some(next) = behind_path_mark(&text, end) {
            all.extend(heads(&text, next).into_iter().map(|head| (head, line_of(at))));
        }
    }
    for at in word_positions(&text, "super") {
        if at >= 2 && text[at - 1] == ':' {
            continue;
        }
        let (mut count, mut next) = (1, behind_path_mark(&text, at + 5));
        while let Some(i) = next.filter(|i| text[*i..].starts_with(&['s', 'u', 'p', 'e', 'r'])) {
            count += 1;
            next = behind_path_mark(&text, i + 5);
        }
        if let Some(i) = next.filter(|_| count >= depth) {
            all.extend(heads(&text, i).into_iter().map(|head| (head, line_of(at))));
        }
    }
    all
}

fn behind_path_mark(text: &[char], from: usize) -> Option<usize> {
    let at = find(text, from, |i| !text[i].is_whitespace());
    let is_mark = text.get(at) == Some(&':') && text.get(at + 1) == Some(&':');
    is_mark.then(|| find(text, at + 2, |i| !text[i].is_whitespace()))
}

/// The word at `at`, or the first word of each entry of the brace list there.
fn heads(text: &[char], at: usize) -> Vec<String> {
    if text.get(at) != Some(&'{') {
        return vec![text[at..find(text, at, |i| !is_word(text[i]))].iter().collect()];
    }
    let close = matching_brace(text, at);
    let mut depth = 0_usize;
    let mut entries = vec![String::new()];
    for c in &text[at + 1..close] {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => entries.push(String::new()),
            _ => {}
        }
        if let Some(entry) = entries.last_mut().filter(|_| depth == 0 && *c != ',') {
            entry.push(*c);
        }
    }
    let first = |entry: &String| entry.trim().chars().take_while(|c| is_word(*c)).collect::<String>();
    entries.iter().map(first).filter(|head| !head.is_empty()).collect()
}
