"""Message passing on chains and trees, written once on `ops`: exact inference inside programs, and as guides."""
