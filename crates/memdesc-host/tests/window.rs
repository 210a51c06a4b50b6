//! Windows on the arena: the same bytes at several addresses, and nothing where nothing is mapped.
#![cfg(not(miri))]

use memdesc::{PAGE_SIZE, Pfn, Platform};
use memdesc_host::{Host, Window};

fn word(at: *mut u8) -> *mut u64 {
    at.cast()
}

/// Does this address lead anywhere?
fn is_mapped(at: *mut u8) -> bool {
    let mut byte = 0u8;
    let local = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let remote = libc::iovec {
        iov_base: at.cast(),
        iov_len: 1,
    };
    // SAFETY: reads one byte, if there is one, into ours.
    unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) == 1 }
}

#[test]
fn the_same_page_at_three_addresses() {
    let (host, _) = Host::small(64).unwrap();
    let a = Window::new(&host, 8 * PAGE_SIZE, 1).unwrap();
    let b = Window::new(&host, 8 * PAGE_SIZE, 2 << 20).unwrap();
    assert!(b.base().addr().is_multiple_of(2 << 20) && b.len() == 8 * PAGE_SIZE);
    a.map(2 * PAGE_SIZE, Pfn(5), 2, true).unwrap();
    b.map(0, Pfn(6), 1, false).unwrap();
    let direct = host.direct_map().wrapping_add(6 * PAGE_SIZE);
    // SAFETY: pages 5 and 6 of a host that nobody uses, mapped here as above.
    unsafe {
        word(a.base().add(3 * PAGE_SIZE)).write_volatile(77);
        assert_eq!(word(b.base()).read_volatile(), 77);
        assert_eq!(word(direct).read_volatile(), 77);
    }
    assert!(!is_mapped(a.base()) && is_mapped(a.base().wrapping_add(2 * PAGE_SIZE)));
    a.unmap(PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
    assert!(!is_mapped(a.base().wrapping_add(2 * PAGE_SIZE)));
    assert!(is_mapped(a.base().wrapping_add(3 * PAGE_SIZE)));
    // Another page in its place.
    a.map(3 * PAGE_SIZE, Pfn(9), 1, true).unwrap();
    // SAFETY: as above; page 9 was never written.
    let fresh = unsafe { word(a.base().add(3 * PAGE_SIZE)).read_volatile() };
    assert_eq!(fresh, 0);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (host, _) = Host::small(64).unwrap();
    assert!(Window::new(&host, 0, 1).is_err());
    assert!(Window::new(&host, 4096, 3).is_err());
    let window = Window::new(&host, 4 * PAGE_SIZE, 1).unwrap();
    for (offset, pfn, pages) in [(1, 0, 1), (0, 0, 5), (4, 0, 1), (0, 64, 1), (0, 60, 5)] {
        let offset = if offset == 1 { 1 } else { offset * PAGE_SIZE };
        assert!(window.map(offset, Pfn(pfn), pages, true).is_err());
    }
    assert!(window.unmap(0, 5 * PAGE_SIZE).is_err() && window.unmap(0, 0).is_err());
}

#[test]
fn a_window_outlives_its_host() {
    let (host, _) = Host::small(64).unwrap();
    let window = Window::new(&host, PAGE_SIZE, 1).unwrap();
    window.map(0, Pfn(3), 1, true).unwrap();
    drop(host);
    // SAFETY: the window keeps the memory, and nobody else has it.
    unsafe { word(window.base()).write_volatile(1) };
    assert!(!window.contains(window.base().addr() + PAGE_SIZE));
}
