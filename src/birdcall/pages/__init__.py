"""Pages to look at and listen to: each one file that opens from disk and asks no network."""
