"""Does every token keep its order and every target its place, from the data file to the answer? Asked of a real run."""
