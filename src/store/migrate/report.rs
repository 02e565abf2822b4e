//! What was done, for people.

use std::collections::BTreeMap;
use std::fmt;

/// How many examples are given of what was skipped for one reason.
const EXAMPLES: usize = 3;

/// What a run came to.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) users: Tally,
    pub(super) channels: Tally,
    pub(super) messages: Tally,
    /// Messages without a date that can be read.
    pub(super) undated: u64,
}

/// What came of all things of one kind.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Written by this run.
    pub(super) migrated: u64,
    /// Written before it.
    pub(super) there: u64,
    skipped: BTreeMap<&'static str, Skipped>,
}

/// What was skipped for one reason.
#[derive(Debug, Default)]
struct Skipped {
    count: u64,
    /// Where some of it is in the source.
    examples: Vec<String>,
    /// Whether it is elsewhere too.
    more: bool,
}

impl Tally {
    /// Counts one that was `migrated` or else was there already.
    pub(super) fn count(&mut self, migrated: bool) {
        if migrated {
            self.migrated += 1;
        } else {
            self.there += 1;
        }
    }

    /// Counts one that was skipped.
    pub(super) fn skip(&mut self, reason: &'static str, example: impl FnOnce() -> String) {
        self.skip_many(reason, 1, example);
    }

    /// Counts some that were skipped for one reason.
    pub(super) fn skip_many(
        &mut self,
        reason: &'static str,
        count: u64,
        example: impl FnOnce() -> String,
    ) {
        let skipped = self.skipped.entry(reason).or_default();
        skipped.count += count;
        if skipped.examples.len() < EXAMPLES {
            skipped.examples.push(example());
        } else {
            skipped.more = true;
        }
    }

    /// Adds what came of others.
    pub(super) fn add(&mut self, other: Self) {
        self.migrated += other.migrated;
        self.there += other.there;
        for (reason, more) in other.skipped {
            let skipped = self.skipped.entry(reason).or_default();
            skipped.count += more.count;
            skipped.examples.extend(more.examples);
            skipped.more |= more.more || skipped.examples.len() > EXAMPLES;
            skipped.examples.truncate(EXAMPLES);
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "users: {}", self.users)?;
        writeln!(f, "channels: {}", self.channels)?;
        write!(f, "messages: {}", self.messages)?;
        if self.undated > 0 {
            let count = self.undated;
            write!(
                f,
                "\n  {count} without a date that can be read: each has the date of the one before"
            )?;
        }
        Ok(())
    }
}

/// The numbers, and a line for each reason to skip something.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let skipped: u64 = self.skipped.values().map(|skipped| skipped.count).sum();
        write!(
            f,
            "{} migrated, {} already there, {skipped} skipped",
            self.migrated, self.there
        )?;
        for (reason, skipped) in &self.skipped {
            let Skipped { count, more, .. } = skipped;
            let examples = skipped.examples.join(", ");
            let more = if *more { ", …" } else { "" };
            write!(f, "\n  {count} skipped: {reason} ({examples}{more})")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_counts_everything_and_gives_a_few_examples() {
        let mut report = Report::default();
        report.users.count(true);
        report.users.count(true);
        report.users.count(false);
        for n in 0..5 {
            let mut tally = Tally::default();
            tally.skip("it is empty", || format!("list[{n}]"));
            tally.migrated = 10;
            report.messages.add(tally);
        }
        report
            .messages
            .skip_many("it is no list", 2, || "list".to_owned());
        report.undated = 7;
        assert_eq!(
            report.to_string(),
            "users: 2 migrated, 1 already there, 0 skipped\n\
             channels: 0 migrated, 0 already there, 0 skipped\n\
             messages: 50 migrated, 0 already there, 7 skipped\n  \
             5 skipped: it is empty (list[0], list[1], list[2], …)\n  \
             2 skipped: it is no list (list)\n  \
             7 without a date that can be read: each has the date of the one before"
        );
    }
}
