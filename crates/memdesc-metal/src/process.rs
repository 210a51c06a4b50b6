//! Processes: threads that run in user mode, in address spaces of their own.
//!
//! Their programs (`user.s`) are text that is mapped from a file and so comes by page faults, as do their memory and their stack, zero at first; after a fork what is written
//! is copied. [`run`] is a thread's way there and back: `enter_user` leaves for user mode, every trap from there comes back on the thread's stack below that call, and
//! `leave_user` ends it, when the process exits or does what it may not. So what a process has belongs to `run`, which drops it.
//!
//! A process has one thread and its thread's number. It calls by the instruction `syscall`; the calls are in [`syscall`]. There are no signals, no floating point and no
//! segments of its own. What it may not do ends it: that is counted, and said in the log.

use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use arrayvec::ArrayVec;
use memdesc::filemap::{FileError, Mapping, MappingOps};
use memdesc::mmap::{FaultError, Map, VmFlags};
use memdesc::{AllocError, Mm, PAGE_SIZE};
use spin::Mutex;
use x86_64::instructions::interrupts;

use crate::platform::Metal;
use crate::thread::{self, JoinHandle};
use crate::traps::Frame;
use crate::users::{self, Space, TOP};
use crate::{log, sched};

unsafe extern "C" {
    safe static user_text: u8;
    safe static user_text_end: u8;
    /// See `switch.s`.
    unsafe fn enter_user(frame: *const Frame) -> u64;
    unsafe fn leave_user(value: u64, saved: usize) -> !;
}

const PAGE: u64 = PAGE_SIZE as u64;
/// Where a process has what.
const TEXT: u64 = 0x40_0000;
const DATA: u64 = 0x1000_0000;
const STACK_TOP: u64 = 0x7fff_0000_0000;
const STACK_PAGES: u64 = 16;

/// In the value of a process that did not exit by itself.
pub(crate) const KILLED: u64 = 1 << 63;

/// What the calls are.
const EXIT: u64 = 0;
const WRITE: u64 = 1;
const YIELD: u64 = 2;
const FORK: u64 = 3;
const WAIT: u64 = 4;
const MMAP: u64 = 5;
const MUNMAP: u64 = 6;
const SLEEP: u64 = 7;

/// What they answer that could not be done, as Linux has it.
const ECHILD: u64 = -10i64 as u64;
const ENOMEM: u64 = -12i64 as u64;
const EFAULT: u64 = -14i64 as u64;
const EINVAL: u64 = -22i64 as u64;
const ENOSYS: u64 = -38i64 as u64;

/// Processes that were started, forked, and killed; calls; and the most that any used of its stack in the kernel.
pub(crate) static STARTED: AtomicU64 = AtomicU64::new(0);
pub(crate) static FORKS: AtomicU64 = AtomicU64::new(0);
pub(crate) static KILLS: AtomicU64 = AtomicU64::new(0);
/// Those of them that touched what is not theirs, whether there was memory or not.
pub(crate) static STRAYS: AtomicU64 = AtomicU64::new(0);
pub(crate) static CALLS: AtomicU64 = AtomicU64::new(0);
pub(crate) static MOST_STACK: AtomicUsize = AtomicUsize::new(0);

/// Those that run.
static ALIVE: AtomicU64 = AtomicU64::new(0);
/// The number of the next address space.
static NEXT_ASID: AtomicU64 = AtomicU64::new(1 << 32);
/// What was written last, as much as there is room for.
static CONSOLE: Mutex<ArrayVec<u8, 256>> = Mutex::new(ArrayVec::new_const());

/// A process, as its thread has it.
pub(crate) struct Running {
    space: Space,
    /// Who was forked and not waited for, oldest first. Its own thread's.
    children: UnsafeCell<Vec<JoinHandle>>,
}

/// How many processes there are.
pub(crate) fn alive() -> u64 {
    ALIVE.load(Ordering::Acquire)
}

/// What was written, which is forgotten then.
pub(crate) fn take_console() -> ArrayVec<u8, 256> {
    core::mem::take(&mut CONSOLE.lock())
}

/// The file that the programs are in.
struct Text;

fn text() -> &'static [u8] {
    let (start, end) = (&raw const user_text, &raw const user_text_end);
    // SAFETY: constants of the image, from one symbol to the other.
    unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

impl MappingOps for Text {
    fn read_folio(&self, index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        let from = text().get(index as usize * PAGE_SIZE..).unwrap_or(&[]);
        let length = from.len().min(pages.len());
        pages[..length].copy_from_slice(&from[..length]);
        pages[length..].fill(0);
        Ok(())
    }

    fn writepage(&self, _index: u64, _pages: &[u8]) -> Result<(), FileError> {
        // It is mapped privately, and not to be written at all.
        Err(FileError::Io)
    }
}

/// That file.
///
/// # Errors
///
/// No memory.
pub(crate) fn text_file(mm: &'static Mm<Metal>) -> Result<Mapping<'static, Metal>, AllocError> {
    static TEXT_FILE: Text = Text;
    Mapping::new(mm, &TEXT_FILE, text().len().div_ceil(PAGE_SIZE) as u64)
}

/// What a process starts as.
#[derive(Clone, Copy)]
pub(crate) struct Program {
    /// A symbol of `user.s`.
    pub(crate) entry: &'static u8,
    pub(crate) arguments: [u64; 2],
    /// Pages of its memory.
    pub(crate) pages: u64,
}

/// Starts a process.
///
/// # Errors
///
/// No memory.
pub(crate) fn start(
    file: &Mapping<'static, Metal>,
    mm: &'static Mm<Metal>,
    program: &Program,
) -> Result<JoinHandle, AllocError> {
    let space = Space::new(mm, NEXT_ASID.fetch_add(1, Ordering::Relaxed))?;
    let text_flags = VmFlags::READ.with(VmFlags::EXEC);
    let stack = STACK_TOP - STACK_PAGES * PAGE;
    space.mmap(
        Some(TEXT),
        text().len() as u64,
        text_flags,
        Map::File(file, 0),
    )?;
    space.mmap(
        Some(DATA),
        program.pages.max(1) * PAGE,
        VmFlags::READ_WRITE,
        Map::Anon,
    )?;
    space.mmap(
        Some(stack),
        STACK_PAGES * PAGE,
        VmFlags::READ_WRITE,
        Map::Anon,
    )?;
    let offset = (&raw const *program.entry).addr() - (&raw const user_text).addr();
    let mut frame = Frame::of_user(TEXT + offset as u64, STACK_TOP);
    frame.rdi = program.arguments[0];
    frame.rdx = program.arguments[1];
    frame.rsi = DATA;
    STARTED.fetch_add(1, Ordering::Relaxed);
    spawn(space, frame)
}

fn spawn(space: Space, frame: Frame) -> Result<JoinHandle, AllocError> {
    ALIVE.fetch_add(1, Ordering::AcqRel);
    let spawned = thread::spawn("user", move || {
        let value = run(space, &frame);
        ALIVE.fetch_sub(1, Ordering::AcqRel);
        value
    });
    if spawned.is_err() {
        ALIVE.fetch_sub(1, Ordering::AcqRel);
    }
    spawned
}

/// Runs the calling thread in user mode, until it exits or is killed; what it said.
fn run(space: Space, frame: &Frame) -> u64 {
    let running = Running {
        space,
        children: UnsafeCell::new(Vec::new()),
    };
    let me = thread::current();
    me.running
        .store((&raw const running).cast_mut(), Ordering::Relaxed);
    // SAFETY: it lives until after the thread has left it, below.
    unsafe { users::enter(Some(&running.space)) };
    interrupts::disable();
    users::forget_segments();
    // SAFETY: the frame is of user mode, interrupts are off; what comes back comes by `leave_user`.
    let value = unsafe { enter_user(frame) };
    interrupts::enable();
    me.user_traps.store(0, Ordering::Relaxed);
    me.running.store(core::ptr::null_mut(), Ordering::Relaxed);
    // SAFETY: the kernel's own lives for ever.
    unsafe { users::enter(None) };
    MOST_STACK.fetch_max(thread::stack_used(), Ordering::Relaxed);
    value
}

/// The process of the calling thread ends with this value. In a trap from user mode, with interrupts off; what is on the stack below `run` is not dropped.
fn leave(value: u64) -> ! {
    interrupts::disable();
    let saved = thread::current().user_traps.load(Ordering::Relaxed);
    // SAFETY: the thread came by `enter_user`, which saved what is there, and this trap is below it on the stack.
    unsafe { leave_user(value, saved) }
}

/// The process did what it may not.
pub(crate) fn kill(frame: &Frame, why: fmt::Arguments<'_>) -> ! {
    KILLS.fetch_add(1, Ordering::Relaxed);
    let id = thread::current().id();
    log!("user: process {id} killed at {:#x}: {why}", frame.rip);
    leave(KILLED | frame.vector)
}

/// Why it was killed that touched what it may not.
pub(crate) fn killed_by_fault(
    frame: &Frame,
    address: u64,
    what: &str,
    why: Option<FaultError>,
) -> ! {
    if !matches!(why, Some(FaultError::Oom(_))) {
        STRAYS.fetch_add(1, Ordering::Relaxed);
    }
    match why {
        Some(why) => kill(frame, format_args!("{what} {address:#x}: {why}")),
        None => kill(
            frame,
            format_args!("{what} {address:#x}, which is the kernel's"),
        ),
    }
}

/// Before a trap goes back to user mode, with interrupts off.
pub(crate) fn before_user(frame: &Frame) {
    if thread::current().killed.load(Ordering::Relaxed) {
        kill(frame, format_args!("somebody wants it to end"));
    }
    // `iretq` would fault in the kernel.
    if frame.rip >= TOP {
        kill(frame, format_args!("ran out of its addresses"));
    }
}

/// Has a process end, wherever it is, before it runs in user mode the next time.
pub(crate) fn end(process: &JoinHandle) {
    process.thread().killed.store(true, Ordering::Relaxed);
}

/// What the process of the calling thread asks for.
pub(crate) fn syscall(frame: &mut Frame) {
    interrupts::enable();
    CALLS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: `run` has it as long as the thread is there.
    let Some(running) = (unsafe { thread::current().running.load(Ordering::Relaxed).as_ref() })
    else {
        unreachable!("a call from user mode by a thread of the kernel");
    };
    let space = &running.space;
    // SAFETY: only this thread, here.
    let children = unsafe { &mut *running.children.get() };
    frame.rax = match frame.rax {
        EXIT => leave(frame.rdi & !KILLED),
        WRITE => write(space, frame.rdi, frame.rsi),
        YIELD => u64::from(sched::yield_now()),
        FORK => fork(running, children, frame).unwrap_or(ENOMEM),
        WAIT if children.is_empty() => ECHILD,
        WAIT => children.remove(0).join(),
        MMAP => space
            .mmap(None, frame.rdi, VmFlags::READ_WRITE, Map::Anon)
            .unwrap_or_else(number),
        MUNMAP => space
            .munmap(frame.rdi, frame.rsi)
            .map_or_else(number, |()| 0),
        SLEEP => {
            sched::sleep_ms(frame.rdi.min(1000));
            0
        }
        _ => ENOSYS,
    };
    interrupts::disable();
}

fn number(why: AllocError) -> u64 {
    if why == AllocError::BadSize {
        EINVAL
    } else {
        ENOMEM
    }
}

/// Bytes that were written, and their sum.
pub(crate) static WRITTEN: AtomicU64 = AtomicU64::new(0);

fn write(space: &Space, at: u64, length: u64) -> u64 {
    let mut bytes = [0; 128];
    let length = length.min(bytes.len() as u64) as usize;
    let bytes = &mut bytes[..length];
    if space.read(at, bytes).is_err() {
        return EFAULT;
    }
    let mut console = CONSOLE.lock();
    let room = console.remaining_capacity().min(length);
    // There is room for so many.
    let _ = console.try_extend_from_slice(&bytes[..room]);
    WRITTEN.fetch_add(length as u64, Ordering::Relaxed);
    length as u64
}

fn fork(
    running: &Running,
    children: &mut Vec<JoinHandle>,
    frame: &Frame,
) -> Result<u64, AllocError> {
    // Room first: a child that cannot be waited for is not made.
    children.try_reserve(1).map_err(|_| AllocError::NoBlock)?;
    let space = running
        .space
        .fork(NEXT_ASID.fetch_add(1, Ordering::Relaxed))?;
    let mut frame = *frame;
    frame.rax = 0;
    let child = spawn(space, frame)?;
    let id = child.thread().id();
    FORKS.fetch_add(1, Ordering::Relaxed);
    children.push(child);
    Ok(id)
}
