"""What went wrong, and where: kinds of errors and what they cost, confusions, repeats, probable label errors."""
