//! Free pages that nobody reaches: what a stray access is told, and what happens when there is no room for more mappings.
#![cfg(all(target_os = "linux", target_arch = "x86_64", not(miri)))]

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use memdesc::gfp::{__GFP_MEMALLOC, GFP_KERNEL, GFP_NOWAIT};
use memdesc::{Config, Mm, Pfn, Platform};
use memdesc_host::{Host, ram};

fn config() -> Config {
    Config {
        memory_is_zeroed: true,
        debug_pagealloc: true,
        page_owner: 1024,
        ..Config::default()
    }
}

fn boot(pages: u32) -> Mm<Host> {
    let ranges = [ram(0, pages)];
    let builder = Host::builder().memory(&ranges);
    let builder = builder.on_stray(|pfn, text| {
        let _ = write!(text, "asked about {:#x}", pfn.0);
    });
    Mm::new(builder.build().unwrap(), &config(), &ranges).unwrap()
}

/// What the child does: dies.
#[test]
#[ignore = "run by the tests below, in a process of its own"]
fn child() {
    let mm = boot(4096);
    let pfn = mm.alloc_pages(GFP_KERNEL, 3).unwrap();
    // SAFETY: ours, and not used again but by mistake.
    unsafe { mm.free_pages(pfn) };
    let how = std::env::var("MEMDESC_STRAY").unwrap();
    if how.ends_with("zone") {
        mm.drain_all();
    }
    let at = mm.page_address(pfn.add(5)).wrapping_add(0x123);
    println!("address {:#x} page {:#x}", at.addr(), pfn.0 + 5);
    // SAFETY: none; the process dies here.
    unsafe {
        if how.starts_with("write") {
            at.write_volatile(1);
        } else {
            at.read_volatile();
        }
    }
    println!("survived");
}

fn run(how: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--ignored",
            "--exact",
            "child",
            "--nocapture",
            "--test-threads=1",
        ])
        .env("MEMDESC_STRAY", how);
    command.output().unwrap()
}

#[test]
fn a_stray_access_is_named_and_deadly() {
    for (how, access, place) in [
        ("write", "write to", " pcp"),
        ("read", "read of", " pcp"),
        ("write zone", "write to", ""),
    ] {
        let out = run(how);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.signal(), Some(libc::SIGSEGV), "{said}");
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(!text.contains("survived"));
        let told = text.lines().find_map(|line| line.split_once("address "));
        let (address, page) = told.unwrap().1.split_once(" page ").unwrap();
        let line = said.lines().find(|line| line.starts_with("memdesc: stray"));
        let line = line.unwrap_or_else(|| panic!("{said}"));
        let start = format!("memdesc: stray {access} {address}: byte 291 of page {page}, page ");
        assert!(line.starts_with(&start), "{line}");
        assert!(
            line.contains(" of a block that says: free order "),
            "{line}"
        );
        if place.is_empty() {
            assert!(!line.contains(" pcp"), "{line}");
        } else {
            assert!(
                line.contains("page 5 of a block that says: free order 3"),
                "{line}"
            );
            assert!(line.contains(place), "{line}");
        }
        let freed = line.find("; freed as bare order 3 by ").expect("by whom");
        let allocated = line
            .find(", allocated as bare order 3 by ")
            .expect("by whom");
        assert!(
            freed < allocated && line[freed..].contains("tests/guard.rs"),
            "{line}"
        );
        assert!(line.ends_with(&format!("; asked about {page}")), "{line}");
    }
}

/// Each page on its own is a mapping of its own, and there are only so many: guarding ends, the machine goes on.
#[test]
fn no_room_for_more_mappings() {
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let most: u32 = most.trim().parse().unwrap();
    if most > 200_000 {
        eprintln!("vm.max_map_count is {most}: not tried");
        return;
    }
    let mm = boot(most * 2 + (64 << 8));
    let get = || mm.alloc_pages(GFP_NOWAIT | __GFP_MEMALLOC, 0).ok();
    let mut all: Vec<Pfn> = std::iter::from_fn(get).collect();
    assert!(mm.platform().guards_free_pages());
    all.sort_unstable();
    for pair in all.chunks(2) {
        // SAFETY: ours, once.
        unsafe { mm.free_pages(pair[0]) };
    }
    assert!(!mm.platform().guards_free_pages());
    // All of it is accessible, and the machine works.
    for pair in all.chunks(2).filter(|pair| pair.len() == 2) {
        // SAFETY: ours, and freed once.
        unsafe {
            mm.page_address(pair[1]).write(7);
            mm.free_pages(pair[1]);
        }
    }
    let pfn = mm.alloc_pages(GFP_KERNEL, 9).unwrap();
    // SAFETY: ours.
    unsafe {
        mm.page_address(pfn).write_bytes(1, 4096 << 9);
        mm.free_pages(pfn);
    }
    assert!(mm.ledger().balanced);
}

/// Nobody is told of what happens elsewhere: the default stays the default.
#[test]
fn a_host_that_does_not_guard() {
    let ranges = [ram(0, 4096)];
    let host = Host::builder().memory(&ranges).build().unwrap();
    let mm = Mm::new(host, &Config::default(), &ranges).unwrap();
    let pfn = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
    // SAFETY: ours, and in the arena when it is free: accessible.
    unsafe {
        mm.page_address(pfn).write(9);
        mm.free_pages(pfn);
        assert_eq!(mm.page_address(pfn).read(), 9);
    }
}

/// Looks, when the handler goes, whether the arena is there still.
struct Goes {
    base: Arc<AtomicUsize>,
    was_mapped: Arc<AtomicBool>,
}

impl Drop for Goes {
    fn drop(&mut self) {
        let base = self.base.load(Ordering::Relaxed);
        // SAFETY: msync(2) touches nothing; it fails where nothing is mapped.
        let synced = unsafe { libc::msync(base as *mut libc::c_void, 4096, libc::MS_ASYNC) };
        self.was_mapped.store(synced == 0, Ordering::Relaxed);
    }
}

/// The addresses of an arena go to whom the system pleases as soon as it is unmapped: a host's handler is nobody's by then, or it would be asked for the
/// faults of the next host.
#[test]
fn the_handler_goes_before_the_arena() {
    for _ in 0..16 {
        let (base, was_mapped) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let goes = Goes {
            base: base.clone(),
            was_mapped: was_mapped.clone(),
        };
        let handler = move |_, _, _| {
            let _ = &goes;
            false
        };
        let builder = Host::builder().memory(&[ram(0, 4096)]).on_fault(handler);
        let host = builder.build().unwrap();
        base.store(host.direct_map().addr(), Ordering::Relaxed);
        drop(host);
        assert!(was_mapped.load(Ordering::Relaxed));
    }
}
