"""What the system knows: maps, tables and the registry. LevelDB is reached only here. Imports `protocol` only."""
