"""What watches a run while it trains: rules on its records, signs of life, and the end that a rule asks for."""
