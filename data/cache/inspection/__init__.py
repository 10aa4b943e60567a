"""Every byte of a cache: verified, measured, shown."""
