"""Run files of the research code, turned into ours: `coordexp config migrate`."""

from coordexp.config.checks.yaml_tree import Tree
from coordexp.config.migrate.adjust import adjust
from coordexp.config.migrate.convert import Migration, take_keys
from coordexp.config.migrate.text import report, to_yaml

__all__ = ["Migration", "migrate", "report", "to_yaml"]


def migrate(source: Tree) -> Migration:
    """A run file of the research code as one of ours, with notes on everything that is not simply the same.

    source: the file, `extends` resolved.

    Raises:
        ConfigError: keys that neither side knows, with the nearest that one knows.
    """
    migration = take_keys(source)
    adjust(migration)
    return migration
