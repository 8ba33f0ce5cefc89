"""Studies: a table of (recipe x data set x seed), run to the end, with what it says and what it cost."""
