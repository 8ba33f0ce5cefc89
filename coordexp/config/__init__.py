"""The run configuration: YAML and command line -> typed, checked settings. No torch.

`load_run_config` reads a whole run file; `parse_sections` reads only our sections, as the plugin gets them.
"""

from coordexp.config.checks.not_built import swift_not_built
from coordexp.config.run.load import load_run_config
from coordexp.config.run.resolved import config_hash, derive, mask_secrets, resolved_config, write_resolved
from coordexp.config.run.run_config import RunConfig
from coordexp.config.schema.custom import DEFAULT_VARIANT, VARIANTS
from coordexp.config.schema.pipeline import Pipeline, pipeline_checksum, pipeline_identity
from coordexp.config.schema.prompt import DEFAULT_PROMPT, Prompt
from coordexp.config.schema.sections import (
    Sections,
    check_variant,
    checksum_of,
    parse_sections,
    read_sections_file,
    sections_hash,
)

__all__ = [
    "DEFAULT_PROMPT",
    "DEFAULT_VARIANT",
    "VARIANTS",
    "Pipeline",
    "Prompt",
    "RunConfig",
    "Sections",
    "check_variant",
    "checksum_of",
    "config_hash",
    "derive",
    "load_run_config",
    "mask_secrets",
    "parse_sections",
    "pipeline_checksum",
    "pipeline_identity",
    "read_sections_file",
    "resolved_config",
    "sections_hash",
    "swift_not_built",
    "write_resolved",
]
