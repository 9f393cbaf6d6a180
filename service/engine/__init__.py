"""The one thread that owns the device."""
