"""``fastokd compare``: methods trained alike, at equal images seen and at equal multiply-accumulates."""
