"""Getting N ranks to run."""
