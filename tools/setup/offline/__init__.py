"""The wheels that a machine without a network lacks, as a folder that installs from itself; see ../wheelhouse.py."""


class OfflineError(Exception):
    """What cannot be collected as asked: what was found, and what to do. The program ends with exit code 2."""
