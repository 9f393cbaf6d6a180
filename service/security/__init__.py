"""Who may ask, how much, and over which connections: API keys, their limits, TLS."""
