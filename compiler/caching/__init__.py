"""Parts of the cache: stamps of files, records of entries, stored hashes."""
