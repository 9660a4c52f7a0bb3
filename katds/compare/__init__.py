"""The comparison: rules x objectives x seeds on one prompt budget, a run each, and a table of means and intervals."""
