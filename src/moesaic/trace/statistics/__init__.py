"""Statistics of a routing trace: one file per measure, each a plain function of a trace that returns arrays."""
