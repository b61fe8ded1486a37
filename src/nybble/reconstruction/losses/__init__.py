"""What a window of blocks is held to: one loss a file, found by name (:mod:`nybble.reconstruction`)."""
