"""Learning, with torch: what passes need beyond statistics. Only `trimtab train` imports this package."""
