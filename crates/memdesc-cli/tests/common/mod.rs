//! Running the program.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

pub(crate) fn memdesc(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_memdesc"))
        .args(args)
        .output()
        .expect("the program starts")
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Replays with `--json` and expects success.
pub(crate) fn json(args: &[&str]) -> Value {
    let output = memdesc(&[&["replay", "--json"], args].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// A number by its nested keys and indices, with dots.
pub(crate) fn number(value: &Value, keys: &str) -> u64 {
    at(value, keys)
        .as_u64()
        .unwrap_or_else(|| panic!("{keys} is no number"))
}

pub(crate) fn at<'a>(value: &'a Value, keys: &str) -> &'a Value {
    let mut value = value;
    for key in keys.split('.') {
        let index = key.parse::<usize>().ok();
        value = value
            .get(key)
            .or_else(|| value.get(index?))
            .unwrap_or_else(|| panic!("no {key} of {keys}"));
    }
    value
}

/// A folder for one test, empty at its start.
pub(crate) fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).expect("a folder in the target folder");
    path
}

pub(crate) fn write(folder: &Path, name: &str, data: impl AsRef<[u8]>) -> String {
    let path = folder.join(name);
    std::fs::write(&path, data).expect("a file in the target folder");
    path.display().to_string()
}

/// A recording put together line by line.
#[derive(Default)]
pub(crate) struct Text {
    pub(crate) text: String,
    time: u64,
}

impl Text {
    pub(crate) fn event(&mut self, cpu: usize, text: &str) {
        self.time += 1;
        self.text += &format!("[{cpu:03}]   1.{:06}: kmem:{text}\n", self.time);
    }

    pub(crate) fn alloc(&mut self, pfn: u32, order: u32, gfp: &str) {
        self.event(
            0,
            &format!(
                "mm_page_alloc: page=0x1 pfn={pfn:#x} order={order} migratetype=0 gfp_flags={gfp}"
            ),
        );
    }

    pub(crate) fn free(&mut self, pfn: u32, order: u32) {
        self.event(
            1,
            &format!("mm_page_free: page=0x1 pfn={pfn:#x} order={order}"),
        );
    }

    pub(crate) fn kmalloc(&mut self, ptr: u64, size: u32) {
        let text = format!(
            "kmalloc: call_site=f ptr={ptr:#x} bytes_req={size} bytes_alloc={size} gfp_flags=GFP_KERNEL|__GFP_ZERO"
        );
        self.event(0, &text);
    }

    pub(crate) fn kfree(&mut self, ptr: u64) {
        self.event(1, &format!("kfree: call_site=f ptr={ptr:#x}"));
    }

    pub(crate) fn cache_alloc(&mut self, name: &str, ptr: u64, size: u32) {
        let text = format!(
            "kmem_cache_alloc: call_site=f ptr={ptr:#x} name={name} bytes_req={size} bytes_alloc={size} gfp_flags=GFP_KERNEL"
        );
        self.event(0, &text);
    }

    pub(crate) fn cache_free(&mut self, name: &str, ptr: u64) {
        self.event(
            0,
            &format!("kmem_cache_free: call_site=f ptr={ptr:#x} name={name}"),
        );
    }
}
