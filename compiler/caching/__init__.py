"""What the cache is made of: stamps of files, records of entries, hashes that are kept."""
