"""What a run looks like from inside: the trace of its instructions and accesses, and the history of its mappings."""
