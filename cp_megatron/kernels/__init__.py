"""One device's attention tile: forward, backward and merge, one backend per file."""
