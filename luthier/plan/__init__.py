"""Whether a run will fit and how fast it can be, found by compiling its programs for a machine that is not there."""
