//! The byte scanner: moves over one line without looking at it as text and without allocating.

/// Skips blanks.
#[inline]
pub(crate) fn skip_blanks(mut s: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = s {
        s = rest;
    }
    s
}

/// The bytes up to the next space, and the rest with that space.
#[inline]
pub(crate) fn token(s: &[u8]) -> (&[u8], &[u8]) {
    s.split_at(memchr::memchr(b' ', s).unwrap_or(s.len()))
}

/// Moves behind `key` (`ptr=`): at once if it comes next, else at the start of a later word.
///
/// So the symbol of a `call_site=`, spaces in it or not, and fields that newer kernels add are
/// stepped over without being understood.
#[inline]
pub(crate) fn find_key<'a>(s: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let mut rest = skip_blanks(s);
    loop {
        if let Some(value) = rest.strip_prefix(key) {
            return Some(value);
        }
        rest = &rest[memchr::memchr(b' ', rest)? + 1..];
    }
}

/// Like [`find_key`], and gives what stands before the key as well, for values with spaces.
#[inline]
pub(crate) fn split_key<'a>(s: &'a [u8], key: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let mut at = 0;
    loop {
        at += memchr::memchr(b' ', &s[at..])?;
        if let Some(value) = s[at + 1..].strip_prefix(key) {
            return Some((&s[..at], value));
        }
        at += 1;
    }
}

/// A value ends at a blank or at the end of the line.
#[inline]
fn at_end(s: &[u8]) -> bool {
    matches!(s, [] | [b' ' | b'\t' | b'\r', ..])
}

/// Decimal digits, at least one, that fit; and the rest.
#[inline]
pub(crate) fn digits(s: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    let mut len = 0;
    while let Some(digit) = s.get(len).map(|b| b.wrapping_sub(b'0')).filter(|&d| d < 10) {
        value = if len < 19 {
            value * 10 + u64::from(digit)
        } else {
            value.checked_mul(10)?.checked_add(digit.into())?
        };
        len += 1;
    }
    (len > 0).then(|| (value, &s[len..]))
}

const NOT_HEX: u8 = 0xff;

const HEX: [u8; 256] = {
    let mut table = [NOT_HEX; 256];
    let mut i = 0;
    while i < 16 {
        table[b"0123456789abcdef"[i] as usize] = i as u8;
        table[b"0123456789ABCDEF"[i] as usize] = i as u8;
        i += 1;
    }
    table
};

/// Hexadecimal digits without a prefix, at least one, that fit; and the rest.
#[inline]
pub(crate) fn hex_digits(s: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    let mut len = 0;
    let mut top = 0;
    while let Some(&byte) = s.get(len) {
        let digit = HEX[byte as usize];
        if digit == NOT_HEX {
            break;
        }
        top |= value >> 60;
        value = value << 4 | u64::from(digit);
        len += 1;
    }
    (len > 0 && top == 0).then(|| (value, &s[len..]))
}

/// A whole decimal value, or a hexadecimal one with `0x`.
#[inline]
pub(crate) fn number(s: &[u8]) -> Option<(u64, &[u8])> {
    let found = match s.strip_prefix(b"0x") {
        Some(hex) => hex_digits(hex),
        None => digits(s),
    };
    found.filter(|(_, rest)| at_end(rest))
}

/// A whole address as `%p` prints it: hexadecimal with or without `0x`, or a way to say NULL.
#[inline]
pub(crate) fn pointer(s: &[u8]) -> Option<(u64, &[u8])> {
    let found = match s {
        [b'(', ..] => {
            let rest = s
                .strip_prefix(b"(nil)")
                .or_else(|| s.strip_prefix(b"(null)"))?;
            Some((0, rest))
        }
        _ => hex_digits(s.strip_prefix(b"0x").unwrap_or(s)),
    };
    found.filter(|(_, rest)| at_end(rest))
}

/// `799.175799` in nanoseconds: up to nine digits behind the point.
#[inline]
pub(crate) fn time_ns(s: &[u8]) -> Option<(u64, &[u8])> {
    const SCALE: [u64; 10] = [
        1_000_000_000,
        100_000_000,
        10_000_000,
        1_000_000,
        100_000,
        10_000,
        1_000,
        100,
        10,
        1,
    ];
    let (seconds, rest) = digits(s)?;
    let fraction = rest.strip_prefix(b".")?;
    let (part, rest) = digits(fraction)?;
    let scale = SCALE.get(fraction.len() - rest.len())?;
    let ns = seconds
        .checked_mul(1_000_000_000)?
        .checked_add(part * scale)?;
    Some((ns, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(digits(b"123 x"), Some((123, &b" x"[..])));
        assert_eq!(digits(b"18446744073709551615"), Some((u64::MAX, &b""[..])));
        assert_eq!(digits(b"18446744073709551616"), None);
        assert_eq!(digits(b"99999999999999999999999"), None);
        assert_eq!(digits(b""), None);
        assert_eq!(hex_digits(b"fFff"), Some((0xffff, &b""[..])));
        assert_eq!(hex_digits(b"000000000000000000001"), Some((1, &b""[..])));
        assert_eq!(hex_digits(b"10000000000000000"), None);
        assert_eq!(number(b"0x10 y"), Some((16, &b" y"[..])));
        assert_eq!(number(b"12ab"), None);
        assert_eq!(number(b"0x"), None);
        assert_eq!(number(b"-1"), None);
    }

    #[test]
    fn pointers() {
        for null in ["(nil)", "(null)", "0x0", "0000000000000000"] {
            assert_eq!(pointer(null.as_bytes()), Some((0, &b""[..])), "{null}");
        }
        assert_eq!(
            pointer(b"0xffff8881047086e0 n"),
            Some((0xffff_8881_0470_86e0, &b" n"[..]))
        );
        assert_eq!(
            pointer(b"ffff8881047086e0"),
            Some((0xffff_8881_0470_86e0, &b""[..]))
        );
        assert_eq!(pointer(b"(____ptrval____)"), None);
        assert_eq!(pointer(b"(nil)x"), None);
    }

    #[test]
    fn times() {
        assert_eq!(time_ns(b"799.175799:"), Some((799_175_799_000, &b":"[..])));
        assert_eq!(time_ns(b"0.000000001"), Some((1, &b""[..])));
        assert_eq!(time_ns(b"1.5"), Some((1_500_000_000, &b""[..])));
        assert_eq!(time_ns(b"1.1234567890"), None);
        assert_eq!(time_ns(b"99999999999999.0"), None);
        assert_eq!(time_ns(b"12"), None);
    }

    #[test]
    fn keys() {
        assert_eq!(find_key(b" a=1 ptr=2", b"ptr="), Some(&b"2"[..]));
        assert_eq!(find_key(b"ptr=2", b"ptr="), Some(&b"2"[..]));
        assert_eq!(find_key(b"xptr=2", b"ptr="), None);
        assert_eq!(split_key(b"a b c=3", b"c="), Some((&b"a b"[..], &b"3"[..])));
        assert_eq!(split_key(b"a b", b"c="), None);
    }
}
