"""The only folder that imports ms-swift: arguments, template, datasets, trainer base, engine, version check."""
