"""A trained model given to others: one folder that any tool loads, and the card that says what it is."""
