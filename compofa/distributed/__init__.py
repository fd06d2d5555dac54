"""Worker processes that compute together, and CPU threads."""
