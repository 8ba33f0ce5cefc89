"""Records of data files, checked once and kept on disk as Arrow tables that every process maps into its memory."""
