"""The command line: ``smoothcache``, ``python -m smoothcache_fx``."""
