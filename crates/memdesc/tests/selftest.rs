//! The tests that run wherever memdesc does, in this process: each by itself. The bare-metal image runs the same ones at boot.

mod common;

use std::ops::Deref;

use memdesc::{Config, Mm};
use memdesc_host::Host;
use memdesc_selftest::{Case, Lab};

struct Hosted;

/// A memory manager of the test's own.
struct Booted(Mm<Host>);

impl Deref for Booted {
    type Target = Mm<Host>;

    fn deref(&self) -> &Mm<Host> {
        &self.0
    }
}

impl Lab for Hosted {
    type Platform = Host;
    type Booted<'l> = Booted;

    fn config(&self) -> Config {
        Config {
            memory_is_zeroed: true,
            ..common::base_config()
        }
    }

    fn boot(&self, config: &Config, pages: u32) -> Booted {
        let mut machine = common::Machine::flat(pages);
        machine.config = *config;
        Booted(machine.boot())
    }

    #[cfg(not(miri))]
    fn can_read(&self, at: *const u8) -> bool {
        common::touch(at.cast_mut(), false) == 0
    }

    #[cfg(miri)]
    fn can_read(&self, _at: *const u8) -> bool {
        unreachable!("nothing is asked of it under Miri")
    }
}

macro_rules! tests {
    ($($(#[$of_suite:meta])* $suite:ident { $($(#[$of_test:meta])* $name:ident $mib:literal;)* })*) => {
        $($(#[$of_suite])* mod $suite {
            $($(#[$of_test])*
            #[test]
            fn $name() {
                memdesc_selftest::$suite::$name(&super::Hosted);
            })*
        })*
    };
}

memdesc_selftest::for_each_suite!(tests);

#[test]
fn the_table_names_each_once() {
    let mut names: Vec<_> = Case::<Hosted>::ALL.iter().map(|case| case.name).collect();
    names.sort_unstable();
    let all = names.len();
    names.dedup();
    assert_eq!(names.len(), all);
    assert!(all >= 50, "{all} tests");
}
