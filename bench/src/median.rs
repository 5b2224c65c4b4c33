//! What is typical of a few measurements.

use serde::Serialize;

/// The middle of some measurements, and how far they were apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Median {
    /// The one in the middle; of two in the middle, their mean.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Median {
    /// Of these; none if there are none.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (upper, lower) = (values.len() / 2, values.len().checked_sub(1)? / 2);
        Some(Median {
            median: (values[lower] + values[upper]) / 2.0,
            min: values[0],
            max: values[values.len() - 1],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_few_and_of_none() {
        let of = |values: &[f64]| Median::of(values.iter().copied());
        assert_eq!(of(&[]), None);
        for (values, median, min, max) in [
            (&[3.0][..], 3.0, 3.0, 3.0),
            (&[3.0, 1.0], 2.0, 1.0, 3.0),
            (&[3.0, 9.0, 1.0], 3.0, 1.0, 9.0),
        ] {
            assert_eq!(of(values), Some(Median { median, min, max }));
        }
    }
}
